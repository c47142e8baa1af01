"""Static performance checks: compile the production kernels ahead of time and compare with the committed table.

    python -m benchmarks.compiled_kernels            compile all configurations and report what got worse
    python -m benchmarks.compiled_kernels --quick    the subset that the tests compile
    python -m benchmarks.compiled_kernels --update   write the table
    ... --only "sm_90 bfloat16"                      configurations whose names begin so; --update keeps the other rows

No GPU is needed. A kernel is worse than its row if it spills more, if one of its main loops has over 5 % more
non-matrix instructions or waits for more loads, if its matrix instructions got serialised, or if it needs more shared
memory than there is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Kernels decorated under the interpreter cannot be compiled; this must precede the first import of Triton.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton

from atman_kernels._triton.backward import backward_launches
from atman_kernels._triton.forward import forward_launches
from atman_kernels._triton.launch import Launch
from atman_kernels._triton.statistics import statistics_launches
from atman_kernels.problem import NO_WINDOW, AttentionProblem, Gradients, Statistics, StatisticsProblem
from benchmarks.compiled import SHARED_CAPACITY, Counts, compile_launch, count

TABLE = Path(__file__).parent / "results" / "compiled_kernels.json"
MAIN_LOOP_GROWTH = 1.05


class Configuration(NamedTuple):
    """One production use of the kernels: 24 query heads over 8 kv heads unless said otherwise."""

    target: str
    dtype: str = "bfloat16"
    head_dim: int = 128
    heads: tuple[int, int] = (24, 8)
    bias: bool = True
    prefix: bool = False
    window: bool = False
    causal: bool = True
    gradients: str = "all"
    statistics: bool = False
    fused: bool = False
    permuted: bool = False

    def __str__(self) -> str:
        extras = [name for name in ("prefix", "window", "fused", "permuted") if getattr(self, name)]
        extras += [] if self.bias else ["unbiased"]
        extras += [] if self.causal else ["full"]
        extras += [] if self.gradients == "all" else [f"only {self.gradients}"]
        return " ".join([self.target, self.dtype, f"d{self.head_dim}", "{}/{}".format(*self.heads), *extras])

    def launches(self) -> Iterator[Launch]:
        """Forward and backward launches as they happen for such tensors; tensors are without storage."""
        dtype = getattr(torch, self.dtype)
        heads_q, heads_kv = self.heads
        n_rows, n_tiles = 4096, 32

        def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        q, k, v = (empty(1, n_rows, heads, self.head_dim) for heads in (heads_q, heads_kv, heads_kv))
        if self.permuted:
            # (B, H, T, D) in memory, which has no tensor descriptor.
            k, v = (empty(1, heads_kv, n_rows, self.head_dim).transpose(1, 2) for _ in range(2))
        lse = empty(1, heads_q, n_rows, dtype=torch.float32)
        key_bias = empty(1, n_rows, dtype=torch.float32) if self.bias else None
        prefix = empty(512, heads_kv, self.head_dim) if self.prefix else None
        sequences, tiles = empty(8, 7, dtype=torch.int32), empty(n_tiles, 2, dtype=torch.int32)
        tables = (sequences, tiles, tiles)
        sm_scale, window = self.head_dim**-0.5, 1024 if self.window else NO_WINDOW
        if self.statistics:
            distance, sums = empty(8, heads_q, dtype=torch.float32), torch.empty_like(lse)
            counts, rows = empty(1, n_rows, dtype=torch.int32), empty(1, n_rows, dtype=torch.uint8)
            yield from statistics_launches(
                self.target,
                Statistics(distance, sums, sums, counts),
                StatisticsProblem(q, k, lse, key_bias, prefix, rows, *tables, sm_scale, window, 10, (10, 100)),
            )
            return
        problem = AttentionProblem(q, k, v, key_bias, prefix, prefix, *tables, sm_scale, self.causal, window)
        if self.gradients == "all" and not self.fused:
            yield from forward_launches(self.target, q, lse, problem)
        gradients = Gradients(*(x if self.gradients == "all" else None for x in (q, k, v)), key_bias)
        yield from backward_launches(self.target, gradients, q, None, q, lse, problem, fused=self.fused)


def configurations() -> list[Configuration]:
    """The production configurations; each stands for two to four kernels."""
    found = []
    for target in ("sm_80", "sm_90", "sm_100"):
        for head_dim in (64, 128, 256):
            found.append(Configuration(target, "bfloat16", head_dim))
        found.append(Configuration(target, "float16"))
        found.append(Configuration(target, "float32", 64))
        found.append(Configuration(target, "float32"))
        found.append(Configuration(target, bias=False))
        found.append(Configuration(target, prefix=True))
        found.append(Configuration(target, gradients="key_bias"))
    for target in ("sm_86", "gfx942"):
        for head_dim in (64, 128, 256):
            found.append(Configuration(target, "bfloat16", head_dim))
    for target in ("sm_80", "sm_90"):
        found.append(Configuration(target, window=True))
        found.append(Configuration(target, head_dim=80, heads=(32, 32)))
    found += [Configuration(target, head_dim=d, fused=True) for target in ("sm_90", "sm_100") for d in (64, 128, 256)]
    found += [Configuration(target, permuted=True) for target in ("sm_90", "sm_100")]
    found.append(Configuration("sm_90", causal=False))
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        found.append(Configuration(target, bias=False, statistics=True))
    found.append(Configuration("sm_90", head_dim=64, prefix=True, window=True, statistics=True))
    found.append(Configuration("sm_90", "float32", head_dim=64, bias=False, statistics=True))
    return found


def quick_configurations() -> list[Configuration]:
    """What the tests compile: every target and head_dim, both 16-bit dtypes, and a mask-only backward."""
    return [
        Configuration("sm_80"),
        Configuration("sm_90"),
        Configuration("sm_100"),
        Configuration("sm_90", head_dim=64, prefix=True),
        Configuration("sm_80", "float16", head_dim=64),
        Configuration("sm_90", head_dim=256),
        Configuration("sm_90", gradients="key_bias"),
        Configuration("sm_90", bias=False, statistics=True),
        Configuration("sm_90", fused=True),
    ]


def measure(configuration: Configuration) -> Iterator[tuple[str, Counts]]:
    """(row name, counts) of each attention kernel of a configuration."""
    for launch in configuration.launches():
        a = launch.arguments
        idle = getattr(a.get("needs"), "PREFIX_ONLY", False) and not a["flags"].HAS_PREFIX
        if "flags" in a and not idle:
            near = "near_" if a.get("NEAR") else ""
            name = f"{configuration} {near}{launch.kernel.__name__.removesuffix('_kernel')}"
            yield name, count(compile_launch(launch, configuration.target))


def worse(name: str, now: Counts, row: dict[str, object] | None) -> list[str]:
    """What got worse against a row of the table, or cannot run at all, as sentences."""
    capacity = SHARED_CAPACITY[name.split()[0]]
    found = []
    if now.shared_bytes > capacity:
        found.append(f"{name}: needs {now.shared_bytes} B of shared memory, the device has {capacity} B")
    if not now.matrix_instructions and "float32" not in name:
        # Asked for more tensor memory than there is, the compiler emits a trap and no error.
        found.append(f"{name}: compiles to no matrix instruction")
    if row is None:
        return [*found, f"{name}: not in the table"]
    before = Counts(**{key: tuple(value) if isinstance(value, list) else value for key, value in row.items()})
    if now.spill_bytes > before.spill_bytes:
        found.append(f"{name}: spills {now.spill_bytes} B per thread, {before.spill_bytes} B before")
    if now.matrix_waits >= now.matrix_instructions > before.matrix_waits:
        found.append(f"{name}: the assembler serialises the matrix instructions ({now.matrix_waits} waits)")
    for index, (length, length_before) in enumerate(zip(now.main_loops, before.main_loops, strict=False)):
        if length > MAIN_LOOP_GROWTH * length_before:
            found.append(f"{name}: main loop {index} grew from {length_before} to {length} non-matrix instructions")
    for index, (loads, loads_before) in enumerate(zip(now.waited_loads, before.waited_loads, strict=False)):
        if loads > loads_before:
            found.append(f"{name}: main loop {index} waits for {loads} loads in every pass, for {loads_before} before")
    if len(now.main_loops) != len(before.main_loops):
        found.append(f"{name}: {len(now.main_loops)} main loops, {len(before.main_loops)} before")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the configurations that the tests compile")
    parser.add_argument("--update", action="store_true", help="write the table instead of comparing with it")
    parser.add_argument("--only", default="", metavar="TEXT", help="only configurations whose names begin so")
    arguments = parser.parse_args()
    rows = json.loads(TABLE.read_text())["kernels"] if TABLE.exists() else {}
    found: dict[str, Counts] = {}
    complaints = []
    chosen = quick_configurations() if arguments.quick else [*configurations(), *quick_configurations()]
    for configuration in dict.fromkeys(each for each in chosen if str(each).startswith(arguments.only)):
        for name, counts in measure(configuration):
            print(f"{name}: {counts}", flush=True)
            found[name] = counts
            complaints += worse(name, counts, counts._asdict() if arguments.update else rows.get(name))
    if arguments.update:
        kernels = {name: counts._asdict() for name, counts in found.items()}
        kernels = dict(sorted({**(rows if arguments.only else {}), **kernels}.items()))
        TABLE.parent.mkdir(exist_ok=True)
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in kernels.items())
        TABLE.write_text(f'{{"triton": "{triton.__version__}", "kernels": {{\n{lines}\n}}}}\n')
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
