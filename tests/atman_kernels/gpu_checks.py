"""What only a GPU can show, as plain functions of a device: they run under pytest and under ``benchmarks.checks``.

bfloat16 and float16 over the whole grid of sizes, a thousand equal backwards, CUDA graphs, memory, addresses beyond
2^31 elements, and the accuracy of long cancelling sums. ``REHEARSAL`` holds the same functions on sizes for Triton's
interpreter.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

import torch

from atman_kernels import AttentionPlan, SharedPrefix, attention, attention_varlen, backend
from benchmarks.cases import AttentionCase, make_inputs
from benchmarks.peers import PEERS, UnavailableError, inputs_with_gradients
from tests.atman_kernels.grid import Case, assert_exact, make_operands, poisoned_memory, run
from tests.oracle import assert_as_exact_as_reference

LENGTHS = (1, 17, 63, 64, 65, 111, 257, 1000)
HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (4, 1)}
HEAD_DIMS = (128, 64, 256, 16, 32, 80, 96)
BIASES = ("finite", "absent", "removed")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Check = Callable[[str], None]


def outputs_and_gradients(case: Case, dtype: torch.dtype, device: str) -> None:
    """As exact as PyTorch in the same dtype, with and without prefix and window."""
    prefix = tuple((3 * i, 50 * (i % 3)) for i in range(len(case.lengths)))
    assert_exact(case, "triton", dtype, device)
    assert_exact(case._replace(prefix=prefix, window=100), "triton", dtype, device)


def fused_gradients(case: Case, dtype: torch.dtype, device: str) -> None:
    """The backward that is not deterministic is as exact as PyTorch too, where the device has it."""
    if device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        return
    x = make_operands(case, dtype, device)
    oracle, reference = run("reference", case, x.as_float64()), run("reference", case, x)
    with poisoned_memory():
        actual = run("triton", case, x, deterministic=False)
    for name, value in actual.items():
        assert_as_exact_as_reference(name, value, reference[name], oracle[name])


def repeats_are_bitwise_equal(case: Case, dtype: torch.dtype, repeats: int, device: str) -> None:
    """The same bits every time: no order of additions depends on timing."""
    operands = make_operands(case, dtype, device)
    first = run("triton", case, operands)
    for _ in range(repeats):
        again = run("triton", case, operands)
        assert all(torch.equal(first[name], again[name]) for name in first)


def offsets_beyond_int32(n_rows: int, dtype: torch.dtype, device: str) -> None:
    """The last rows of tensors with n_rows x 8 heads x 128 numbers equal those of a tensor of their own."""
    q, k, v, do = (torch.randn(n_rows, 8, 128, dtype=dtype, device=device) for _ in range(4))
    bias = torch.randn(n_rows, device=device)
    tail = min(300, n_rows // 2)
    results = []
    for plan, part in (
        (AttentionPlan([n_rows - tail, tail], device=device), slice(None)),
        (AttentionPlan([tail], device=device), slice(n_rows - tail, None)),
    ):
        inputs = [t[part].requires_grad_() for t in (q, k, v, bias)]
        with backend("triton"):
            o = attention_varlen(*inputs, plan=plan, window=64)
        results.append([o, *torch.autograd.grad(o, inputs, do[part])])
    for whole, alone in zip(*results, strict=True):
        assert torch.equal(whole[-tail:], alone)


def replayed_graphs_equal_eager_steps(case: Case, dtype: torch.dtype, device: str) -> None:
    """A captured forward and backward, replayed on other numbers; neither it nor an eager step waits for the device."""
    x = make_operands(case, dtype, device)
    plan = AttentionPlan(case.lengths, device=device)
    inputs = [t.requires_grad_() for t in (x.q, x.k, x.v, x.key_bias)]

    def step() -> list[torch.Tensor]:
        with backend("triton"):
            packed = attention_varlen(*inputs, plan=plan)
            # The plan of a dense batch is made anew inside a capture.
            dense = attention(*(t[None] for t in inputs)).squeeze(0)
        return [packed, dense, *torch.autograd.grad([packed, dense], inputs, [x.do, x.do])]

    if device == "cpu":
        step()
        return
    warmup = torch.cuda.Stream()
    warmup.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warmup):
        step()
    torch.cuda.current_stream().wait_stream(warmup)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for t in inputs:
            t.normal_()
    graph.replay()
    # The current stream has a plan of its own once this returns.
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))


def memory_is_linear(length: int, device: str) -> None:
    """A forward and a backward allocate a few times their inputs, whatever the length."""
    case = Case((length,), heads=(8, 2), head_dim=64, lse_gradient=False)
    operands = make_operands(case, torch.float16, device)
    if device == "cpu":
        run("triton", case, operands)
        return
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run("triton", case, operands)
    in_and_out = sum(x.nbytes for x in (operands.q, operands.k, operands.v))
    assert torch.cuda.max_memory_allocated() - before < 4 * in_and_out


def dkey_bias_of_long_sequences(length: int, heads: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
    """At most twice the error of same-dtype PyTorch where long sums cancel, and the sum over the sequence is zero."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(1, length, heads, head_dim, generator=generator).to(device, dtype) for _ in range(4))
    bias = torch.zeros(1, length, device=device, requires_grad=True)
    with backend("triton"):
        (actual,) = torch.autograd.grad(attention(q, k, v, bias), bias, do)
    exact, same_dtype = (torch.zeros(length, dtype=torch.float64, device=device) for _ in range(2))
    for head in range(heads):
        for total, wide in ((exact, torch.float64), (same_dtype, dtype)):
            total += _eager_dkey_bias(*(t[0, :, head].to(wide) for t in (q, k, v, do)))
    error, allowed = ((x.double() - exact).abs().max().item() for x in (actual[0], same_dtype))
    assert error <= 2 * allowed, f"error {error:.2e}, same-dtype PyTorch {allowed:.2e}"
    assert actual.sum().abs() <= 1e-5 * actual.abs().sum(), f"sums to {actual.sum().item():.2e}"


