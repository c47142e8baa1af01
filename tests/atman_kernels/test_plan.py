"""The plan's table and tile schedules: every row and key of every sequence is visited once, the longest work first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from atman_kernels import AttentionPlan, SharedPrefix, attention, attention_statistics, attention_varlen
from atman_kernels import plan as plan_module
from atman_kernels.plan import TILE, dense_plan
from tests.random_cases import random_cases

lengths = st.lists(st.integers(0, 3 * TILE), min_size=0, max_size=6)


def visits(tiles: Tensor) -> list[tuple[int, int]]:
    """The (sequence, first row) entries that are not idle."""
    return [(sequence, first) for sequence, first in tiles.tolist() if sequence >= 0]


def assert_visits_all_once(tiles: Tensor, lengths: list[int]) -> None:
    expected = [(i, first) for i, n in enumerate(lengths) for first in range(0, n, TILE)]
    assert sorted(visits(tiles)) == expected
    idle = tiles[tiles[:, 0] < 0]
    assert (tiles[len(expected) :] == idle).all(), "idle entries stand last"


@given(lengths, lengths)
@random_cases(50)
def test_every_tile_of_every_sequence_is_visited_once(lengths_q, lengths_k):
    n = min(len(lengths_q), len(lengths_k))
    lengths_q, lengths_k = lengths_q[:n], lengths_k[:n]
    plan = AttentionPlan(lengths_q, lengths_k)
    assert_visits_all_once(plan.tiles_q, lengths_q)
    assert_visits_all_once(plan.tiles_k, lengths_k)


@given(lengths)
@random_cases(30)
def test_the_plan_of_device_offsets_equals_the_plan_of_host_lengths(lengths):
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    host = AttentionPlan(lengths)
    device = AttentionPlan.from_cu_seqlens(
        cu, cu, None, None, total_q=sum(lengths), total_k=sum(lengths), device=torch.device("cpu")
    )
    assert torch.equal(device.sequences, host.sequences)
    assert visits(device.tiles_q) == visits(host.tiles_q)
    assert visits(device.tiles_k) == visits(host.tiles_k)
    assert (device.total_q, device.total_k, device.batch) == (host.total_q, host.total_k, host.batch)


def test_the_table_states_where_each_sequence_lies():
    plan = AttentionPlan([3, 0, 5], [4, 2, 5], prefix_start=[0, 7, 1], prefix_length=[7, 0, 2])
    assert plan.sequences.tolist() == [
        [0, 0, 3, 0, 4, 0, 7],
        [0, 3, 0, 4, 2, 7, 0],
        [0, 3, 5, 6, 5, 1, 2],
    ]
    assert plan.sequences.dtype == torch.int32
    assert (plan.n_seq, plan.batch, plan.total_q, plan.total_k, plan.prefix_end) == (3, 1, 8, 11, 7)
    assert plan.covers


def test_an_empty_prefix_range_reaches_nowhere():
    assert AttentionPlan([1], prefix_start=[9], prefix_length=[0]).prefix_end == 0


def test_query_tiles_with_the_most_visible_keys_come_first():
    plan = AttentionPlan([2 * TILE, TILE], prefix_start=[0, 0], prefix_length=[0, 5 * TILE])
    assert visits(plan.tiles_q) == [(1, 0), (0, TILE), (0, 0)]


def test_key_tiles_of_the_longest_sequence_come_first():
    plan = AttentionPlan([TILE, 3 * TILE])
    assert visits(plan.tiles_k) == [(1, 0), (1, TILE), (1, 2 * TILE), (0, 0)]


def test_rows_of_a_padded_batch_are_one_sequence_each():
    start, length = torch.tensor([2, 0]), torch.tensor([TILE + 1, 3])
    plan = AttentionPlan.from_rows(start, length, start + 1, length + 4, max_q=200, max_k=300, covers=False)
    assert plan.sequences.tolist() == [[0, 2, TILE + 1, 3, TILE + 5, 0, 0], [1, 0, 3, 1, 7, 0, 0]]
    assert_visits_all_once(plan.tiles_q, [TILE + 1, 3])
    assert_visits_all_once(plan.tiles_k, [TILE + 5, 7])
    assert (plan.batch, plan.total_q, plan.total_k) == (2, 200, 300)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([2, -1],), "lengths_q must not be negative, got -1 for sequence 1"),
        (([2, 1], [3]), "lengths_k has 1 entries for 2 sequences"),
        (([[2, 1]],), r"lengths_q must be one-dimensional, got shape \(1, 2\)"),
        ((torch.tensor(3),), r"lengths_q must be one-dimensional, got shape \(\)"),
        (([2.5],), "lengths_q must be integers, got torch.float32"),
        (([2], None, [0]), "prefix_start and prefix_length are given together"),
        (([2], None, [0, 1], [0, 1]), "prefix_start has 2 entries for 1 sequences"),
        (([2], None, [0], [-4]), "prefix_length must not be negative, got -4 for sequence 0"),
        (([2**30, 2**30],), "positions are 32-bit numbers, but the queries end at 2147483648"),
        (([2], None, [2**31], [1]), "positions are 32-bit numbers, but the prefix ranges end at 2147483649"),
    ],
)
def test_lengths_that_describe_no_batch_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionPlan(*arguments)


def test_a_plan_moves_to_another_device_whole():
    plan = AttentionPlan([3, 4])
    moved = plan.to("meta")
    assert {x.device.type for x in (moved.sequences, moved.tiles_q, moved.tiles_k)} == {"meta"}
    assert (moved.batch, moved.total_q, moved.covers) == (plan.batch, plan.total_q, plan.covers)
    assert plan.to("cpu") is plan


CPU = torch.device("cpu")


def test_dense_plans_are_kept():
    assert dense_plan(2, 7, 9, CPU) is dense_plan(2, 7, 9, CPU)
    assert dense_plan(2, 7, 9, CPU).sequences.tolist() == [[0, 0, 7, 0, 9, 0, 0], [1, 0, 7, 0, 9, 0, 0]]


def test_a_plan_made_in_inference_mode_serves_a_later_backward():
    q = torch.randn(1, 11, 1, 4)
    with torch.inference_mode():
        attention(q, q, q)
    q.requires_grad_()
    (found,) = torch.autograd.grad(attention(q, q, q).square().sum(), q)
    expected = torch.autograd.grad(attention_varlen(q[0], q[0], q[0], plan=AttentionPlan([11])).square().sum(), q)
    torch.testing.assert_close(found, expected[0])


def test_a_plan_of_lengths_made_in_inference_mode_serves_a_later_backward():
    with torch.inference_mode():
        plan = AttentionPlan([5, 6])
    q = torch.randn(11, 1, 4, requires_grad=True)
    found, expected = (
        torch.autograd.grad(attention_varlen(q, q, q, plan=each).square().sum(), q)[0]
        for each in (plan, AttentionPlan([5, 6]))
    )
    assert torch.equal(found, expected)


def test_dense_plans_of_different_streams_are_different(monkeypatch):
    """Another stream might read tables that are still being written."""
    first = dense_plan(2, 5, 5, CPU)
    monkeypatch.setattr(plan_module, "_current_stream", lambda device: 1)
    assert dense_plan(2, 5, 5, CPU) is not first
    assert dense_plan(2, 5, 5, CPU) is dense_plan(2, 5, 5, CPU)


def test_no_value_of_a_device_tensor_is_read_on_the_host():
    """Meta tensors, which have no values, stand in for those of a GPU; reading one there would synchronise."""
    q, k, v = (torch.empty(9, heads, 8, device="meta", requires_grad=True) for heads in (2, 1, 1))
    bias = torch.empty(9, device="meta", requires_grad=True)
    cu, ranges = torch.empty(3, dtype=torch.int32, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    prefix = SharedPrefix(k.detach(), v.detach(), ranges, ranges)
    o, lse = attention_varlen(q, k, v, bias, cu_seqlens_q=cu, prefix=prefix, window=5, return_lse=True)
    dense = attention(q[None], k[None], v[None], bias[None])
    assert all(g.is_meta for g in torch.autograd.grad([o.sum(), lse.sum(), dense.sum()], (q, k, v, bias)))
    rows = torch.empty(9, dtype=torch.bool, device="meta")
    assert attention_statistics(q, k, lse, cu_seqlens_q=cu, key_bias=bias, prefix=prefix, rows=rows).received.is_meta


def test_a_plan_made_of_fake_tensors_is_not_kept():
    with FakeTensorMode():
        fake = dense_plan(1, 13, 13, CPU)
    assert type(dense_plan(1, 13, 13, CPU).sequences) is Tensor
    with FakeTensorMode():
        assert type(dense_plan(1, 13, 13, CPU).sequences) is type(fake.sequences)
