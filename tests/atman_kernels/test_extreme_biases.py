"""A finite bias of any size gives the softmax's result: outputs, gradients and statistics, up to float32's extremes.

A score is sm_scale q k^T + key_bias rounded to float32 once. The biases here leave no doubt about that rounding: either
they are so large that float64 loses the product beside them as well, or the sum is a float32 number.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atman_kernels import _cpu, attention
from tests.atman_kernels.definition import by_definition, largest_terms
from tests.atman_kernels.grid import Case, Operands, assert_operands_exact, make_operands, poisoned_memory, run
from tests.atman_kernels.test_properties import problems
from tests.atman_kernels.test_statistics import Settings, statistics_of
from tests.oracle import assert_as_exact_as_reference
from tests.random_cases import random_cases

ISAS = _cpu.isas() or [pytest.param("", marks=pytest.mark.skip(reason="the C++ extension is not built"))]
isas = pytest.mark.parametrize("isa", ISAS)
LARGEST = torch.finfo(torch.float32).max
# Neighbours in float32; what log2(e) times overflows, and what it does not.
HUGE = (LARGEST, 3.4028232e38, 3e38, 2.4e38, 2.3e38, 1.5e38, 1e30, 1e20)
TINY = (1.4e-45, 1e-40, torch.finfo(torch.float32).tiny, 1e-7)
BIASES = st.sampled_from([*HUGE, *(-x for x in HUGE), *TINY, *(-x for x in TINY), 0.0, -0.0, 1.5, -4.0, -math.inf])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def use(isa: str, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_cpu, "_isa", isa)


def with_biases(case: Case, dtype: torch.dtype, data: st.DataObject, biases: st.SearchStrategy[float]) -> Operands:
    """Operands of the case whose keys have drawn biases, often all of a stretch the same."""
    x = make_operands(case, dtype, seed=data.draw(st.integers(0, 99), label="seed"))
    flat: list[float] = []
    while len(flat) < x.k[..., 0, 0].numel():
        flat += [data.draw(biases)] * data.draw(st.integers(1, 40))
    bias = torch.tensor(flat[: x.k[..., 0, 0].numel()], dtype=torch.float32).view(x.k.shape[:-2])
    return x._replace(key_bias=bias)


cases = problems(longest=150, most=3, head_dims=st.integers(1, 40)).map(lambda case: case._replace(bias="finite"))
small_cases = problems(longest=24, most=3, head_dims=st.integers(1, 12)).map(lambda case: case._replace(bias="finite"))


@random_cases(60)
@given(small_cases, st.sampled_from([torch.float32, torch.float64]), st.data())
def test_the_reference_computes_the_definition_for_biases_of_any_size(
    case: Case, dtype: torch.dtype, data: st.DataObject
) -> None:
    x = with_biases(case, torch.float32, data, BIASES)
    expected, terms = by_definition(case, x.as_float64()), largest_terms(case, x.as_float64())
    # Sums of at most 24 terms, each of a few roundings.
    for name, found in run("reference", case, x if dtype == torch.float32 else x.as_float64()).items():
        finite = expected[name].isfinite()
        assert torch.equal(found.isfinite(), finite), name
        error = (found.double() - expected[name])[finite].abs().max().item() if finite.any() else 0.0
        assert error <= 64 * torch.finfo(dtype).eps * terms[name], name


@isas
@random_cases(30)
@given(cases, DTYPES, st.data())
def test_the_cpu_kernel_is_as_exact_as_pytorch_for_biases_of_any_size(
    isa: str, case: Case, dtype: torch.dtype, data: st.DataObject
) -> None:
    x = with_biases(case, dtype, data, BIASES)
    with pytest.MonkeyPatch.context() as patch:
        use(isa, patch)
        assert_operands_exact(case, "cpu", x, largest_terms(case, x.as_float64()))


def shifted(case: Case, dtype: torch.dtype, data: st.DataObject) -> Operands:
    """Scores in quarters, exact in float32 beside a bias of up to a million that whole stretches of keys share."""
    shift = st.sampled_from([0, 50, 64, 65, 100, 5000, 10**6])
    sign, small = st.sampled_from([1.0, -1.0]), st.integers(-2, 2)
    biases = st.builds(lambda shift, sign, small: sign * shift + small, shift, sign, small)
    x = with_biases(case, dtype, data, biases)
    ternary = {name: getattr(x, name).clamp(-1, 1).round() for name in ("q", "k")}
    if x.prefix is not None:
        ternary["prefix"] = x.prefix._replace(k=x.prefix.k.clamp(-1, 1).round())
    return x._replace(**ternary)


quartered = problems(longest=150, most=3, head_dims=st.just(16)).map(lambda case: case._replace(bias="finite"))


@isas
@random_cases(30)
@given(quartered, DTYPES, st.data())
def test_gradients_keep_their_digits_beside_a_large_bias(
    isa: str, case: Case, dtype: torch.dtype, data: st.DataObject
) -> None:
    """p = exp(score - lse) does not: the rounding of lse is a factor of the row's p."""
    x = shifted(case, dtype, data)
    with pytest.MonkeyPatch.context() as patch:
        use(isa, patch)
        assert_operands_exact(case, "cpu", x, largest_terms(case, x.as_float64()))


