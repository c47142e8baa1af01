"""Chooses block sizes on the GPU at hand and writes them into the committed table.

    python -m benchmarks.tune --seconds 120

For each head_dim and kernel it times the candidates on a packed batch in bfloat16 and keeps the fastest. Candidates are
compiled ahead of their turn on all cores. Finished searches are kept in results/, so that a later call goes on where
this one stopped.
"""

from __future__ import annotations

import ast
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from triton.errors import TritonError

from atman_kernels._triton.backward import backward_launches
from atman_kernels._triton.blocks import BLOCK_SIZES_FILE, block_size_table
from atman_kernels._triton.forward import forward_launches
from atman_kernels._triton.launch import Launch, device_family
from atman_kernels.problem import AttentionProblem, Gradients
from benchmarks.cases import AttentionCase
from benchmarks.compiled import TARGETS, compile_launch, count
from benchmarks.device import Device, device_of_command, kept_results, save

# What a search is named after, and the kernel whose launch it times.
KERNELS = {
    "forward": "forward_kernel",
    "backward_keys": "backward_keys_kernel",
    "backward_queries": "backward_queries_kernel",
    "backward_fused": "backward_keys_kernel",
}
HEAD_DIMS = (128, 64, 256, 32, 16)

Shape = tuple[int, int, int, int]
Compilations = dict[tuple[str, int, Shape], Future[bool]]


def candidates() -> Iterator[Shape]:
    """(BLOCK_M, BLOCK_N, num_warps, num_stages) worth timing for 16-bit inputs."""
    for block_m, block_n, num_warps, num_stages in itertools.product(
        (32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 1, 4)
    ):
        # More accumulators than registers, or less than a warp's matrix instruction per warp.
        if 32 * num_warps * 64 >= block_m * block_n >= 128 * num_warps:
            yield block_m, block_n, num_warps, num_stages


def launches(search: str, head_dim: int, family: str, shape: Shape, device: Device, torch_device: str) -> list[Launch]:
    """The launches up to the searched one, of a causal, biased batch of 16 x 2048 tokens, 24/8 heads."""
    case = AttentionCase("tune", (2048,) * 16, head_dim=head_dim)
    if device.rehearsal is not None:
        case = AttentionCase("tune", (9, 4), (2, 1), head_dim)
    block_size_table()[family][search]["2"][str(head_dim)] = list(shape)
    n_rows, (heads_q, heads_kv) = sum(case.lengths), case.heads
    q, k, v, do = (
        torch.empty(1, n_rows, heads, head_dim, dtype=device.dtype, device=torch_device).normal_()
        for heads in (heads_q, heads_kv, heads_kv, heads_q)
    )
    bias = torch.empty(1, n_rows, device=torch_device).normal_()
    plan = case.plan(torch_device)
    o, lse = torch.empty_like(q), torch.empty(1, q.shape[2], q.shape[1], device=torch_device)
    tables = (plan.sequences, plan.tiles_q, plan.tiles_k)
    problem = AttentionProblem(q, k, v, bias, None, None, *tables, case.sm_scale, True, None)
    found = forward_launches(family, o, lse, problem)
    if search != "forward":
        gradients = Gradients(*(torch.empty_like(t) for t in (q, k, v, bias)))
        found += backward_launches(family, gradients, do, None, o, lse, problem, fused=search == "backward_fused")
    names = [each.kernel.__name__ for each in found]
    return found[: names.index(KERNELS[search]) + 1]


def precompile(search: str, head_dim: int, family: str, shape: Shape) -> bool:
    """Put the compiled kernel into Triton's cache on disk; False if it is one that only traps.

    Tensors are without storage.
    """
    compiled = compile_launch(launches(search, head_dim, family, shape, Device(), "meta")[-1], family)
    return count(compiled).matrix_instructions > 0


