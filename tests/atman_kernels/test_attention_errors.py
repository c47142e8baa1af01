"""Bad input to the public functions gets an error that states the offending numbers, and nothing is computed."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from atman_kernels import AttentionPlan, SharedPrefix, attention, attention_varlen, backend, debug_checks
from atman_kernels.attention import attention_rows


def tensors(*, batch: int = 2, rows: int = 5, keys: int = 5, heads: int = 4, heads_kv: int = 2, dim: int = 8):
    shapes = {"q": (batch, rows, heads, dim), "k": (batch, keys, heads_kv, dim), "v": (batch, keys, heads_kv, dim)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def packed(rows: int = 5, keys: int = 5) -> dict[str, Tensor]:
    return {name: x[0] for name, x in tensors(batch=1, rows=rows, keys=keys).items()}


def offsets(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def says(message: str):
    return pytest.raises(ValueError, match=re.escape(message))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(5, 4, 8)}, "q must have 4 dimensions (B, T, H, D), got shape (5, 4, 8)"),
        ({"k": torch.zeros(2, 5, 8)}, "k must have 4 dimensions (B, T, H, D), got shape (2, 5, 8)"),
        ({"v": torch.zeros(2, 5, 2, 8, 1)}, "v must have 4 dimensions (B, T, H, D), got shape (2, 5, 2, 8, 1)"),
        ({"q": torch.zeros(2, 5, 4, 8, dtype=torch.int64)}, "q has dtype torch.int64; supported: torch.float64,"),
        ({"k": torch.zeros(2, 5, 2, 8).half()}, "k has dtype torch.float16, q has torch.float32"),
        ({"v": torch.zeros(2, 5, 2, 8).bfloat16()}, "v has dtype torch.bfloat16, q has torch.float32"),
        ({"k": torch.zeros(2, 5, 2, 8, device="meta")}, "k is on meta, q on cpu"),
        ({"v": torch.zeros(2, 6, 2, 8)}, "k and v differ in shape: (2, 5, 2, 8) and (2, 6, 2, 8)"),
        ({"q": torch.zeros(2, 5, 4, 16)}, "q has head_dim 16, k and v have 8"),
        ({"q": torch.zeros(2, 5, 3, 8)}, "the 3 query heads are not a positive multiple of the 2 key/value heads"),
        ({"q": torch.zeros(2, 5, 0, 8)}, "the 0 query heads are not a positive multiple of the 2 key/value heads"),
        ({"q": torch.zeros(3, 5, 4, 8)}, "q has batch size 3, k and v have 2"),
        (tensors(dim=257), "head_dim 257 is outside 1..256"),
        (tensors(dim=0), "head_dim 0 is outside 1..256"),
    ],
)
def test_operands_that_do_not_fit_together(change, message):
    with says(message):
        attention(**{**tensors(), **change})


@pytest.mark.parametrize(
    ("key_bias", "message"),
    [
        (torch.zeros(2, 4), "key_bias must have one number per key, shape (2, 5), got (2, 4)"),
        (torch.zeros(5), "key_bias must have one number per key, shape (2, 5), got (5,)"),
        (torch.zeros(2, 4, 5, 5), "key_bias must have one number per key, shape (2, 5), got (2, 4, 5, 5)"),
        (torch.zeros(2, 5).half(), "key_bias must be float32, got torch.float16"),
        (torch.zeros(2, 5).double(), "key_bias must be float32, got torch.float64"),
        (torch.zeros(2, 5, device="meta"), "key_bias is on meta, q on cpu"),
        (
            torch.zeros(2, 5).index_fill(1, torch.tensor(3), torch.nan),
            "key_bias must be finite or -inf, got nan at (0, 3) (2 such values)",
        ),
        (
            torch.zeros(2, 5).index_fill(0, torch.tensor(1), torch.inf),
            "key_bias must be finite or -inf, got inf at (1, 0) (5 such values)",
        ),
    ],
)
def test_a_key_bias_that_is_not_one_finite_or_minus_infinite_float32_per_key(key_bias, message):
    with says(message):
        attention(**tensors(), key_bias=key_bias)


def test_forward_mode_is_refused_instead_of_answered_with_zeros():
    x = tensors()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda bias: attention(**x, key_bias=bias), (torch.zeros(2, 5),), (torch.ones(2, 5),))


def test_a_plan_with_prefix_ranges_known_to_the_device_alone_needs_the_prefix():
    ends = {"total_q": 5, "total_k": 5, "device": torch.device("cpu")}
    with_prefix = AttentionPlan.from_cu_seqlens(offsets(0, 5), offsets(0, 5), offsets(0), offsets(3), **ends)
    with says("the plan has prefix ranges, but no prefix was given"):
        attention_varlen(**packed(), plan=with_prefix)
    without = AttentionPlan.from_cu_seqlens(offsets(0, 5), offsets(0, 5), None, None, **ends)
    x = {name: torch.randn_like(zeros) for name, zeros in packed().items()}
    assert torch.equal(attention_varlen(**x, plan=without), attention_varlen(**x, plan=AttentionPlan([5])))


def test_a_packed_key_bias_has_one_dimension():
    with says("key_bias must have one number per key, shape (5,), got (1, 5)"):
        attention_varlen(**packed(), key_bias=torch.zeros(1, 5), cu_seqlens_q=offsets(0, 5))


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": -3}, "window must be at least 1, got -3"),
        ({"window": 2, "causal": False}, "window needs causal=True"),
    ],
)
def test_windows_that_show_nothing_or_have_no_direction(bounds, message):
    with says(message):
        attention(**tensors(), **bounds)
    with says(message):
        attention_varlen(**packed(), cu_seqlens_q=offsets(0, 5), **bounds)


def test_packed_operands_have_three_dimensions():
    with says("q must have 3 dimensions (T_total, H, D), got shape (2, 5, 4, 8)"):
        attention_varlen(**tensors(), cu_seqlens_q=offsets(0, 5))


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ({"cu_seqlens_q": offsets(0, 3, 2, 5)}, "cu_seqlens_q decreases from 3 to 2 at sequence 1"),
        ({"cu_seqlens_q": offsets(0, 3)}, "cu_seqlens_q ends at 3, but the packed tensor has 5 rows"),
        ({"cu_seqlens_q": offsets(0, 7)}, "cu_seqlens_q ends at 7, but the packed tensor has 5 rows"),
        ({"cu_seqlens_q": offsets(1, 5)}, "cu_seqlens_q must start at 0, got 1"),
        ({"cu_seqlens_q": torch.zeros(2)}, "cu_seqlens_q must be (n_seq + 1,) int32 or int64, got (2,) torch.float32"),
        ({"cu_seqlens_q": offsets(0, 5)[None]}, "cu_seqlens_q must be (n_seq + 1,) int32 or int64, got (1, 2)"),
        ({"cu_seqlens_q": offsets()}, "cu_seqlens_q must be (n_seq + 1,) int32 or int64, got (0,)"),
        ({"cu_seqlens_q": [0, 5]}, "cu_seqlens_q must be a tensor, got list"),
        (
            {"cu_seqlens_q": offsets(0, 5), "cu_seqlens_k": offsets(0, 2, 4)},
            "cu_seqlens_q describes 1 sequences, cu_seqlens_k 2",
        ),
        (
            {"cu_seqlens_q": offsets(0, 5), "cu_seqlens_k": offsets(0, 4)},
            "cu_seqlens_k ends at 4, but the packed tensor has 5 rows",
        ),
        ({}, "attention_varlen needs cu_seqlens_q or plan"),
        (
            {"cu_seqlens_q": AttentionPlan([5]), "plan": AttentionPlan([5])},
            "a plan was given twice: as cu_seqlens_q and as plan",
        ),
        ({"cu_seqlens_q": offsets(0, 5), "plan": AttentionPlan([5])}, "give a plan or cu_seqlens, not both"),
        ({"plan": AttentionPlan([2, 2])}, "the plan describes 4 rows and 4 keys, the tensors have 5 and 5"),
        ({"plan": AttentionPlan([5], device="meta")}, "the plan lies on meta, q on cpu"),
    ],
)
def test_layouts_that_do_not_describe_the_packed_tensors(cu_seqlens, message):
    with says(message):
        attention_varlen(**packed(), **cu_seqlens)


def prefix(**changes: object) -> SharedPrefix:
    """Four keys, all seen by one sequence, but for the changes."""
    keys = {"k": torch.zeros(4, 2, 8), "v": torch.zeros(4, 2, 8)}
    return SharedPrefix(**{**keys, "start": [0], "length": [4], **changes})


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        (prefix(start=[2]), "a prefix range ends at key 6, but the prefix has 4 keys"),
        (prefix(start=[-1]), "prefix_start must not be negative, got -1 for sequence 0"),
        (prefix(start=[0, 0], length=[4, 4]), "prefix.start must have one entry per sequence, 1, got (2,)"),
        (prefix(start=None), "prefix.start and prefix.length are given together, or neither"),
        (prefix(start=None, length=None), "prefix.start and prefix.length are needed"),
        (
            prefix(k=torch.zeros(4, 2, 8, requires_grad=True)),
            "prefix.k requires a gradient, but a shared prefix gets none: detach it",
        ),
        (prefix(v=torch.zeros(4, 2, 8, requires_grad=True)), "prefix.v requires a gradient"),
        (prefix(k=torch.zeros(4, 4, 8)), "prefix.k must have shape (P, 2, 8) as the packed keys, got (4, 4, 8)"),
        (prefix(k=torch.zeros(1, 4, 2, 8)), "prefix.k must have shape (P, 2, 8)"),
        (prefix(v=torch.zeros(3, 2, 8)), "prefix.k and prefix.v differ: (4, 2, 8) and (3, 2, 8)"),
        (prefix(k=torch.zeros(4, 2, 8).half()), "prefix.k is torch.float16 on cpu, k is torch.float32 on cpu"),
    ],
)
def test_prefixes_that_cannot_be_shared(shared, message):
    with says(message):
        attention_varlen(**packed(), cu_seqlens_q=offsets(0, 5), prefix=shared)


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        (None, "the plan has prefix ranges, but no prefix was given"),
        (
            prefix(k=torch.zeros(2, 2, 8), v=torch.zeros(2, 2, 8), start=None, length=None),
            "a prefix range ends at key 3, but the prefix has 2 keys",
        ),
        (prefix(start=[1], length=[3]), "prefix.start differs from the plan: [1] and [0]"),
        (prefix(length=[2]), "prefix.length differs from the plan: [2] and [3]"),
        (prefix(start=[0, 0], length=[3]), "prefix.start differs from the plan: [0, 0] and [0]"),
    ],
)
def test_prefixes_that_contradict_the_plan(shared, message):
    plan = AttentionPlan([5], prefix_start=[0], prefix_length=[3])
    with says(message):
        attention_varlen(**packed(), plan=plan, prefix=shared)


def rows_plan(batch: int, rows: int) -> AttentionPlan:
    zero = torch.zeros(batch, dtype=torch.int64)
    return AttentionPlan.from_rows(zero, zero + rows, zero, zero + rows, max_q=rows, max_k=rows, covers=True)


def test_a_plan_of_batch_rows_is_not_one_of_a_packed_batch():
    with says("the plan describes 3 batch rows, the tensors have 1"):
        attention_varlen(**packed(), plan=rows_plan(3, 5))
    with says("the plan describes 1 batch rows, the tensors have 2"):
        attention_rows(**tensors(), key_bias=None, plan=AttentionPlan([5]))
    with says("the plan describes 4 rows and 4 keys, the tensors have 5 and 5"):
        attention_rows(**tensors(), key_bias=None, plan=rows_plan(2, 4))


@pytest.mark.parametrize("name", ["cuda", "", "Triton"])
def test_an_unknown_backend_is_told_the_known_ones(name):
    with says(f"unknown backend {name!r}; choose one of 'triton', 'cpu', 'reference'"), backend(name):
        pass


def test_a_backend_that_failed_inside_the_block_is_not_forced_afterwards():
    x = tensors()
    with pytest.raises(ValueError, match="head"), backend("cpu"):
        attention(x["q"][:, :, :3], x["k"], x["v"])
    x = {name: t.double() for name, t in x.items()}
    # The C++ kernel has no double precision: still forced, it would refuse.
    assert attention(**x).dtype == torch.float64


def test_debug_checks_nest():
    with debug_checks(), debug_checks():
        pass
    assert attention(**tensors()).isfinite().all()


@pytest.mark.parametrize("shape", [{"batch": 0}, {"rows": 0}, {"keys": 0}, {"rows": 0, "keys": 0}])
def test_empty_batches_and_sequences_are_computed_not_refused(shape):
    x = {name: t.requires_grad_() for name, t in tensors(**shape).items()}
    key_bias = torch.zeros(x["k"].shape[:2], requires_grad=True)
    o, lse = attention(**x, key_bias=key_bias, return_lse=True)
    assert o.shape == x["q"].shape
    assert lse.shape == (o.shape[0], o.shape[2], o.shape[1])
    assert (o == 0).all()
    assert (lse == -torch.inf).all() or shape == {"rows": 0}
    o.sum().backward()
    assert all((t.grad == 0).all() for t in (*x.values(), key_bias))


def test_heads_of_one_number_may_have_any_stride():
    q, k, v = (torch.randn(1, 1, 1, 6).transpose(1, 3).requires_grad_() for _ in range(3))
    with backend("reference"):
        expected = torch.autograd.grad(attention(q, k, v).sum(), [q, k, v])
    for actual, gradient in zip(torch.autograd.grad(attention(q, k, v).sum(), [q, k, v]), expected, strict=True):
        torch.testing.assert_close(actual, gradient)


def test_a_packed_batch_without_sequences_is_empty():
    x = packed(rows=0, keys=0)
    assert attention_varlen(**x, cu_seqlens_q=offsets(0)).shape == (0, 4, 8)
    assert attention_varlen(**x, plan=AttentionPlan([])).shape == (0, 4, 8)


def test_a_second_derivative_is_refused():
    q, k, v = (t.requires_grad_() for t in tensors().values())
    (gradient,) = torch.autograd.grad(attention(q + 1, k + 1, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        gradient.sum().backward()