@isas
@random_cases(30)
@given(quartered.filter(lambda case: case.layout == "packed" and case.causal), DTYPES, st.booleans(), st.data())
def test_statistics_keep_their_digits_beside_a_bias_of_any_size(
    isa: str, case: Case, dtype: torch.dtype, extreme: bool, data: st.DataObject
) -> None:
    x = with_biases(case, dtype, data, BIASES) if extreme else shifted(case, dtype, data)
    given = Settings(case, horizon=(2, 30), rows=0.6)
    oracle = statistics_of("reference", given, x.as_float64())
    reference = statistics_of("reference", given, x)
    with pytest.MonkeyPatch.context() as patch, poisoned_memory():
        use(isa, patch)
        actual = statistics_of("cpu", given, x)
    # p has the rounding of its score and of the sum that it is divided by.
    largest = {"distance": 150.0 + max((n for _, n in case.prefix), default=0), "windowed_distance": given.window}
    for name in ("distance", "windowed_distance", "received"):
        terms = 64 * largest.get(name, 1.0)
        assert_as_exact_as_reference(name, actual[name], reference[name], oracle[name], terms)


@isas
def test_a_row_does_not_change_with_the_biases_of_keys_that_it_does_not_see(isa, monkeypatch):
    """Whether a row is normalised again is decided by its own lse."""
    use(isa, monkeypatch)
    case = Case((40, 40), heads=(2, 1))
    x = make_operands(case, torch.float32)
    bias = x.key_bias.clone()
    bias[40:] = -3e38
    plain, beside = run("cpu", case, x), run("cpu", case, x._replace(key_bias=bias))
    for name in ("o", "dq", "dk", "dv"):
        assert torch.equal(plain[name][:40], beside[name][:40]), name


def right(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / math.sqrt(q.shape[-1])
    scores = scores + bias.double()[:, None, None]
    hidden = torch.ones(q.shape[1], k.shape[1]).triu(1).bool()
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(hidden, -math.inf).softmax(-1), v.double())


@pytest.mark.parametrize("value", [-LARGEST, -3e38, 3e38, LARGEST])
@pytest.mark.parametrize("keys", [[0], [0, 1, 2], [3], list(range(6))])
def test_the_first_rows_attend_to_what_they_have(value, keys):
    """The value that masks are usually filled with, on all that a row sees: equal weights, not none."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 6, 2, 32, generator=generator) for _ in range(3))
    bias = torch.zeros(1, 6).index_fill(1, torch.tensor(keys), value)
    torch.testing.assert_close(attention(q, k, v, bias).double(), right(q, k, v, bias), rtol=1e-5, atol=1e-6)
