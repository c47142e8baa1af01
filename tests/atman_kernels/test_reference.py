"""The reference is the definition: against loops written from the formulas, and the facts that follow from them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from atman_kernels import AttentionPlan, SharedPrefix, attention_varlen, backend
from atman_kernels.problem import NO_WINDOW, AttentionProblem
from atman_kernels.reference import attention, attention_backward, visible_keys


def operands(rows: int, keys: int, *, heads: int = 4, heads_kv: int = 2, dim: int = 8, batch: int = 2) -> list[Tensor]:
    """q, k, v and key_bias in float64."""
    generator = torch.Generator().manual_seed(rows + keys)
    shapes = [(batch, rows, heads, dim), (batch, keys, heads_kv, dim), (batch, keys, heads_kv, dim), (batch, keys)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def by_loops(q, k, v, key_bias, *, causal, window, sm_scale) -> tuple[Tensor, Tensor]:
    """Row by row, key by key, with Python's own numbers for what is visible."""
    batch, rows, heads, _ = q.shape
    keys, group = k.shape[1], heads // k.shape[2]
    out = torch.zeros_like(q)
    lse = q.new_full((batch, heads, rows), -math.inf)
    for b in range(batch):
        for h in range(heads):
            for w in range(rows):
                position = keys - rows + w
                seen = [
                    j
                    for j in range(keys)
                    if not causal or (j <= position and (window is None or j > position - window))
                ]
                seen = [j for j in seen if key_bias[b, j] > -math.inf]
                if not seen:
                    continue
                scores = torch.stack(
                    [sm_scale * torch.dot(q[b, w, h], k[b, j, h // group]) + key_bias[b, j] for j in seen]
                )
                weights = scores.exp() / scores.exp().sum()
                out[b, w, h] = sum(p * v[b, j, h // group] for p, j in zip(weights, seen, strict=True))
                lse[b, h, w] = scores.exp().sum().log()
    return out, lse


BOUNDS = [
    {"causal": True, "window": None},
    {"causal": True, "window": 1},
    {"causal": True, "window": 3},
    {"causal": False, "window": None},
]


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize(("rows", "keys"), [(6, 6), (2, 6), (6, 2), (1, 1)])
@pytest.mark.parametrize("removed", [False, True])
def test_outputs_and_gradients_are_those_of_the_formulas_written_as_loops(rows, keys, bounds, removed):
    x = operands(rows, keys)
    if removed:
        with torch.no_grad():
            x[3][0, ::2], x[3][1] = -torch.inf, -torch.inf
    results = []
    for function, extra in ((attention, {"return_lse": True}), (by_loops, {})):
        o, lse = function(*x, **bounds, sm_scale=0.3, **extra)
        weight = torch.arange(1.0, o.numel() + 1, dtype=torch.float64).view_as(o).sin()
        loss = (o * weight).sum() + lse[lse.isfinite()].cos().sum()
        grads = torch.autograd.grad(loss, x, allow_unused=True) if loss.requires_grad else [None] * 4
        results.append([o, lse, *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, x, strict=True))])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bounds", BOUNDS)
def test_the_explicit_backward_equals_autograd(bounds):
    q, k, v, key_bias = operands(5, 7, batch=1)
    o, lse = attention(q, k, v, key_bias, **bounds, return_lse=True)
    do, dlse = torch.randn_like(o), torch.randn_like(lse)
    expected = torch.autograd.grad([o, lse], [q, k, v, key_bias], [do, dlse])
    plan = AttentionPlan([5], [7])
    tables = (plan.sequences, plan.tiles_q, plan.tiles_k)
    window = NO_WINDOW if bounds["window"] is None else bounds["window"]
    problem = AttentionProblem(q, k, v, key_bias, None, None, *tables, 1 / math.sqrt(8), bounds["causal"], window)
    with torch.no_grad():
        actual = attention_backward(do, dlse, problem)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def gradients(*x: Tensor, **bounds: object) -> tuple[Tensor, ...]:
    o = attention(*x, **bounds)
    return torch.autograd.grad((o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)).sum(), x)


@pytest.mark.parametrize("bounds", BOUNDS)
def test_the_gradient_of_key_bias_sums_to_zero(bounds):
    *_, dkey_bias = gradients(*operands(9, 9), **bounds)
    # A row with a single key gives it weight 1, whatever its bias.
    assert (dkey_bias.abs().max() > 1e-2) == (bounds["window"] != 1)
    assert dkey_bias.sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("bounds", BOUNDS)
def test_a_constant_added_to_every_key_bias_changes_only_lse(bounds):
    q, k, v, key_bias = operands(9, 9)
    o, lse = attention(q, k, v, key_bias, **bounds, return_lse=True)
    o_shifted, lse_shifted = attention(q, k, v, key_bias + 3.0, **bounds, return_lse=True)
    torch.testing.assert_close(o_shifted, o, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse_shifted, lse + 3.0, rtol=1e-12, atol=1e-12)


def test_minus_infinity_on_a_key_equals_deleting_that_key():
    q, k, v, key_bias = operands(9, 9)
    kept = [0, 1, 2, 4, 5, 7, 8]
    removed = key_bias.detach().clone()
    removed[:, [3, 6]] = -torch.inf
    # Without causality a key's position has no other meaning.
    expected = attention(q, k[:, kept], v[:, kept], key_bias[:, kept], causal=False)
    torch.testing.assert_close(attention(q, k, v, removed, causal=False), expected, rtol=1e-12, atol=1e-12)
    _, dk, dv, dkey_bias = gradients(q, k, v, removed.requires_grad_())
    for gradient in (dk, dv, dkey_bias):
        assert (gradient[:, [3, 6]] == 0).all()


def test_a_row_without_keys_gives_zero_minus_infinity_and_zero_gradients():
    q, k, v, key_bias = operands(6, 6)
    with torch.no_grad():
        key_bias[:, :2] = -torch.inf
    o, lse = attention(q, k, v, key_bias, return_lse=True)
    assert (o[:, :2] == 0).all()
    assert (lse[:, :, :2] == -torch.inf).all()
    grads = torch.autograd.grad(o.sum(), [q, k, v, key_bias])
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][:, :2] == 0).all()


