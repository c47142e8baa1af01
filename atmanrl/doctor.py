"""``atmanrl doctor``: installed versions, and a comparison of every available kernel with the reference."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import time
import warnings
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from atman_kernels import attention, backend, smoke, trust
from atmanrl.training.directory import installed_versions

_NOT_BUILT = "not built: CPU tensors use the reference (pip install .)"

Backend = Literal["triton", "cpu", "reference"]


def doctor(console: Console | None = None) -> int:
    """Print versions, devices and the self-test of each backend; 1 if one that is available fails, else 0."""
    console = console or Console()
    built = importlib.util.find_spec("atman_kernels._C") is not None
    facts = {"python": f"{platform.python_version()} on {platform.platform()}"}
    facts |= {package: version or "not installed" for package, version in installed_versions().items()}
    if facts["atmanrl"] == "not installed":
        facts["atmanrl"] = "run from a source tree"
    facts |= {"devices": _devices(), "C++ kernels": _extension() if built else _NOT_BUILT}
    width = max(map(len, facts))
    for name, fact in facts.items():
        console.print(f"{name:{width}s}  {fact}", soft_wrap=True)
    failed = False
    table = Table("backend", "device", "self-test", "largest error", "time", box=None, pad_edge=False)
    for name, device, absent in _candidates(built):
        if absent:
            table.add_row(name, device, f"not available: {absent}", "", "")
            continue
        start = time.perf_counter()
        try:
            error = largest_error(name, torch.device(device))
        except Exception as problem:  # a kernel may fail in any way; the report is what this command is for
            failed = True
            table.add_row(name, device, f"FAILED: {type(problem).__name__}: {problem}", "", "")
            continue
        good = error <= TOLERANCE
        failed |= not good
        seconds = f"{time.perf_counter() - start:.2f} s"
        table.add_row(name, device, "ok" if good else "FAILED", f"{error:.1e}", seconds)
    console.print(table)
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
        failed |= _smoke_test(console)
    return int(failed)


def _smoke_test(console: Console, device: str = "cuda") -> bool:
    """Test every path of the GPU's kernels, say which are trusted and keep it; whether one failed."""
    console.print("smoke test of the GPU's kernels, half a minute ...")
    checks = smoke.smoke_checks(device)
    failures = smoke.failing_paths(checks, device)
    for path, fallback in trust.FALLBACKS.items():
        if not any(name.startswith(path) for name in checks):
            console.print(f"{path}: not on this device")
        elif path in failures:
            console.print(f"{path}: FAILED, {fallback} computes instead; {failures[path]}", soft_wrap=True)
        else:
            console.print(f"{path}: trusted")
    try:
        trust.keep(failures, torch.device(device, torch.cuda.current_device()))
    except OSError as error:
        console.print(f"this could not be kept for other processes: {error}", soft_wrap=True)
    return bool(failures)


TOLERANCE = 1e-5
"""Of the self-test in float32, relative to each result's largest magnitude."""


def largest_error(name: Backend, device: torch.device) -> float:
    """Largest error of output and gradients against the float64 reference, relative to each one's largest magnitude.

    One causal batch in float32 with grouped heads and a finite key bias.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (2, 33, 4, 16), "k": (2, 33, 2, 16), "v": (2, 33, 2, 16), "key_bias": (2, 33), "do": (2, 33, 4, 16)}
    draws = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    expected = _output_and_gradients("reference", {key: draw.double() for key, draw in draws.items()})
    actual = _output_and_gradients(name, {key: draw.to(device) for key, draw in draws.items()})
    errors = [
        (got.cpu().double() - want).abs().max() / want.abs().max() for got, want in zip(actual, expected, strict=True)
    ]
    # Python's max would pass over a NaN.
    return torch.stack(errors).max().item()


def _output_and_gradients(name: Backend, values: dict[str, Tensor]) -> tuple[Tensor, ...]:
    inputs = [values[key].detach().clone().requires_grad_() for key in ("q", "k", "v", "key_bias")]
    with backend(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = attention(*inputs)
        return (output.detach(), *torch.autograd.grad(output, inputs, values["do"]))


def _candidates(built: bool) -> list[tuple[Backend, str, str]]:
    """Backend, device to test it on, and why it is not available ("" if it is)."""
    triton = importlib.util.find_spec("triton") is not None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if torch.cuda.is_available():
        without = "" if triton else "triton is not installed"
    else:
        without = "" if triton and interpreted else "no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return [
        ("reference", "cpu", ""),
        ("cpu", "cpu", "" if built else "the extension is not built"),
        ("triton", "cuda" if torch.cuda.is_available() else "cpu", without),
    ]


def _extension() -> str:
    """The instruction sets it chooses from, best first."""
    try:
        return f"built; {', '.join(importlib.import_module('atman_kernels._C').isas())}"
    except ImportError as error:
        return f"cannot be loaded: {error}"


def _devices() -> str:
    cpu = f"CPU, cores: {os.cpu_count()}, threads in use: {torch.get_num_threads()}"
    if not torch.cuda.is_available():
        return f"{cpu}; no GPU"
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return "; ".join([cpu, *(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)])