def start_compiling(work: list[tuple[str, int, Shape]], family: str) -> tuple[ProcessPoolExecutor, Compilations] | None:
    """All candidates in the order in which they are timed, where the family is exactly the device at hand."""
    if family not in TARGETS or family != "sm_{}{}".format(*torch.cuda.get_device_capability()):
        return None
    pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))
    return pool, {each: pool.submit(precompile, each[0], each[1], family, each[2]) for each in work}


def compiles(compilation: Future[bool] | None, deadline: float) -> bool:
    """Wait for a compilation: whether there is a kernel to be timed."""
    if compilation is None:
        return True
    try:
        return compilation.result(max(deadline - time.monotonic(), 0.0))
    except TimeoutError:
        return False
    except Exception:
        # Whatever the compiler threw, this shape is not for this device.
        return False


def milliseconds(search: str, head_dim: int, family: str, shape: Shape, device: Device) -> float | str:
    """Time of the searched kernel, or why it does not run with this shape."""
    *before, timed = launches(search, head_dim, family, shape, device, device.name)
    try:
        for each in before:
            each.run()
        timed.run()
        return device.milliseconds(timed.run, 5, 30)
    except (RuntimeError, TritonError) as error:
        # Too much shared or tensor memory, or a compiler that gives up: this shape is not for this device.
        if device.rehearsal is not None:
            raise
        # After an illegal access nothing works in this process: it ends here, the next one goes on behind it.
        device.release()
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def write_table(table: dict[str, Any], path: Path = BLOCK_SIZES_FILE) -> None:
    """The block-size table, one line per family, kernel and element size."""
    lines = []
    for family, kernels in table.items():
        rows = [
            f'    "{kernel}": {{\n'
            + ",\n".join(f'      "{size}": {json.dumps(shapes)}' for size, shapes in sizes.items())
            + "\n    }"
            for kernel, sizes in kernels.items()
        ]
        lines.append(f'  "{family}": {{\n' + ",\n".join(rows) + "\n  }")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> int:
    device, deadline = device_of_command("benchmarks.tune", __doc__)
    path, content = kept_results("tuning", device, timings={})
    family = device_family(torch.device(device.name))
    shapes, head_dims, table_file = list(candidates()), HEAD_DIMS, BLOCK_SIZES_FILE
    if device.rehearsal is not None:
        shapes, head_dims, table_file = shapes[:2], (16,), device.rehearsal / "block_sizes.json"
    committed = json.loads(BLOCK_SIZES_FILE.read_text())
    searches = [(name, head_dim) for head_dim in head_dims for name in KERNELS if name in committed[family]]
    timings: dict[str, dict[str, Any]] = content["timings"]
    missing = [
        (name, head_dim, shape)
        for name, head_dim in searches
        for shape in shapes
        if str(shape) not in timings.setdefault(f"{name} d{head_dim}", {})
    ]
    compiling = start_compiling(missing, family) if device.rehearsal is None else None
    compilations: Compilations = compiling[1] if compiling else {}
    for name, head_dim in searches:
        found = timings[f"{name} d{head_dim}"]
        for shape in [shape for *search, shape in missing if search == [name, head_dim]]:
            ready = compiles(compilations.get((name, head_dim, shape)), deadline)
            if time.monotonic() > deadline:
                print(f"stopped in time; run again to go on with {path}", flush=True)
                return end(compiling)
            found[str(shape)] = "did not return" if ready else "does not compile"
            save(path, content)
            if ready:
                found[str(shape)] = milliseconds(name, head_dim, family, shape, device)
                save(path, content)
        timed = [(ms, shape) for shape, ms in found.items() if isinstance(ms, float)]
        if not timed:
            continue
        best = min(timed)
        print(f"{family} {name} d{head_dim}: {best[1]} takes {best[0]:.3f} ms", flush=True)
        committed[family][name]["2"][str(head_dim)] = list(ast.literal_eval(best[1]))
        write_table(committed, table_file)
    return end(compiling)


def end(compiling: tuple[ProcessPoolExecutor, Compilations] | None) -> int:
    """Stop compiling, and the exit status."""
    if compiling:
        processes = list((compiling[0]._processes or {}).values())
        compiling[0].shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
