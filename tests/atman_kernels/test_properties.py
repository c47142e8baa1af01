"""Random problems within the public contract, on every backend that runs here: shapes, strides, dtypes, ragged and
empty sequences, prefixes, windows. `make fuzz` runs more."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atman_kernels import SharedPrefix, _cpu
from tests.atman_kernels.definition import by_definition, largest_terms
from tests.atman_kernels.grid import LAYOUTS, Case, Operands, assert_operands_exact, make_operands, restrided, run
from tests.atman_kernels.test_attention_all_backends import BACKENDS, DEVICE, needs_extension
from tests.random_cases import random_cases


@st.composite
def problems(draw: st.DrawFn, *, longest: int, most: int, head_dims: st.SearchStrategy[int]) -> Case:
    """A case of at most ``most`` sequences of at most ``longest`` rows, keys and prefix keys each."""
    length = st.integers(0, longest)
    layout = draw(st.sampled_from(["packed", "packed", "dense"]))
    n_seq = draw(st.integers(1 if layout == "dense" else 0, most))
    if layout == "dense":
        lengths, lengths_k = (draw(length),) * n_seq, (draw(length),) * n_seq
    else:
        lengths = tuple(draw(length) for _ in range(n_seq))
        lengths_k = draw(st.just(lengths) | st.tuples(*[length] * n_seq))
    prefix: tuple[tuple[int, int], ...] = ()
    if layout == "packed" and n_seq and draw(st.booleans()):
        prefix = draw(st.tuples(*[st.tuples(st.integers(0, 20), length)] * n_seq))
    causal = draw(st.booleans())
    return Case(
        lengths,
        heads=draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1), (6, 2)])),
        head_dim=draw(head_dims),
        bias=draw(st.sampled_from(["absent", "finite", "removed"])) if n_seq else "finite",
        causal=causal,
        window=draw(st.none() | st.integers(1, longest + 20)) if causal else None,
        lengths_k=lengths_k,
        prefix=prefix,
        layout=layout,
        lse_gradient=draw(st.booleans()),
    )


def draw_operands(data: st.DataObject, case: Case, dtype: torch.dtype, device: str) -> Operands:
    layouts = st.sampled_from(LAYOUTS)
    x = make_operands(case, dtype, device, seed=data.draw(st.integers(0, 99), label="seed"))
    names = ("q", "k", "v", "do")
    changed = {name: restrided(getattr(x, name), data.draw(layouts, label=name)) for name in names}
    if x.prefix is not None:
        k, v = (restrided(t, data.draw(layouts, label="prefix")) for t in x.prefix[:2])
        changed["prefix"] = SharedPrefix(k, v, x.prefix.start, x.prefix.length)
    if x.key_bias is not None and data.draw(st.booleans(), label="strided bias"):
        view = x.key_bias.new_full((*x.key_bias.shape, 3), math.nan)[..., 1]
        changed["key_bias"] = view.copy_(x.key_bias)
    return x._replace(**changed)


@random_cases(90)
@given(problems(longest=24, most=4, head_dims=st.integers(1, 12)), st.data())
def test_the_reference_computes_the_definition(case: Case, data: st.DataObject) -> None:
    x = draw_operands(data, case, torch.float64, "cpu").as_float64()
    expected = by_definition(case, x)
    for name, value in run("reference", case, x).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def assert_exact_for_its_terms(case: Case, name: Literal["triton", "cpu"], x: Operands) -> None:
    assert_operands_exact(case, name, x, largest_terms(case, x.as_float64("cpu")))


@needs_extension
@random_cases(200)
@given(
    problems(longest=150, most=3, head_dims=st.integers(1, 70) | st.sampled_from([80, 96, 128, 256])),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from(_cpu.isas() or [""]),
    st.data(),
)
def test_the_cpu_kernel_is_as_exact_as_pytorch(case: Case, dtype: torch.dtype, isa: str, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cpu, "_isa", isa)
        assert_exact_for_its_terms(case, "cpu", draw_operands(data, case, dtype, "cpu"))


@pytest.mark.parametrize(
    "case",
    [
        # dq is exactly 0: p is 1, and dp and delta are equal numbers summed in different orders.
        Case((1,), heads=(2, 1), head_dim=3, bias="absent", causal=False, layout="dense", lse_gradient=False),
        # dkey_bias is a hundredth of the terms it sums.
        Case((3,), heads=(1, 1), head_dim=2, causal=False, lengths_k=(2,), layout="dense", lse_gradient=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", BACKENDS)
def test_results_that_cancel_are_as_exact_as_their_terms(name: Literal["triton", "cpu"], case: Case) -> None:
    """Found by the random cases: twice the error of a reference that happens to be exact is no bound."""
    assert_exact_for_its_terms(case, name, make_operands(case, torch.float32, "cpu" if name == "cpu" else DEVICE))


@pytest.mark.parametrize("layout", ["dim_first", "interleaved"])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_prefix_may_be_strided_along_head_dim(name: Literal["triton", "cpu"], layout: str) -> None:
    """Found by the random cases: the C++ kernel refused such a prefix, the Triton kernels read past its numbers."""
    case = Case((17, 3), heads=(4, 2), prefix=((0, 20), (2, 9)))
    x = make_operands(case, torch.float32, "cpu" if name == "cpu" else DEVICE)
    k, v = (restrided(t, layout) for t in x.prefix[:2])
    assert_operands_exact(case, name, x._replace(prefix=x.prefix._replace(k=k, v=v)))


# Triton's interpreter takes a good part of a second per case, and cannot multiply bfloat16.
@random_cases(12)
@given(
    problems(longest=70, most=3, head_dims=st.sampled_from([1, 3, 16, 24])),
    st.sampled_from([torch.float32, torch.float16]),
    st.data(),
)
def test_the_triton_kernels_are_as_exact_as_pytorch(case: Case, dtype: torch.dtype, data: st.DataObject) -> None:
    assert_exact_for_its_terms(case, "triton", draw_operands(data, case, dtype, DEVICE))
