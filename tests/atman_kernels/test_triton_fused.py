"""The fused backward, which is not deterministic on a GPU, computes the same gradients as the definition."""

from __future__ import annotations

import pytest
import torch

from atman_kernels import AttentionPlan, backend
from atman_kernels._triton.backward import backward_launches
from atman_kernels.problem import NO_WINDOW, AttentionProblem, Gradients
from tests.atman_kernels.gpu_checks import fused_gradients
from tests.atman_kernels.grid import Case, make_operands, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CASES = [
    Case((65, 17, 1), heads=(4, 2), head_dim=32),
    Case((130, 64), heads=(2, 1), head_dim=80, bias="removed"),
    Case((40, 64), heads=(4, 1), prefix=((0, 33), (3, 70))),
    Case((70,), heads=(1, 1), lengths_k=(20,), prefix=((2, 33),), bias="absent"),
    Case((97,), heads=(2, 1), causal=False),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused_gradients_are_as_exact_as_pytorch(case: Case, dtype: torch.dtype) -> None:
    fused_gradients(case, dtype, DEVICE)


def test_rows_of_the_next_sequence_do_not_leak_through_nan() -> None:
    """Tiles that are added to dq reach past the end of their sequence, where they must hold zeros."""
    case = Case((33, 40), heads=(2, 1))
    x = make_operands(case, torch.float32, DEVICE)
    clean = run("triton", case, x, deterministic=False)
    for tensor in (x.q, x.k, x.v, x.do):
        tensor[33:] = torch.nan
    assert torch.equal(run("triton", case, x, deterministic=False)["dq"][:33], clean["dq"][:33])


def test_keys_past_the_end_add_nothing_to_dq_where_all_biases_are_very_low() -> None:
    """There exp(0 - lse) overflows, and infinity times the zeros that stand for missing keys is NaN."""
    case = Case((64,), heads=(2, 1), lengths_k=(140,), causal=False)
    x = make_operands(case, torch.float32, DEVICE)
    x = x._replace(key_bias=x.key_bias - 150)
    split, fused = (run("triton", case, x, deterministic=deterministic) for deterministic in (True, False))
    torch.testing.assert_close(fused["dq"], split["dq"], rtol=1e-3, atol=1e-3)


def _launched(family: str, needed: tuple[bool, bool, bool, bool], head_dim: int = 16) -> list[str]:
    case = Case((100,), heads=(4, 2), head_dim=head_dim)
    x = make_operands(case, torch.float16)
    q, k, v, bias, do = (t[None] for t in (x.q, x.k, x.v, x.key_bias, x.do))
    plan = AttentionPlan(case.lengths)
    lse = torch.zeros(1, 4, 100)
    gradients = Gradients(*(t if need else None for t, need in zip((q, k, v, bias), needed, strict=True)))
    tables = (plan.sequences, plan.tiles_q, plan.tiles_k)
    problem = AttentionProblem(q, k, v, bias, None, None, *tables, 1.0, True, NO_WINDOW)
    launches = backward_launches(family, gradients, do, None, q, lse, problem, fused=True)
    return [
        each.kernel.__name__ + ("+dq" if getattr(each.arguments.get("needs"), "FUSED_DQ", False) else "")
        for each in launches
    ]


def test_the_fused_kernel_takes_the_place_of_the_products_of_dq() -> None:
    assert _launched("sm_90", (True, True, True, True)) == [
        "backward_queries_kernel",
        "backward_keys_kernel+dq",
        "scale_dq_kernel",
        "sum_heads_kernel",
    ]


@pytest.mark.parametrize("needed", [(True, False, False, False), (False, False, False, True)], ids=["dq", "key_bias"])
def test_a_backward_that_saves_nothing_by_fusing_is_the_deterministic_one(needed: tuple[bool, ...]) -> None:
    assert not any("+dq" in name or "scale" in name for name in _launched("sm_90", needed))


@pytest.mark.parametrize(("family", "head_dim"), [("sm_80", 16), ("sm_90", 9)])
def test_devices_and_shapes_without_descriptor_reductions_are_refused_by_name(family: str, head_dim: int) -> None:
    with pytest.raises(RuntimeError, match=f"got {family} and head_dim {head_dim} in torch.float32"):
        _launched(family, (True, True, True, True), head_dim)


def test_deterministic_algorithms_overrule_it() -> None:
    case = Case((65, 17), heads=(4, 2))
    x = make_operands(case, torch.float16, DEVICE)
    split, fused = (run("triton", case, x, deterministic=deterministic) for deterministic in (True, False))
    assert not torch.equal(fused["dkey_bias"], split["dkey_bias"])
    torch.use_deterministic_algorithms(True)
    try:
        overruled = run("triton", case, x, deterministic=False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(overruled[name], split[name]) for name in split)


def test_only_triton_has_a_backward_that_is_not_deterministic() -> None:
    with pytest.raises(ValueError, match="not 'cpu'"), backend("cpu", deterministic=False):
        pass