def _eager_dkey_bias(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor) -> torch.Tensor:
    """fp64 column sums (T,) of the scores' gradient as autograd of eager causal attention of one head gives it."""
    length, block = q.shape[0], 1024
    total = torch.zeros(length, dtype=torch.float64, device=q.device)
    for begin in range(0, length, block):
        end = min(begin + block, length)
        hidden = torch.ones(end - begin, end, dtype=torch.bool, device=q.device).triu(begin + 1)
        scores = (q[begin:end] @ k[:end].T * q.shape[1] ** -0.5).masked_fill(hidden, -torch.inf).requires_grad_()
        (gradient,) = torch.autograd.grad(scores.softmax(-1) @ v[:end], scores, do[begin:end])
        total[:end] += gradient.double().sum(0)
    return total


def peers_compute_the_same(lengths: tuple[int, ...], head_dim: int, dtype: torch.dtype, device: str) -> None:
    """What is timed side by side gives the same outputs and gradients, up to the rounding of the bias to 16 bits."""
    case = AttentionCase("peers", lengths, (4, 2), head_dim)
    x = make_inputs(case, dtype, device)
    x = x._replace(key_bias=x.key_bias.detach().to(dtype).float().requires_grad_())
    unbiased = x._replace(key_bias=torch.zeros_like(x.key_bias).requires_grad_())
    wrong = []
    for name, peer in PEERS.items():
        operands = unbiased if name.endswith("unbiased") else x
        wanted = inputs_with_gradients(name, operands)
        try:
            o = peer(case, operands)()
            actual = [o, *torch.autograd.grad(o, wanted, x.do)]
        except (UnavailableError, RuntimeError, NotImplementedError):
            if name in ("atman", "atman_unbiased"):
                raise
            continue
        with backend("reference"):
            o = PEERS["atman"](case, operands)()
        expected = [o, *torch.autograd.grad(o, wanted, x.do)]
        for a, b in zip(actual, expected, strict=True):
            difference = (a.detach().float() - b.detach().float()).abs().max().item()
            if not difference <= 0.05 * max(b.detach().abs().max().item(), 1.0):
                wrong.append(f"{name} is off by {difference:.2g}")
    assert not wrong, "; ".join(wrong)


