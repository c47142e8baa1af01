"""Chooses block sizes on the GPU at hand and writes them into the committed table.

    python -m benchmarks.tune --seconds 120

For each head_dim and kernel it times the candidates on a packed batch in bfloat16 and keeps the fastest. Candidates are
compiled ahead of their turn on all cores. Finished searches are kept in results/, so that a later call goes on where
this one stopped.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from triton.errors import TritonError

from atman_kernels._triton.backward import backward_launches
from atman_kernels._triton.forward import forward_launches
from atman_kernels._triton.launch import Launch, device_family
from atman_kernels._triton.tiles import BLOCK_SIZES_FILE, block_size_table
from benchmarks.cases import AttentionCase
from benchmarks.compiled import TARGETS, compile_launch
from benchmarks.device import Device, add_device_options, results_file, save

# What a search is named after, and the kernel whose launch it times.
KERNELS = {
    "forward": "forward_kernel",
    "backward_keys": "backward_keys_kernel",
    "backward_queries": "backward_queries_kernel",
    "backward_fused": "backward_keys_kernel",
}
HEAD_DIMS = (128, 64, 256, 32, 16)

Shape = tuple[int, int, int, int]


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
    bounds = (case.sm_scale, True, None)
    found = forward_launches(family, o, lse, q, k, v, bias, None, None, *tables, *bounds)
    if search != "forward":
        gradients = [torch.empty_like(t) for t in (q, k, v, bias)]
        found += backward_launches(
            family, *gradients, do, None, o, lse, q, k, v, bias, None, None, *tables, *bounds,
            fused=search == "backward_fused",
        )  # fmt: skip
    names = [each.kernel.__name__ for each in found]
    return found[: names.index(KERNELS[search]) + 1]


def can_precompile(family: str, device: Device) -> bool:
    """Whether the family is exactly the device at hand, so that what is compiled for it ahead of time fits."""
    if device.rehearsal is not None or family not in TARGETS:
        return False
    return family == "sm_{}{}".format(*torch.cuda.get_device_capability())


def precompile(search: str, head_dim: int, family: str, shape: Shape) -> None:
    """Put the compiled kernel into Triton's cache on disk; tensors are without storage."""
    compile_launch(launches(search, head_dim, family, shape, Device(), "meta")[-1], family)


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_device_options(parser)
    arguments = parser.parse_args()
    device = Device(arguments.rehearse)
    if device.rehearsal is None and not torch.cuda.is_available():
        print("benchmarks.tune needs a CUDA GPU", file=sys.stderr)
        return 1
    deadline = time.monotonic() + arguments.seconds
    facts = device.provenance()
    path = results_file("tuning", facts, device.results)
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {**facts, "timings": {}}
    family = device_family(torch.device(device.name))
    shapes, head_dims, table_file = list(candidates()), HEAD_DIMS, BLOCK_SIZES_FILE
    if device.rehearsal is not None:
        shapes, head_dims, table_file = shapes[:2], (16,), device.rehearsal / "block_sizes.json"
    committed = json.loads(BLOCK_SIZES_FILE.read_text())
    for head_dim in head_dims:
        for search in KERNELS:
            if search not in committed[family]:
                continue
            timings = content["timings"].setdefault(f"{search} d{head_dim}", {})
            missing = [shape for shape in shapes if str(shape) not in timings]
            workers = None
            if can_precompile(family, device):
                workers = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))
                ready = [workers.submit(precompile, search, head_dim, family, shape) for shape in missing]
            for index, shape in enumerate(missing):
                while workers and not ready[index].done() and time.monotonic() < deadline:
                    time.sleep(0.05)
                if time.monotonic() > deadline:
                    if workers:
                        workers.shutdown(wait=False, cancel_futures=True)
                    print(f"stopped in time; run again to go on with {path}")
                    return 0
                timings[str(shape)] = "did not return"
                save(path, content)
                timings[str(shape)] = milliseconds(search, head_dim, family, shape, device)
                save(path, content)
            if workers:
                workers.shutdown()
            best = min((ms, shape) for shape, ms in timings.items() if isinstance(ms, float))
            print(f"{family} {search} d{head_dim}: {best[1]} takes {best[0]:.3f} ms", flush=True)
            committed[family][search]["2"][str(head_dim)] = list(ast.literal_eval(best[1]))
            write_table(committed, table_file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
