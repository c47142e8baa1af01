"""Times attention statistics on a CPU beside the attention they belong to and beside eager attention maps.

    python -m benchmarks.map_statistics [--lengths 1024 4096]

fp32 and bf16, 8 query heads over 2 key/value heads of 128, one causal sequence, every row chosen, W = 10, horizon 10 to
100. The arms of a length run in turn, round after round, and the fastest round of each counts. Peak memory beyond the
inputs is measured in a fresh process per arm, in fp32. Eager maps run once, in fp32, where all heads' map takes at most
2.5 GB. `benchmarks.observed_forward` has what all of it costs in a whole model.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atman_kernels import AttentionPlan, attention_statistics, attention_varlen
from atman_kernels.statistics import attention_with_distance
from benchmarks.cpu import _seconds, _status_bytes, provenance
from benchmarks.device import results_file, save

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
HEADS_Q, HEADS_KV, HEAD_DIM = 8, 2, 128
WINDOW, HORIZON = 10, (10, 100)
LARGEST_MAP = 2.5e9
STATISTICS = ("WAAD and received", "all from q, k, lse")
MAP = "eager map"


def map_bytes(length: int) -> int:
    """Bytes of the fp32 attention map of one layer."""
    return 4 * HEADS_Q * length**2


def eager(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics from the map, as an eager model leaves it: distance (Hq,), (Hq, T) windowed, (Hq, T) received."""
    n = q.shape[0]
    distance = torch.arange(n)[:, None] - torch.arange(n)
    keys = k.repeat_interleave(HEADS_Q // HEADS_KV, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, keys) * HEAD_DIM**-0.5
    p = scores.masked_fill_(distance < 0, -torch.inf).softmax(-1)
    d = distance.clamp(min=0).float()
    band = ((distance >= HORIZON[0]) & (distance <= HORIZON[1])).float()
    mean_distance = torch.einsum("hqk,qk->hq", p, d).mean(1)
    windowed = torch.einsum("hqk,qk->hq", p, d.clamp(max=WINDOW))
    return mean_distance, windowed, torch.einsum("hqk,qk->hk", p, band) / band.sum(0).clamp(min=1)


def arms_at(
    length: int, dtype: torch.dtype = torch.float32, *, with_map: bool = False
) -> dict[str, Callable[[], object]]:
    """What the arms of a length compute, on the same random tensors."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(length, HEADS_Q, HEAD_DIM, generator=generator).to(dtype)
    k, v = (torch.randn(length, HEADS_KV, HEAD_DIM, generator=generator).to(dtype) for _ in range(2))
    plan = AttentionPlan((length,))
    _, lse = attention_varlen(q, k, v, plan=plan, return_lse=True)
    collected = partial(attention_statistics, q, k, lse, plan=plan, window=WINDOW, horizon=HORIZON)
    arms: dict[str, Callable[[], object]] = {
        "attention forward": lambda: attention_varlen(q, k, v, plan=plan, return_lse=True),
        "attention with distance": lambda: attention_with_distance(q[None], k[None], v[None], None, plan=plan),
        STATISTICS[0]: partial(collected, need_distance=False),
        STATISTICS[1]: collected,
    }
    return arms | ({MAP: lambda: eager(q, k)} if with_map else {})


def measure(length: int, dtype: torch.dtype) -> dict[str, Any]:
    """Fastest milliseconds of each arm and, in fp32, peak MiB of those that stand in for a map, and of the map."""
    arms = arms_at(length, dtype)
    best = dict.fromkeys(arms, float("inf"))
    for _ in range(max(2, min(20, 32768 // length))):
        for name, run in arms.items():
            best[name] = min(best[name], _seconds(run))
    ms = {name: 1e3 * seconds for name, seconds in best.items()}
    peak: dict[str, float] = {}
    if dtype == torch.float32:
        # A map takes seconds: once is enough.
        with_map = [MAP] if map_bytes(length) <= LARGEST_MAP else []
        alone = {name: run_alone(name, length) for name in (*STATISTICS, *with_map)}
        peak = {name: found["peak_mib"] for name, found in alone.items()}
        ms |= {name: alone[name]["ms"] for name in with_map}
    return {
        "length": length,
        "dtype": str(dtype).removeprefix("torch."),
        "ms": ms,
        "peak_mib": peak,
        "map_mib": map_bytes(length) / 2**20,
    }


def run_alone(name: str, length: int) -> dict[str, float]:
    """Milliseconds and peak memory beyond the inputs of one run of an arm, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.map_statistics", "--alone", name, str(length)]
    root = Path(__file__).parent.parent
    found: dict[str, float] = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout
    )
    return found


def _print_one_run(name: str, length: int) -> None:
    arms_at(64, with_map=True)[name]()
    run = arms_at(length, with_map=True)[name]
    # What the attention for lse has freed must count again.
    ctypes.CDLL(None).malloc_trim(0)
    # Writing 5 sets the high-water mark back to what the process holds now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    seconds = _seconds(run)
    print(json.dumps({"ms": 1e3 * seconds, "peak_mib": (_status_bytes("VmHWM") - before) / 2**20}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        _print_one_run(arguments.alone[0], int(arguments.alone[1]))
        return 0
    facts = provenance()
    content: dict[str, Any] = {**facts, "results": []}
    path = results_file("statistics", facts)
    # Threads and caches come up before anything counts.
    arms_at(4096)
    for dtype in (torch.float32, torch.bfloat16):
        for length in arguments.lengths:
            content["results"].append(measure(length, dtype))
            save(path, content)
            print(content["results"][-1], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
