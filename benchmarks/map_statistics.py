"""Times attention statistics on a CPU beside the attention they belong to and beside eager attention maps.

    python -m benchmarks.map_statistics [--lengths 1024 4096]

fp32, 8 query heads over 2 key/value heads of 128, one causal sequence, every row chosen, W = 10, horizon 10 to 100. The
arms of a length run in turn, round after round, and the fastest round of each counts. Peak memory beyond the inputs is
measured in a fresh process per arm. Eager maps run where all heads' map takes at most 2.5 GB. And what a forward of a
whole model costs with and without collecting WAAD and FAI: Llama of 30 M parameters, 12 layers, random weights, packed
rollouts.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atman_kernels import AttentionPlan, _cpu, attention_statistics, attention_varlen
from atmanrl.attention_series import attention_series
from atmanrl.saliency.frozen import frozen
from atmanrl.saliency.throughput import random_model
from benchmarks.cpu import _seconds, _status_bytes, processor
from benchmarks.timing import commit, results_file, save

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
HEADS_Q, HEADS_KV, HEAD_DIM = 8, 2, 128
WINDOW, HORIZON = 10, (10, 100)
LARGEST_MAP = 2.5e9
ARMS = ("attention forward", "WAAD and received", "with distance", "eager map")


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


def arm(name: str, length: int) -> Callable[[], object]:
    """What an arm computes, on fixed random tensors."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(length, HEADS_Q, HEAD_DIM, generator=generator)
    k, v = (torch.randn(length, HEADS_KV, HEAD_DIM, generator=generator) for _ in range(2))
    if name == "eager map":
        return lambda: eager(q, k)
    plan = AttentionPlan((length,))
    if name == "attention forward":
        return lambda: attention_varlen(q, k, v, plan=plan, return_lse=True)
    _, lse = attention_varlen(q, k, v, plan=plan, return_lse=True)
    whole = name == "with distance"
    return lambda: attention_statistics(q, k, lse, plan=plan, window=WINDOW, horizon=HORIZON, need_distance=whole)


def runs_at(name: str, length: int) -> bool:
    """Whether an arm is run at a length."""
    return name != "eager map" or map_bytes(length) <= LARGEST_MAP


def measure(length: int) -> dict[str, Any]:
    """Fastest milliseconds and peak MiB of each arm."""
    arms = {name: arm(name, length) for name in ARMS if runs_at(name, length)}
    best = dict.fromkeys(arms, float("inf"))
    rounds = max(2, min(30, 65536 // length))
    for number in range(rounds):
        for name, run in arms.items():
            # A map takes seconds, and its time does not vary by much.
            if name != "eager map" or number < 2:
                best[name] = min(best[name], _seconds(run))
    return {
        "length": length,
        "ms": {name: 1e3 * seconds for name, seconds in best.items()},
        "peak_mib": {name: peak_bytes(name, length) / 2**20 for name in arms},
        "map_mib": map_bytes(length) / 2**20,
    }


def peak_bytes(name: str, length: int) -> float:
    """Peak memory of an arm beyond its inputs, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.map_statistics", "--peak", name, str(length)]
    root = Path(__file__).parent.parent
    return float(subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout)


def _print_peak(name: str, length: int) -> None:
    arm(name, 64)()
    run = arm(name, length)
    # What the attention for lse has freed must count again.
    ctypes.CDLL(None).malloc_trim(0)
    # Writing 5 sets the high-water mark back to what the process holds now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    run()
    print(_status_bytes("VmHWM") - before)


def measure_model(prompt: int, response: int, rollouts: int) -> dict[str, Any]:
    """Fastest milliseconds of one packed forward of a model alone, and with WAAD and FAI of its responses."""
    model = random_model("llama-30m", dtype=torch.float32, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 1000, (rollouts, prompt + response), generator=generator).tolist()
    prompts, responses = [row[:prompt] for row in ids], [row[prompt:] for row in ids]
    packed, plan = torch.tensor(ids).flatten()[None], AttentionPlan([prompt + response] * rollouts)
    positions = torch.arange(prompt + response).repeat(rollouts)[None]

    def forward() -> None:
        with frozen(model), torch.no_grad():
            model(
                input_ids=packed,
                position_ids=positions,
                attention_mask=torch.empty(1, 1, 0, 0),
                use_cache=False,
                logits_to_keep=1,
                attention_plan=plan,
            )

    budget = rollouts * (prompt + response)
    series = partial(attention_series, model, prompts, responses, token_budget=budget)
    arms: dict[str, Callable[[], object]] = {"forward": forward, "with series": series}
    best = dict.fromkeys(arms, float("inf"))
    for _ in range(3):
        for name, run in arms.items():
            best[name] = min(best[name], _seconds(run))
    return {
        "prompt": prompt,
        "response": response,
        "rollouts": rollouts,
        "layers": model.config.num_hidden_layers,
        "ms": {name: 1e3 * seconds for name, seconds in best.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        _print_peak(arguments.peak[0], int(arguments.peak[1]))
        return 0
    facts = {
        "device": processor(),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "instruction_set": (_cpu.isas() or ["reference"])[0],
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    content: dict[str, Any] = {**facts, "models": [], "results": []}
    path = results_file("statistics", facts)
    # Threads and caches come up before anything counts.
    arm(ARMS[0], 4096)()
    for prompt, response, rollouts in ((150, 250, 16), (200, 1800, 4), (200, 7800, 1)):
        content["models"].append(measure_model(prompt, response, rollouts))
        save(path, content)
        print(content["models"][-1], flush=True)
    for length in arguments.lengths:
        content["results"].append(measure(length))
        save(path, content)
        print(content["results"][-1], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
