"""Chooses block sizes on the GPU at hand and writes them into a table beside the results.

    python -m benchmarks.tune --seconds 120

For each head_dim and kernel it times candidates in bfloat16 on two workloads, a packed batch and that of a mask
optimisation, and keeps the shape with the least product of both times. It begins with the committed shape and goes
outward from there, for all kernels alike; the table is written after every step. Candidates are compiled ahead of their
turn. Finished steps are kept, so that a later call goes on where this one stopped.
"""

from __future__ import annotations

import ast
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from triton.errors import TritonError

from atman_kernels._triton.launch import BLOCK_SIZES_FILE, device_family
from benchmarks.ahead import Ahead, Program, Shape, launches
from benchmarks.cases import AttentionCase, mask_case
from benchmarks.device import Device, device_of_command, kept_results, save


class Kernel(NamedTuple):
    """What a search is for: the direction that has the kernel, and the kernel's name."""

    direction: Literal["forward", "backward", "fused"]
    name: str


KERNELS = {
    "forward": Kernel("forward", "forward_kernel"),
    "backward_keys": Kernel("backward", "backward_keys_kernel"),
    "backward_queries": Kernel("backward", "backward_queries_kernel"),
    "backward_fused": Kernel("fused", "backward_keys_kernel"),
}
HEAD_DIMS = (128, 64, 256, 32, 16)


class Step(NamedTuple):
    """One candidate of one search."""

    search: str
    head_dim: int
    shape: Shape


def candidates() -> Iterator[Shape]:
    """(BLOCK_M, BLOCK_N, num_warps, num_stages) worth timing for 16-bit inputs."""
    for block_m, block_n, num_warps, num_stages in itertools.product(
        (32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 1, 4)
    ):
        # More accumulators than registers, or less than a warp's matrix instruction per warp.
        if 32 * num_warps * 64 >= block_m * block_n >= 128 * num_warps:
            yield block_m, block_n, num_warps, num_stages


def distance(shape: Sequence[int], other: Sequence[int]) -> float:
    """Doublings of tile and warps between two shapes, and stages."""
    return sum(abs(math.log2(a / b)) for a, b in zip(shape[:3], other[:3], strict=True)) + abs(shape[3] - other[3])


def steps_outward(
    table: dict[str, Any], head_dims: Sequence[int], shapes: Sequence[Shape], limit: int | None = None
) -> list[Step]:
    """Every search's committed shape first, then by distance from it; one head_dim after another."""
    found = []
    for head_dim in head_dims:
        ranked = []
        for search in KERNELS:
            if search not in table:
                continue
            committed: Shape = tuple(table[search]["2"][str(head_dim)])
            near = sorted({committed, *shapes}, key=lambda shape, start=committed: (distance(shape, start), shape))
            ranked += [(distance(shape, committed), Step(search, head_dim, shape)) for shape in near[:limit]]
        found += [step for _, step in sorted(ranked, key=lambda each: each[0])]
    return found


def workloads(head_dim: int, device: Device) -> dict[str, AttentionCase]:
    """What a shape is timed on, by name: 24/8 heads, causal, biased."""
    if device.rehearsal is not None:
        return {
            "packed": AttentionCase("tune", (9, 4), (2, 1), head_dim),
            "masks": AttentionCase("tune", (5, 3), (2, 1), head_dim, prefix=3),
        }
    return {"packed": AttentionCase("tune", (2048,) * 16, head_dim=head_dim), "masks": mask_case(head_dim=head_dim)}


def programs_of(step: Step, device: Device) -> dict[str, Program]:
    """The program of a step on each workload."""
    kernel, tried = KERNELS[step.search], (step.search, step.shape)
    cases = workloads(step.head_dim, device)
    return {name: Program(case, kernel.direction, True, kernel.name, tried) for name, case in cases.items()}


def milliseconds(program: Program, family: str, device: Device) -> float | str:
    """Time of the searched kernel, or why it does not run with this shape."""
    *before, timed = launches(program, family, device.dtype, device.name)
    try:
        for each in before:
            each.run()
        timed.run()
        return device.milliseconds(timed.run, 5, 30)
    except (RuntimeError, TritonError) as error:
        # After an illegal access nothing works in this process: it ends here, the next one goes on behind it.
        device.release()
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def fastest(timings: dict[str, dict[str, float | str]]) -> Shape | None:
    """The shape with the least product of its times, of those that ran everywhere."""
    timed = [
        (math.prod(times.values()), shape)
        for shape, times in timings.items()
        if times and all(isinstance(ms, float) for ms in times.values())
    ]
    return ast.literal_eval(min(timed)[1]) if timed else None


def write_table(table: dict[str, Any], path: Path) -> None:
    """The block-size table, one line per family, kernel and element size, replaced in one step."""
    lines = []
    for family, kernels in table.items():
        rows = [
            f'    "{kernel}": {{\n'
            + ",\n".join(f'      "{size}": {json.dumps(shapes)}' for size, shapes in sizes.items())
            + "\n    }"
            for kernel, sizes in kernels.items()
        ]
        lines.append(f'  "{family}": {{\n' + ",\n".join(rows) + "\n  }")
    path.parent.mkdir(exist_ok=True, parents=True)
    partial = path.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    partial.replace(path)


def main() -> int:
    device, deadline, _ = device_of_command("benchmarks.tune", __doc__)
    path, content = kept_results("tuning", device, BLOCK_SIZES_FILE, timings={})
    family = device_family(torch.device(device.name))
    head_dims, limit = (HEAD_DIMS, None) if device.rehearsal is None else ((16,), 2)
    table = json.loads(BLOCK_SIZES_FILE.read_text())
    timings: dict[str, dict[str, dict[str, float | str]]] = content["timings"]
    steps = steps_outward(table[family], head_dims, list(candidates()), limit)
    missing = [step for step in steps if str(step.shape) not in timings.get(f"{step.search} d{step.head_dim}", {})]
    ahead = Ahead(device, [program for step in missing for program in programs_of(step, device).values()])
    with ahead:
        for step in missing:
            programs = programs_of(step, device)
            ready = all(ahead.wait(program, deadline) for program in programs.values())
            if time.monotonic() > deadline:
                print(f"stopped in time; run again to go on with {path}", flush=True)
                return 0
            found = timings.setdefault(f"{step.search} d{step.head_dim}", {})
            times = found[str(step.shape)] = dict.fromkeys(programs, "did not return" if ready else "does not compile")
            save(path, content)
            for name, program in programs.items() if ready else ():
                times[name] = milliseconds(program, family, device)
                save(path, content)
            best = fastest(found)
            print(f"{step.search} d{step.head_dim} {step.shape}: {times}; best {best}", flush=True)
            for search, results in timings.items():
                if best := fastest(results):
                    kernel, head_dim = search.split(" d")
                    table[family][kernel]["2"][head_dim] = list(best)
            write_table(table, device.tuned_block_sizes())
    print(f"complete: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
