"""The binding of the C++ kernel: random shapes and strides, and bad arguments, which are errors and never crashes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atman_kernels import _cpu, reference
from atman_kernels.problem import NO_WINDOW, AttentionProblem
from tests.atman_kernels.definition import OneSequence, terms_of_sequences
from tests.oracle import assert_as_exact_as_reference
from tests.random_cases import random_cases

pytestmark = pytest.mark.skipif(not _cpu.isas(), reason="the C++ extension is not built")

# Written around and into every output beforehand: what the kernel does not own must still hold it.
CANARY = 1234.0


def strided(shape: tuple[int, ...], dtype: torch.dtype, gap: int, swap: bool) -> Tensor:
    """A canary-filled tensor with unit last stride: rows and heads swapped in memory, and ``gap`` elements apart."""
    *outer, last = shape
    if swap and len(outer) > 1:
        outer[-1], outer[-2] = outer[-2], outer[-1]
    whole = torch.full((*outer, last + gap), CANARY, dtype=dtype)[..., :last]
    return whole.transpose(-2, -3) if swap and len(outer) > 1 else whole


def random_like(x: Tensor, seed: int) -> Tensor:
    return x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))


def arguments(
    lengths: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (2, 1),
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    gap: int = 0,
    swap: bool = False,
    prefix: int = 0,
    causal: bool = True,
    window: int = NO_WINDOW,
    threads: int = 1,
    isa: str = "",
) -> dict[str, Any]:
    """Forward arguments by name: padded rows, one sequence each, at different offsets."""
    n, rows, keys = len(lengths), max(q for q, _ in lengths) + 3, max(k for _, k in lengths) + 5
    table = [[i, i % 4, q, i % 6, k, 0, prefix] for i, (q, k) in enumerate(lengths)]
    q = random_like(strided((n, rows, heads[0], head_dim), dtype, gap, swap), 1)
    k = random_like(strided((n, keys, heads[1], head_dim), dtype, gap, swap), 2)
    v = random_like(strided((n, keys, heads[1], head_dim), dtype, gap, not swap), 3)
    return {
        "o": strided((n, rows, heads[0], head_dim), dtype, gap, swap),
        "lse": strided((n, heads[0], rows), torch.float32, gap, False),
        "q": q,
        "k": k,
        "v": v,
        "key_bias": random_like(strided((n, keys), torch.float32, gap, False), 4),
        "prefix_k": random_like(strided((prefix, heads[1], head_dim), dtype, gap, False), 5) if prefix else None,
        "prefix_v": random_like(strided((prefix, heads[1], head_dim), dtype, gap, False), 6) if prefix else None,
        "sequences": torch.tensor(table, dtype=torch.int32),
        "sm_scale": head_dim**-0.5,
        "causal": causal,
        "window": window,
        "threads": threads,
        "isa": isa,
    }


def backward_arguments(forward: dict[str, Any], gap: int = 0) -> dict[str, Any]:
    like = {"dq": "q", "dk": "k", "dv": "v"}
    found = {name: strided(tuple(forward[of].shape), forward[of].dtype, gap, True) for name, of in like.items()}
    found["dkey_bias"] = strided(tuple(forward["key_bias"].shape), torch.float32, gap, False)
    do = random_like(torch.empty(forward["q"].shape, dtype=forward["q"].dtype), 7)
    dlse = random_like(torch.empty(forward["lse"].shape), 8)
    return {**found, "do": do, "dlse": dlse, **forward}


def sequences_of(x: dict[str, Any]) -> Iterator[OneSequence]:
    """The sequences of backward arguments, in float64, each with the keys of its prefix."""
    wide = {name: x[name].double() for name in ("q", "k", "v", "key_bias", "do", "dlse")}
    for b, first_q, n_q, first_k, n_k, first_p, n_p in x["sequences"].tolist():
        rows, keys = slice(first_q, first_q + n_q), slice(first_k, first_k + n_k)
        k, v, bias = (wide[name][b, keys] for name in ("k", "v", "key_bias"))
        if n_p:
            prefix_k, prefix_v = (x[name].double()[first_p : first_p + n_p] for name in ("prefix_k", "prefix_v"))
            k, v, bias = torch.cat([prefix_k, k]), torch.cat([prefix_v, v]), torch.cat([bias.new_zeros(n_p), bias])
        yield OneSequence(wide["q"][b, rows], k, v, bias, wide["do"][b, rows], wide["dlse"][b, :, rows], n_p)


@random_cases(30)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 150)), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    head_dim=st.integers(1, 40) | st.sampled_from([64, 100, 256]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    gap=st.integers(0, 3),
    swap=st.booleans(),
    prefix=st.sampled_from([0, 0, 1, 130]),
    bounds=st.sampled_from([(True, NO_WINDOW), (True, 1), (True, 60), (False, NO_WINDOW)]),
    threads=st.sampled_from([1, 2, 5]),
    isa=st.sampled_from(["", *_cpu.isas()]),
)
def test_any_shapes_and_strides_are_computed_and_nothing_else_is_written(
    lengths: list[tuple[int, int]], bounds: tuple[bool, int], **shape: Any
) -> None:
    check_results_and_writes(lengths, bounds, **shape)


def test_gradients_that_cancel_are_as_exact_as_their_terms() -> None:
    """Found by the random cases: with one key behind a prefix, dkey_bias is a hundredth of the terms it sums."""
    check_results_and_writes([(1, 1)], (True, NO_WINDOW), heads=(4, 2), head_dim=1, prefix=130)


def check_results_and_writes(lengths: list[tuple[int, int]], bounds: tuple[bool, int], **shape: Any) -> None:
    x = arguments(lengths, causal=bounds[0], window=bounds[1], **shape)
    _cpu._C.attention_forward(**x)
    g = backward_arguments(x, shape.get("gap", 0))
    _cpu._C.attention_backward(**g)
    table = x["sequences"]
    names = ("q", "k", "v", "key_bias", "prefix_k", "prefix_v")
    same = [x[name] for name in names]
    wide = [None if t is None else t.double() for t in same]
    results = []
    for operands in (same, wide):
        do = g["do"].to(operands[0].dtype)
        # The reference has no use for tile schedules.
        problem = AttentionProblem(*operands, table, table, table, x["sm_scale"], x["causal"], x["window"])
        forward = reference.attention_forward(problem)
        dlse = g["dlse"].to(forward[1].dtype)
        backward = reference.attention_backward(do, dlse, problem)
        results.append([*forward, *backward])
    terms = terms_of_sequences(sequences_of(g), x["causal"], x["window"])
    for i, name in enumerate(("o", "lse", "dq", "dk", "dv", "dkey_bias")):
        of_rows = name in ("o", "lse", "dq")
        for b, first_q, n_q, first_k, n_k, *_ in table.tolist():
            first, n = (first_q, n_q) if of_rows else (first_k, n_k)
            at = (b, slice(None), slice(first, first + n)) if name == "lse" else (b, slice(first, first + n))
            if n:
                assert_as_exact_as_reference(name, g[name][at], results[0][i][at], results[1][i][at], terms[name])
            outside = g[name][b].clone()
            outside[at[1:]] = CANARY
            assert (outside == CANARY).all(), f"{name} was written outside the sequence"
        storage = g[name].as_strided(
            (g[name].untyped_storage().nbytes() // g[name].element_size(),), (1,), storage_offset=0
        )
        assert int((storage == CANARY).sum()) >= storage.numel() - g[name].numel(), f"{name}: the gaps were written"


BAD = {
    "rank": ({"q": torch.zeros(3, 2, 16)}, r"q must have shape \(B, T, H, D\), got \(3, 2, 16\)"),
    "head_dim": ({"q": torch.zeros(1, 8, 2, 257)}, "head_dim 257"),
    "heads": ({"q": torch.zeros(1, 8, 3, 16), "k": torch.zeros(1, 10, 2, 16)}, "3 heads, not a positive multiple"),
    "keys": ({"v": torch.zeros(1, 9, 1, 16)}, r"v must have shape \(1, 10, 1, 16\), got \(1, 9, 1, 16\)"),
    "dtype": ({"k": torch.zeros(1, 10, 1, 16).half()}, "k differs from q in dtype"),
    "float64": ({"q": torch.zeros(1, 8, 2, 16).double()}, "must be float32, float16 or bfloat16"),
    "last stride": ({"q": torch.zeros(1, 8, 2, 32)[..., ::2]}, "unit stride"),
    "bias length": ({"key_bias": torch.zeros(1, 11)}, r"key_bias must have shape \(1, 10\)"),
    "bias dtype": ({"key_bias": torch.zeros(1, 10).half()}, "key_bias must be float32"),
    "half a prefix": ({"prefix_k": torch.zeros(4, 1, 16)}, "given together, or neither"),
    "prefix heads": (
        {"prefix_k": torch.zeros(4, 2, 16), "prefix_v": torch.zeros(4, 2, 16)},
        r"prefix_k must have shape \(4, 1, 16\)",
    ),
    "table dtype": ({"sequences": torch.zeros(1, 7, dtype=torch.int64)}, "sequences must be int32"),
    "table width": ({"sequences": torch.zeros(1, 6, dtype=torch.int32)}, r"must have shape \(1, 7\)"),
    "batch row": ({"sequences": torch.tensor([[1, 0, 1, 0, 1, 0, 0]], dtype=torch.int32)}, "batch row of sequence 0"),
    "query range": ({"sequences": torch.tensor([[0, 5, 4, 0, 1, 0, 0]], dtype=torch.int32)}, "query range of sequ"),
    "negative start": ({"sequences": torch.tensor([[0, -1, 4, 0, 1, 0, 0]], dtype=torch.int32)}, "query range of seq"),
    "key range": ({"sequences": torch.tensor([[0, 0, 1, 9, 2, 0, 0]], dtype=torch.int32)}, "key range of sequence 0"),
    "overflow": ({"sequences": torch.tensor([[0, 0, 1, 2**31 - 1, 2**31 - 1, 0, 0]], dtype=torch.int32)}, "key range"),
    "prefix range": ({"sequences": torch.tensor([[0, 0, 1, 0, 1, 0, 3]], dtype=torch.int32)}, "prefix range of seq"),
    "window": ({"window": 0}, "window must be at least 1"),
    "negative window": ({"window": -1}, "window must be at least 1"),
    "window without causal": ({"window": 3, "causal": False}, "needs causal=True"),
    "threads": ({"threads": 0}, "threads must be at least 1, got 0"),
    "output shape": ({"o": torch.zeros(1, 8, 1, 16)}, r"o must have shape \(1, 8, 2, 16\)"),
    "lse dtype": ({"lse": torch.zeros(1, 2, 8).half()}, "lse must be float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_named(name: str) -> None:
    changed, message = BAD[name]
    x = {**arguments([(5, 5)]), **changed}
    with pytest.raises(ValueError, match=message):
        _cpu._C.attention_forward(**x)
    g = {**backward_arguments(arguments([(5, 5)])), **changed}
    with pytest.raises(ValueError, match=message):
        _cpu._C.attention_backward(**g)


@pytest.mark.parametrize("name", ["o", "lse", "q", "k", "v", "sequences"])
@pytest.mark.parametrize("value", [None, 3, "tensor", object()], ids=["none", "int", "str", "object"])
def test_what_is_no_array_is_a_type_error(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=re.escape(name) if value is not None else None):
        _cpu._C.attention_forward(**{**arguments([(5, 5)]), name: value})


def test_numpy_arrays_work_without_torch() -> None:
    x = arguments([(9, 9)])
    as_numpy = {name: t.numpy() if isinstance(t, Tensor) else t for name, t in arguments([(9, 9)]).items()}
    _cpu._C.attention_forward(**x)
    _cpu._C.attention_forward(**as_numpy)
    np.testing.assert_array_equal(as_numpy["o"], x["o"].numpy())


def test_read_only_gradients_of_parameters_are_accepted() -> None:
    x = arguments([(9, 9)])
    expected = arguments([(9, 9)])
    _cpu._C.attention_forward(**expected)
    x["q"] = torch.nn.Parameter(x["q"])
    _cpu._C.attention_forward(**x)
    assert torch.equal(x["o"], expected["o"])
