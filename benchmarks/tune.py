"""Chooses block sizes on the GPU at hand and writes them into the committed table.

    python -m benchmarks.tune --seconds 120

For each head_dim and kernel it times the candidates on a packed batch in bfloat16 and keeps the fastest. Finished
searches are kept in results/, so that a later call goes on where this one stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from atman_kernels._triton.backward import backward_launches
from atman_kernels._triton.forward import forward_launch
from atman_kernels._triton.launch import Launch, device_family
from atman_kernels._triton.tiles import BLOCK_SIZES_FILE
from benchmarks.cases import AttentionCase, make_inputs
from benchmarks.timing import provenance, results_file, save

KERNELS = ("forward", "backward_queries", "backward_keys")
HEAD_DIMS = (128, 64, 256, 32, 16)


def candidates() -> Iterator[tuple[int, int, int, int]]:
    """(BLOCK_M, BLOCK_N, num_warps, num_stages) worth timing for 16-bit inputs."""
    for block_m, block_n, num_warps, num_stages in itertools.product(
        (32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4)
    ):
        # More accumulators than registers, or less than a warp's matrix instruction per warp.
        if 32 * num_warps * 64 >= block_m * block_n >= 128 * num_warps:
            yield block_m, block_n, num_warps, num_stages


def launches(head_dim: int) -> dict[str, Launch]:
    """One launch per kernel of a causal, biased bf16 batch of 16 x 2048 tokens, 24/8 heads."""
    case = AttentionCase("tune", (2048,) * 16, head_dim=head_dim)
    x = make_inputs(case, torch.bfloat16, "cuda")
    q, k, v, bias, do = (t.detach()[None] for t in (x.q, x.k, x.v, x.key_bias, x.do))
    plan = case.plan("cuda")
    family = device_family(q.device)
    o, lse = torch.empty_like(q), torch.empty(1, q.shape[2], q.shape[1], device="cuda")
    bounds = (case.sm_scale, True, None)
    forward = forward_launch(family, o, lse, q, k, v, bias, None, None, plan.sequences, plan.tiles_q, *bounds)
    forward.run()
    grads = [torch.empty_like(t) for t in (q, k, v, bias)]
    queries, keys, _ = backward_launches(
        family, *grads, do, None, o, lse, q, k, v, bias, None, None,
        plan.sequences, plan.tiles_q, plan.tiles_k, *bounds,
    )  # fmt: skip
    queries.run()
    return dict(zip(KERNELS, (forward, queries, keys), strict=True))


def milliseconds(launch: Launch, shape: tuple[int, int, int, int], kernel: str) -> float | None:
    """Time of a launch with other block sizes; None where they do not fit the device."""
    block_m, block_n, num_warps, num_stages = shape
    owned, owned_before = (block_n, "BLOCK_N") if kernel == "backward_keys" else (block_m, "BLOCK_M")
    changed = launch._replace(
        arguments={**launch.arguments, "BLOCK_M": block_m, "BLOCK_N": block_n},
        programs=launch.programs * launch.arguments[owned_before] // owned,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    try:
        return float(do_bench(changed.run, warmup=5, rep=30, return_mode="median"))
    except OutOfResources:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop before this much time has passed")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.tune needs a CUDA GPU", file=sys.stderr)
        return 1
    deadline = time.monotonic() + arguments.seconds
    facts = provenance()
    path = results_file("tuning", facts)
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {**facts, "timings": {}}
    family = device_family(torch.device("cuda"))
    for head_dim in HEAD_DIMS:
        for kernel, launch in launches(head_dim).items():
            timings = content["timings"].setdefault(f"{kernel} d{head_dim}", {})
            for shape in candidates():
                if time.monotonic() > deadline:
                    print(f"stopped in time; run again to go on with {path}")
                    return 0
                if str(shape) not in timings:
                    timings[str(shape)] = milliseconds(launch, shape, kernel)
                    save(path, content)
            best = min((ms, shape) for shape, ms in timings.items() if ms is not None)
            print(f"{family} {kernel} d{head_dim}: {best[1]} takes {best[0]:.3f} ms", flush=True)
            table = json.loads(BLOCK_SIZES_FILE.read_text())
            table[family][kernel]["2"][str(head_dim)] = json.loads(best[1].replace("(", "[").replace(")", "]"))
            write_table(table)
    return 0


def write_table(table: dict[str, Any]) -> None:
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
    BLOCK_SIZES_FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    sys.exit(main())
