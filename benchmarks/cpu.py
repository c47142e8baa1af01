"""Times the C++ kernel beside what PyTorch offers on a CPU.

    python -m benchmarks.cpu [--seconds 600] [--lengths 512 1024]

fp32, 8 heads, one causal sequence; batches of short ones; some lengths in bf16, with and without the bf16 dot
instructions. The arms of a case run in turn, round after round, and the fastest round of each counts, so that other
work on the machine hits them alike. GFLOP/s over visible (row, key) pairs; the matrix rate is fp32 torch.mm at 2048,
from the same rounds. Every row is kept as soon as it is measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from atman_kernels import _cpu
from benchmarks.cases import AttentionCase, Inputs, make_inputs
from benchmarks.device import commit, results_file, save
from benchmarks.peers import PEERS, inputs_with_gradients

LENGTHS = (512, 1024, 2048, 4096, 8192)
BF16_LENGTHS = (1024, 4096)
HEAD_DIMS = (64, 128)
HEADS = 8
# Some four heads of a small model, 60 tokens per sequence.
SHORT_BATCHES = (16, 64)


class Arm(NamedTuple):
    """What is timed: a peer, with the gradient of the bias alone or all, on the best instruction set or another."""

    peer: str
    only_bias: bool = False
    isa: str = ""


ARMS = {
    "atman": Arm("atman"),
    "atman, dkey_bias only": Arm("atman", only_bias=True),
    "SDPA flash, no bias": Arm("sdpa_flash_unbiased"),
    "SDPA, trainable mask": Arm("sdpa_math"),
}
# Without the dot instructions our kernel converts to fp32.
CONVERTED = {"atman, converted to fp32": Arm("atman", isa="avx512")}
_ROUNDS = {60: 100, 512: 30, 1024: 15, 2048: 8, 4096: 4, 8192: 2}
_MATRIX = 2048


def cpu_cases(lengths: tuple[int, ...] = LENGTHS) -> list[tuple[AttentionCase, torch.dtype]]:
    """One sequence of each length, head_dim 64 and 128, in fp32; batches of short ones; some lengths in bf16."""
    found = [(_single(n, d), torch.float32) for d in HEAD_DIMS for n in lengths]
    found += [(AttentionCase(f"{n}x60", (60,) * n, (4, 4), 32), torch.float32) for n in SHORT_BATCHES]
    return found + [(_single(n, d), torch.bfloat16) for d in HEAD_DIMS for n in lengths if n in BF16_LENGTHS]


def _single(length: int, head_dim: int) -> AttentionCase:
    return AttentionCase(f"1x{length}", (length,), (HEADS, HEADS), head_dim)


def measure(case: AttentionCase, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Fastest milliseconds of the forward and of forward + backward of each arm, and the matrix rate in GFLOP/s."""
    named = ARMS | CONVERTED if dtype == torch.bfloat16 and "avx512_bf16" in _cpu.isas() else ARMS
    arms = {}
    for name, arm in named.items():
        inputs = make_inputs(case, dtype, "cpu")
        if arm.only_bias:
            inputs = inputs._replace(**{t: getattr(inputs, t).detach() for t in "qkv"})
        arms[name] = (PEERS[arm.peer](case, inputs), inputs)
    matrix = torch.randn(_MATRIX, _MATRIX)
    best: dict[str, list[float]] = {name: [float("inf")] * 2 for name in arms}
    matrix_seconds = float("inf")
    for _ in range(rounds):
        matrix_seconds = min(matrix_seconds, _seconds(lambda: torch.mm(matrix, matrix)))
        for name, (compute, inputs) in arms.items():
            _cpu._isa = named[name].isa
            found = _forward_and_both(compute, inputs, named[name].peer)
            best[name] = [min(pair) for pair in zip(best[name], found, strict=True)]
    _cpu._isa = ""
    return {
        "case": case.key,
        "dtype": str(dtype).removeprefix("torch."),
        "matrix_gflops": 2 * _MATRIX**3 / matrix_seconds / 1e9,
        "ms": {name: {"forward": 1e3 * f, "forward+backward": 1e3 * b} for name, (f, b) in best.items()},
        "gflop": {direction: case.flops(direction) / 1e9 for direction in ("forward", "forward+backward")},
    }


def _forward_and_both(compute: Callable[[], torch.Tensor], x: Inputs, peer: str) -> tuple[float, float]:
    wanted = inputs_with_gradients(peer, x)
    start = time.perf_counter()
    o = compute()
    middle = time.perf_counter()
    torch.autograd.grad(o, wanted, x.do)
    return middle - start, time.perf_counter() - start


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_memory_ratio(length: int, head_dim: int, threads: int) -> float:
    """Peak memory of one forward + backward, measured in a fresh process, over that of its tensors.

    The tensors are q, k, v, key_bias, do, o, lse, dq, dk, dv and dkey_bias; fp32, 8 heads.
    """
    command = [sys.executable, "-m", "benchmarks.cpu", "--peak", str(length), str(head_dim), str(threads)]
    root = Path(__file__).parent.parent
    return float(subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout)


def _print_peak(length: int, head_dim: int, threads: int) -> None:
    torch.set_num_threads(threads)
    warm_up, case = (AttentionCase("", (n,), (HEADS, HEADS), head_dim) for n in (64, length))
    _forward_and_both(*_atman(warm_up), "atman")
    before = _status_bytes("VmRSS")
    compute, x = _atman(case)
    o = compute()
    grads = torch.autograd.grad(o, x.differentiable, x.do)
    tensors = [*x.differentiable, x.do, o, *grads]
    needed = sum(t.numel() * t.element_size() for t in tensors) + 4 * HEADS * length
    print((_status_bytes("VmHWM") - before) / needed)


def _atman(case: AttentionCase) -> tuple[Callable[[], torch.Tensor], Inputs]:
    inputs = make_inputs(case, torch.float32, "cpu")
    return PEERS["atman"](case, inputs), inputs


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise LookupError(field)


def provenance() -> dict[str, Any]:
    """Processor, commit, threads, instruction set and versions that a result belongs to."""
    return {
        "device": processor(),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "instruction_set": (_cpu.isas() or ["reference"])[0],
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def processor() -> str:
    """The processor's name as the kernel reports it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop before this much time has passed")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--peak", type=int, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        _print_peak(*arguments.peak)
        return 0
    deadline = time.monotonic() + arguments.seconds
    facts = provenance()
    path = results_file("cpu", facts)
    content = json.loads(path.read_text()) if path.exists() else {**facts, "results": [], "peak_memory": {}}
    done = {(row["case"], row["dtype"]) for row in content["results"]}
    for case, dtype in cpu_cases(tuple(arguments.lengths)):
        if (case.key, str(dtype).removeprefix("torch.")) in done:
            continue
        if time.monotonic() > deadline:
            print(f"stopped in time; run again to go on with {path}")
            return 0
        row = measure(case, dtype, _ROUNDS.get(case.lengths[0], 2))
        content["results"].append(row)
        save(path, content)
        shown = ", ".join(f"{name} {ms['forward+backward']:.1f}" for name, ms in row["ms"].items())
        print(f"{case.key} {row['dtype']}: {shown} ms; matrix {row['matrix_gflops']:.0f} GFLOP/s", flush=True)
    longest = max(arguments.lengths)
    for head_dim in HEAD_DIMS:
        content["peak_memory"][f"1x{longest} d{head_dim}"] = peak_memory_ratio(longest, head_dim, facts["threads"])
        save(path, content)
    print(f"complete: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
