"""Properties of the Triton kernels that a comparison with the reference alone would not show."""

from __future__ import annotations

import pytest
import torch

from atman_kernels import AttentionPlan, attention, attention_varlen, backend
from tests.atman_kernels.grid import Case, Operands, make_operands, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKED = Case((65, 17, 20), heads=(4, 2), head_dim=32, lse_gradient=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_dkey_bias_sums_to_zero_over_each_sequence_without_prefix(dtype: torch.dtype) -> None:
    gradient = run("triton", PACKED, make_operands(PACKED, dtype, DEVICE))["dkey_bias"]
    for part in gradient.split(PACKED.lengths):
        # Far below one rounding of a 16-bit output: delta is corrected in fp32.
        assert part.sum().abs() <= 2e-6 * part.abs().sum()


def test_dkey_bias_does_not_inherit_the_rounding_of_the_output() -> None:
    """Far below the error of 16-bit PyTorch, which the general criterion would allow."""
    case = Case((300,), heads=(2, 1), head_dim=64, lse_gradient=False)
    x = make_operands(case, torch.float16, DEVICE)
    exact = run("reference", case, x.as_float64())["dkey_bias"]
    error, same_dtype = (
        (run(name, case, x)["dkey_bias"].double() - exact).abs().max() for name in ("triton", "reference")
    )
    assert error < same_dtype / 100


def test_dkey_bias_with_prefix_is_completed_by_the_prefix_columns() -> None:
    """The prefix written as own keys with zero bias: own columns agree, the prefix columns hold the missing sum."""
    case = Case((40,), heads=(2, 1), lse_gradient=False, prefix=((0, 30),))
    operands = make_operands(case, torch.float32, DEVICE)
    split = run("triton", case, operands)["dkey_bias"]
    prefix = operands.prefix
    joined = operands._replace(
        k=torch.cat([prefix.k, operands.k]),
        v=torch.cat([prefix.v, operands.v]),
        key_bias=torch.cat([operands.key_bias.new_zeros(30), operands.key_bias]),
        prefix=None,
    )
    whole = run("triton", case._replace(prefix=(), lengths_k=(70,)), joined)["dkey_bias"]
    torch.testing.assert_close(split, whole[30:])
    torch.testing.assert_close(split.sum(), -whole[:30].sum())


def test_repeated_backwards_are_bitwise_equal() -> None:
    operands = make_operands(PACKED, torch.float16, DEVICE)
    first = run("triton", PACKED, operands)
    again = run("triton", PACKED, operands)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_removing_a_key_by_its_bias_equals_deleting_it() -> None:
    case = Case((20,), heads=(2, 1), lengths_k=(70,), causal=False)
    x = make_operands(case, torch.float32, DEVICE)
    kept = torch.arange(70, device=DEVICE) % 3 != 1
    removed = run("triton", case, x._replace(key_bias=x.key_bias.masked_fill(~kept, -torch.inf)))
    deleted = run(
        "triton",
        case._replace(lengths_k=(int(kept.sum()),)),
        x._replace(k=x.k[kept], v=x.v[kept], key_bias=x.key_bias[kept]),
    )
    for name in ("o", "lse", "dq"):
        torch.testing.assert_close(removed[name], deleted[name])
    for name in ("dk", "dv", "dkey_bias"):
        torch.testing.assert_close(removed[name][kept], deleted[name])
        assert not removed[name][~kept].any()


def test_an_offset_added_to_every_bias_changes_only_lse() -> None:
    x = make_operands(PACKED, torch.float32, DEVICE)
    plain = run("triton", PACKED, x)
    shifted = run("triton", PACKED, x._replace(key_bias=x.key_bias + 8))
    torch.testing.assert_close(shifted["lse"], plain["lse"] + 8)
    for name in ("o", "dq", "dk", "dv", "dkey_bias"):
        # Scores near 8 are rounded 2^-21 apart.
        torch.testing.assert_close(shifted[name], plain[name], rtol=1e-5, atol=1e-5)


def test_a_negative_scale_attends_to_the_least_similar_keys() -> None:
    case = Case((40,), heads=(2, 1))
    x = make_operands(case, torch.float32, DEVICE)
    with backend("triton"):
        negative = attention(x.q[None], x.k[None], x.v[None], x.key_bias[None], sm_scale=-0.3)
        mirrored = attention(-x.q[None], x.k[None], x.v[None], x.key_bias[None], sm_scale=0.3)
    torch.testing.assert_close(negative, mirrored)


def test_rows_of_other_sequences_do_not_leak_through_nan() -> None:
    """A sequence full of NaN between two others leaves theirs untouched, although tiles reach past their ends."""
    x = make_operands(PACKED, torch.float32, DEVICE)
    clean = run("triton", PACKED, x)
    first, second = PACKED.lengths[0], PACKED.lengths[0] + PACKED.lengths[1]
    poisoned = Operands(*(t.clone() if isinstance(t, torch.Tensor) else t for t in x))
    for tensor in (poisoned.q, poisoned.k, poisoned.v, poisoned.do):
        tensor[first:second] = torch.nan
    dirty = run("triton", PACKED, poisoned)
    for name in ("o", "dq", "dk", "dv", "dkey_bias"):
        assert torch.equal(dirty[name][:first], clean[name][:first])
        assert torch.equal(dirty[name][second:], clean[name][second:])


@pytest.mark.parametrize("wanted", [("key_bias",), ("q",), ("k", "v"), ("v",), ("q", "key_bias")], ids="+".join)
def test_a_subset_of_the_gradients_equals_the_same_gradients_of_a_full_backward(wanted: tuple[str, ...]) -> None:
    case = Case((65, 40), heads=(2, 1), prefix=((0, 20), (0, 0)))
    x = make_operands(case, torch.float32, DEVICE)
    full = run("triton", case, x)
    inputs = {name: getattr(x, name).requires_grad_(name in wanted) for name in ("q", "k", "v", "key_bias")}
    plan = AttentionPlan(case.lengths, prefix_start=(0, 0), prefix_length=(20, 0), device=DEVICE)
    with backend("triton"):
        o, lse = attention_varlen(**inputs, plan=plan, prefix=x.prefix, return_lse=True)
        grads = torch.autograd.grad([o, lse], [inputs[name] for name in wanted], [x.do, x.dlse])
    for name, gradient in zip(wanted, grads, strict=True):
        torch.testing.assert_close(gradient, full[f"d{name}"], rtol=1e-5, atol=1e-6)
