"""Operations of the statistics' operators as PyTorch's counter has them, against pairs counted one by one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from atman_kernels import AttentionPlan, SharedPrefix, _cpu, attention, attention_statistics, attention_varlen
from atman_kernels.flops import visible_pairs
from atman_kernels.reference import visible_keys
from atman_kernels.statistics import attention_with_distance

HEADS_Q, HEADS_KV, HEAD_DIM = 4, 2, 16
# Per sequence: rows, own keys, prefix keys.
LENGTHS = ((40, 40, 0), (7, 12, 20), (5, 3, 0))


def _operands() -> tuple[AttentionPlan, torch.Tensor, torch.Tensor, SharedPrefix]:
    rows, keys, prefixes = zip(*LENGTHS, strict=True)
    plan = AttentionPlan(rows, keys, [0] * len(rows), prefixes)
    q, k = torch.randn(sum(rows), HEADS_Q, HEAD_DIM), torch.randn(sum(keys), HEADS_KV, HEAD_DIM)
    prefix = torch.randn(max(prefixes), HEADS_KV, HEAD_DIM)
    return plan, q, k, SharedPrefix(prefix, prefix)


@pytest.mark.parametrize("need_distance", [True, False])
@pytest.mark.parametrize("attention_window", [None, 4, 15])
@pytest.mark.parametrize("horizon", [(0, 3), (5, 9), (2, 100)])
def test_statistics_count_the_pairs_whose_scores_they_need(
    need_distance: bool, attention_window: int | None, horizon: tuple[int, int]
) -> None:
    plan, q, k, prefix = _operands()
    window, pairs = 6, 0
    for n_rows, n_keys, n_prefix in LENGTHS:
        for row in range(n_rows):
            for key in range(n_prefix + n_keys):
                distance = row + n_prefix + n_keys - n_rows - key
                if distance < 0 or (attention_window is not None and distance >= attention_window):
                    continue
                pairs += need_distance + (distance < window)
                pairs += key >= n_prefix and horizon[0] <= distance <= horizon[1]
    _, lse = attention_varlen(q, k, k, plan=plan, prefix=prefix, window=attention_window, return_lse=True)
    with FlopCounterMode(display=False) as counter:
        attention_statistics(
            q,
            k,
            lse,
            plan=plan,
            prefix=prefix,
            window=window,
            horizon=horizon,
            attention_window=attention_window,
            need_distance=need_distance,
        )
    assert counter.get_total_flops() == 2 * HEADS_Q * HEAD_DIM * pairs


@pytest.mark.parametrize("window", [None, 1, 4, 15, 2**31 - 1])
@pytest.mark.parametrize("causal", [True, False])
def test_visible_pairs_are_those_of_the_reference(causal: bool, window: int | None) -> None:
    own = prefix = 0
    for n_rows, n_keys, n_prefix in LENGTHS:
        seen = visible_keys(n_rows, n_keys, n_prefix, causal=causal, window=window)
        own, prefix = own + int(seen[:, n_prefix:].sum()), prefix + int(seen[:, :n_prefix].sum())
    assert visible_pairs(_operands()[0].sequences, causal=causal, window=window) == (own, prefix)


@pytest.mark.parametrize("without_values", [FakeTensorMode, lambda: torch.device("meta")], ids=["fake", "meta"])
def test_tensors_without_values_are_counted_too(without_values: Callable[[], AbstractContextManager]) -> None:
    def step() -> None:
        q, k = torch.randn(2, 30, HEADS_Q, HEAD_DIM), torch.randn(2, 50, HEADS_KV, HEAD_DIM)
        bias = torch.zeros(2, 50, requires_grad=True)
        o, lse = attention(q, k, k, bias, window=20, return_lse=True)
        torch.autograd.grad(o.sum(), bias)
        attention_statistics(q[0], k[0], lse[0], cu_seqlens_q=torch.tensor([0, 30]), cu_seqlens_k=torch.tensor([0, 50]))

    with FlopCounterMode(display=False) as real:
        step()
    with FlopCounterMode(display=False) as counted, without_values():
        step()
    assert counted.get_total_flops() == real.get_total_flops() > 0


@pytest.mark.skipif(not _cpu.isas(), reason="the C++ extension is not built")
@pytest.mark.parametrize("window", [None, 15])
def test_the_distance_adds_no_product_to_the_attention(window: int | None) -> None:
    plan, q, k, prefix = _operands()
    with FlopCounterMode(display=False) as plain:
        attention_varlen(q, k, k, plan=plan, prefix=prefix, window=window)
    with FlopCounterMode(display=False) as counted:
        attention_with_distance(q[None], k[None], k[None], None, plan=plan, prefix=prefix, window=window)
    assert counted.get_total_flops() == plain.get_total_flops() > 0