def small_ragged_step(dtype: torch.dtype, device: str) -> None:
    """Forward and backward over ragged sequences with a prefix, for tools that slow a kernel down a thousandfold."""
    q, k, v, do = (torch.randn(104, heads, 64, device=device, dtype=dtype) for heads in (2, 1, 1, 2))
    bias = torch.randn(104, device=device)
    prefix = SharedPrefix(k[:9].clone(), v[:9].clone())
    plan = AttentionPlan([70, 1, 33], None, [0, 0, 0], [9, 9, 9], device=device)
    inputs = [t.requires_grad_() for t in (q, k, v, bias)]
    with backend("triton"):
        torch.autograd.grad(attention_varlen(*inputs, plan=plan, prefix=prefix), inputs, do)


def profiled_step(dtype: torch.dtype, device: str) -> None:
    """Forward and backward of a case that fills a GPU, once: what a profiler looks at."""
    lengths, heads, head_dim = ((2048,) * 16, (24, 8), 128) if device == "cuda" else ((9, 4), (2, 1), 16)
    case = AttentionCase("profiled", lengths, heads, head_dim)
    x = make_inputs(case, dtype, device)
    with backend("triton"):
        torch.autograd.grad(PEERS["atman"](case, x)(), x.differentiable, x.do)


def passes(device: str) -> None:
    """A check that finds nothing; this and the next three rehearse what checks may do to their process."""


def raises(device: str) -> None:
    """A check that finds something."""
    raise AssertionError(f"wrong on {device}")


def aborts(device: str) -> None:
    """A check whose kernel takes the process with it."""
    os.abort()


def hangs(device: str) -> None:
    """A check whose kernel never ends."""
    time.sleep(3600)


def _checks() -> dict[str, Check]:
    long = Case((500, 130, 257), heads=(8, 2), head_dim=128)
    found: dict[str, Check] = {
        "1000 equal backwards": partial(repeats_are_bitwise_equal, long, torch.bfloat16, 1000),
        "offsets beyond 2^31": partial(offsets_beyond_int32, 2**21 + 2**14, torch.bfloat16),
        "dkey_bias, 8192 rows of 24 heads": partial(dkey_bias_of_long_sequences, 8192, 24, 128, torch.bfloat16),
        "CUDA graph": partial(replayed_graphs_equal_eager_steps, long, torch.bfloat16),
        "memory": partial(memory_is_linear, 16384),
        "peers, equal lengths": partial(peers_compute_the_same, (256, 256), 128, torch.bfloat16),
        "peers, ragged": partial(peers_compute_the_same, (200, 77, 130), 64, torch.bfloat16),
    }
    for head_dim in HEAD_DIMS:
        for bias in BIASES:
            for heads in HEADS:
                for dtype in DTYPES:
                    case = Case(LENGTHS, HEADS[heads], head_dim, bias)
                    name = f"d{head_dim} {heads} {bias} {dtype}"
                    found[name] = partial(outputs_and_gradients, case, DTYPES[dtype])
    for head_dim in (128, 64):
        found[f"fused d{head_dim}"] = partial(fused_gradients, Case(LENGTHS, (6, 2), head_dim), torch.bfloat16)
    return found


CHECKS = _checks()

_TINY = Case((9, 1, 4), heads=(2, 1), head_dim=16)
REHEARSAL: dict[str, Check] = {
    "equal backwards": partial(repeats_are_bitwise_equal, _TINY, torch.float16, 2),
    "offsets": partial(offsets_beyond_int32, 40, torch.float16),
    "dkey_bias": partial(dkey_bias_of_long_sequences, 50, 2, 16, torch.float16),
    "CUDA graph": partial(replayed_graphs_equal_eager_steps, _TINY, torch.float16),
    "memory": partial(memory_is_linear, 16),
    "peers": partial(peers_compute_the_same, (7, 4), 16, torch.float16),
    "grid": partial(outputs_and_gradients, _TINY, torch.float16),
    "fused": partial(fused_gradients, _TINY, torch.float16),
    "small": partial(small_ragged_step, torch.float16),
}
