"""Random problems within the public contract, on every backend that runs here: shapes, strides, dtypes, ragged and
empty sequences, prefixes, windows. `make fuzz` runs 34 times as many."""

from __future__ import annotations

import math
import os
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from atman_kernels import SharedPrefix, _cpu
from tests.atman_kernels.grid import (
    LAYOUTS,
    NAMES,
    Case,
    Operands,
    assert_operands_exact,
    make_operands,
    restrided,
    run,
)
from tests.atman_kernels.test_attention_all_backends import BACKENDS, DEVICE, needs_extension

TIMES = int(os.environ.get("ATMAN_FUZZ", "1"))


def cases(n: int) -> settings:
    """n cases, the same every time; `make fuzz` draws more, others every time, and prints how to repeat a failure."""
    return settings(
        max_examples=n * TIMES,
        derandomize=TIMES == 1,
        print_blob=True,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


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


def by_definition(case: Case, x: Operands) -> dict[str, Tensor]:
    """Outputs and gradients in float64, sequence by sequence, with the whole score matrix in memory."""
    q, k, v = (t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v))
    bias = None if x.key_bias is None else x.key_bias.detach().clone().requires_grad_()
    outputs, logs = [], []
    row, column = 0, 0
    for i, rows in enumerate(case.lengths):
        keys = rows if case.lengths_k is None else case.lengths_k[i]
        own = slice(column, column + keys)
        if case.layout == "packed":
            parts = [q[row : row + rows], k[own], v[own]]
            biases = None if bias is None else bias[own]
        else:
            parts = [q[i], k[i], v[i]]
            biases = None if bias is None else bias[i]
        biases = parts[1].new_zeros(keys) if biases is None else biases
        if x.prefix is not None:
            start, length = x.prefix.start[i], x.prefix.length[i]
            parts[1] = torch.cat([x.prefix.k[start : start + length], parts[1]])
            parts[2] = torch.cat([x.prefix.v[start : start + length], parts[2]])
            biases = torch.cat([biases.new_zeros(length), biases])
        o, lse = one_sequence(*parts, biases, case.causal, case.window)
        outputs.append(o)
        logs.append(lse)
        row, column = row + rows, column + keys
    packed = case.layout == "packed"
    if outputs:
        o = torch.cat(outputs) if packed else torch.stack(outputs)
        lse = torch.cat(logs, dim=-1) if packed else torch.stack(logs)
    else:
        o, lse = q * 0, q.new_zeros(q.shape[1], 0)
    loss = (o * x.do).sum()
    if x.dlse is not None:
        loss = loss + (lse.where(lse.isfinite(), 0) * x.dlse).sum()
    wanted = [q, k, v] + ([] if bias is None else [bias])
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)]
    return dict(zip(NAMES, [o.detach(), lse.detach(), *grads], strict=False))


def one_sequence(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, causal: bool, window: int | None
) -> tuple[Tensor, Tensor]:
    """o (Tq, Hq, D) and lse (Hq, Tq) of one sequence whose keys include its prefix."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    position = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    column = torch.arange(k.shape[0])
    seen = (bias > -math.inf).expand(q.shape[0], -1)
    if causal:
        seen = seen & (column <= position)
        seen = seen if window is None else seen & (column > position - window)
    finite = bias.where(bias > -math.inf, 0)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1]) + finite
    lse = scores.masked_fill(~seen, -math.inf).logsumexp(-1)
    # Rows without a key: anything finite in place of -inf, so that no NaN enters the gradient.
    weights = (scores - lse.where(lse.isfinite(), 0)[..., None]).exp() * seen
    some = seen.any(-1)
    return torch.einsum("hqk,khd->qhd", weights, v), lse.where(some, -math.inf)


@cases(90)
@given(problems(longest=24, most=4, head_dims=st.integers(1, 12)), st.data())
def test_the_reference_computes_the_definition(case: Case, data: st.DataObject) -> None:
    x = draw_operands(data, case, torch.float64, "cpu").as_float64()
    expected = by_definition(case, x)
    for name, value in run("reference", case, x).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@needs_extension
@cases(200)
@given(
    problems(longest=150, most=3, head_dims=st.integers(1, 70) | st.sampled_from([80, 96, 128, 256])),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from(_cpu.isas() or [""]),
    st.data(),
)
def test_the_cpu_kernel_is_as_exact_as_pytorch(case: Case, dtype: torch.dtype, isa: str, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cpu, "_isa", isa)
        assert_operands_exact(case, "cpu", draw_operands(data, case, dtype, "cpu"))


@pytest.mark.parametrize("layout", ["dim_first", "interleaved"])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_prefix_may_be_strided_along_head_dim(name: Literal["triton", "cpu"], layout: str) -> None:
    """Found by the cases above: the C++ kernel refused such a prefix, the Triton kernels read past its numbers."""
    case = Case((17, 3), heads=(4, 2), prefix=((0, 20), (2, 9)))
    x = make_operands(case, torch.float32, "cpu" if name == "cpu" else DEVICE)
    k, v = (restrided(t, layout) for t in x.prefix[:2])
    assert_operands_exact(case, name, x._replace(prefix=x.prefix._replace(k=k, v=v)))


# Triton's interpreter takes a good part of a second per case, and cannot multiply bfloat16.
@cases(12)
@given(
    problems(longest=70, most=3, head_dims=st.sampled_from([1, 3, 16, 24])),
    st.sampled_from([torch.float32, torch.float16]),
    st.data(),
)
def test_the_triton_kernels_are_as_exact_as_pytorch(case: Case, dtype: torch.dtype, data: st.DataObject) -> None:
    assert_operands_exact(case, "triton", draw_operands(data, case, dtype, DEVICE))