def test_key_bias_is_the_same_for_all_heads_and_is_added_after_the_scale():
    q, k, v, key_bias = (x.detach() for x in operands(5, 5))
    _, lse = attention(torch.zeros_like(q), k, v, key_bias, sm_scale=100.0, return_lse=True)
    expected = torch.logcumsumexp(key_bias, dim=1)[:, None].expand_as(lse)
    torch.testing.assert_close(lse, expected, rtol=1e-12, atol=1e-12)


def test_visible_keys_counts_the_window_through_the_prefix():
    seen = visible_keys(3, 3, 4, causal=True, window=5)
    # Row 0 stands at position 4 behind four prefix keys: it sees all of them and itself.
    assert seen.int().tolist() == [
        [1, 1, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 1, 1],
    ]


def test_visible_keys_aligns_the_causal_edge_bottom_right():
    assert visible_keys(2, 4, causal=True, window=None).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert visible_keys(4, 2, causal=True, window=None).int().tolist() == [[0, 0], [0, 0], [1, 0], [1, 1]]
    assert visible_keys(2, 2, 1, causal=False, window=None).all()


def with_prefix(window: int | None) -> tuple[Tensor, list[Tensor], Tensor]:
    """Two packed sequences behind nested ranges of one prefix, the same as two whole sequences, and dkey_bias."""
    lengths, prefix_lengths = [5, 4], [6, 3]
    q, k, v, key_bias = (x[0].detach() for x in operands(sum(lengths), sum(lengths), batch=1))
    prefix_k, prefix_v = (x[0].detach() for x in operands(6, 6, batch=1)[1:3])
    bias = key_bias.clone().requires_grad_()
    with backend("reference"):
        packed = attention_varlen(
            q,
            k,
            v,
            bias,
            plan=AttentionPlan(lengths, prefix_start=[0, 0], prefix_length=prefix_lengths),
            prefix=SharedPrefix(prefix_k, prefix_v),
            window=window,
        )
    weight = torch.linspace(-1, 1, packed.numel(), dtype=packed.dtype).view_as(packed)
    (dkey_bias,) = torch.autograd.grad((packed * weight).sum(), bias)
    whole = []
    for rows, n in zip(torch.arange(9).split(lengths), prefix_lengths, strict=True):
        whole_k, whole_v = (torch.cat([p[:n], x[rows]])[None] for p, x in ((prefix_k, k), (prefix_v, v)))
        whole_bias = torch.cat([torch.zeros(n, dtype=torch.float64), key_bias[rows]])[None]
        whole.append(attention(q[rows][None], whole_k, whole_v, whole_bias, window=window)[0])
    return packed.detach(), whole, dkey_bias


@pytest.mark.parametrize("window", [None, 2, 7])
def test_a_prefix_is_unbiased_keys_directly_before_the_own_ones(window):
    packed, whole, _ = with_prefix(window)
    torch.testing.assert_close(packed, torch.cat(whole), rtol=1e-12, atol=1e-12)


def test_with_a_prefix_the_own_keys_share_of_the_gradient_does_not_sum_to_zero():
    _, _, dkey_bias = with_prefix(None)
    assert dkey_bias.sum().abs() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_inputs_give_outputs_in_their_dtype_and_lse_in_float32(dtype):
    q, k, v, _ = (x.detach().to(dtype) for x in operands(5, 5))
    o, lse = attention(q, k, v, torch.zeros(2, 5), return_lse=True)
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    exact = attention(q.double(), k.double(), v.double())
    # Each weight and each product is rounded once to the dtype; both are at most of order 1.
    torch.testing.assert_close(o.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_grouped_heads_read_the_keys_of_their_group():
    q, k, v, key_bias = (x.detach() for x in operands(6, 6, heads=6, heads_kv=2))
    repeated = [x.repeat_interleave(3, dim=2) for x in (k, v)]
    torch.testing.assert_close(attention(q, k, v, key_bias), attention(q, *repeated, key_bias), rtol=1e-12, atol=1e-12)
