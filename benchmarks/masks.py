"""Times a step of mask optimisation beside the ways it would otherwise be written.

    python -m benchmarks.masks [--seconds 300] [--shapes llama-30m]

8 queries x 8 rollouts, prompt 150, chain of thought 150 to 250, answer 8 tokens. Each peer is timed next to the fast
path, so that a ratio compares neighbours in time; every pair is kept as soon as it is measured, one that fails with its
reason, and a run that was cut off goes on where it stopped. What is kept for the backward is counted, and what a step
spends its time on is profiled.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from atmanrl.saliency.cost import DecoderShape, peak_bytes, saved_bytes
from atmanrl.saliency.decoder import FrozenDecoder
from atmanrl.saliency.likelihood import ModelLikelihood, frozen
from atmanrl.saliency.packing import pack, whole
from atmanrl.saliency.throughput import (
    ARMS,
    Measurement,
    matrix_rate,
    measure,
    necessary_per_step,
    random_model,
    random_problem,
)
from benchmarks.cpu import processor
from benchmarks.device import add_results_argument, commit, results_file, save

PROBLEM: dict[str, Any] = {"queries": 8, "rollouts": 8, "prompt": 150, "cot": (150, 250), "answer": 8}
PEERS = ("general", "fast-captured", "sdpa-by-8", "paper", "paper-answer-logits", "sdpa", "flex")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
SHAPES = {"cpu": ("llama-30m", "llama-30m-untied"), "cuda": ("llama-3.2-3b",)}


def compare(shape: str, peer: str, *, steps: int, device: torch.device) -> dict[str, Any]:
    """One row of results: the fast path and ``peer`` on the same problem, one after the other."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model(shape, dtype=dtype, device=device)
    problem = random_problem(model.config.vocab_size, **PROBLEM)
    arms: dict[str, Any] = {}
    try:
        for result in measure(model, problem, ["fast", peer], steps=steps):
            arms[result.arm] = asdict(result)
    except Exception as error:
        # A result like any other: an arm that fails must not cost the others.
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        arms |= {arm: asdict(Measurement(arm, skipped=reason)) for arm in ("fast", peer) if arm not in arms}
    row = {"shape": shape, "peer": peer, "necessary_flops": necessary_per_step(model, problem)}
    return {**row, "matrix_rate": matrix_rate(device, dtype), "arms": arms}


def memory(shape: str, *, device: torch.device) -> dict[str, Any]:
    """Bytes kept for the backward per packed row and layer, and the fast path's predicted peak, of the whole problem.

    Plain autograd runs the same packed rows through the model on SDPA, with trainable weights or with frozen ones and a
    gradient for the embedded rows alone. Storages count once, weights not at all.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model(shape, dtype=dtype, device=device)
    rollouts = random_problem(model.config.vocab_size, **PROBLEM)
    few = pack([whole(rollout) for rollout in rollouts[:8]], device=device)
    layers_rows = model.config.num_hidden_layers * few.n_rows
    model.train()
    plain = partial(model.model, position_ids=few.positions[None], use_cache=False)
    kept = {"plain autograd, SDPA, weights trainable": saved_bytes(model, lambda: plain(few.ids[None])) / layers_rows}
    model.requires_grad_(False)
    embedded = model.model.embed_tokens(few.ids[None]).requires_grad_()
    kept["the same, weights frozen"] = saved_bytes(model, lambda: plain(inputs_embeds=embedded)) / layers_rows
    model.requires_grad_(True)
    bias = torch.full((few.n_rows,), -4.0, device=device, requires_grad=True)
    with frozen(model):
        likelihood = ModelLikelihood(model, few)
        kept["general path"] = saved_bytes(model, lambda: likelihood(bias)) / layers_rows
        kept["fast path"] = FrozenDecoder(model, few).kept_bytes / layers_rows
    batch = pack([whole(rollout) for rollout in rollouts], device=device)
    sizes = (batch.n_rows, len(batch.loss_rows), len(batch.prompt_ids))
    predicted = peak_bytes(DecoderShape.of(model), dtype.itemsize, *sizes, on_cpu=device.type == "cpu")
    return {"kept_bytes": kept, "predicted_peak_bytes": predicted}


def time_shares(shape: str) -> dict[str, float]:
    """Shares of a fast step's time on the CPU by torch.profiler: matrix products, attention, everything else."""
    model = random_model(shape, dtype=torch.float32, device=torch.device("cpu"))
    problem = random_problem(model.config.vocab_size, **PROBLEM)
    bias = torch.full((sum(len(rollout.cot_ids) for rollout in problem),), -4.0)
    with frozen(model):
        step = ARMS["fast"](model, problem)
        step(bias)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            step(bias)
    spent = dict.fromkeys(("products", "attention", "rest"), 0.0)
    for event in seen.key_averages():
        kind = "products" if event.key in _PRODUCTS else "attention" if "atman_kernels" in event.key else "rest"
        spent[kind] += event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: time / total for kind, time in spent.items()}


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no pair after this much time")
    add_results_argument(parser)
    parser.add_argument("--shapes", nargs="+", default=SHAPES[device.type])
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each arm; the fastest counts")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    facts = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "problem": PROBLEM,
    }
    path = results_file("masks", facts, arguments.results)
    content = (
        json.loads(path.read_text()) if path.exists() else {**facts, "results": [], "memory": {}, "time_shares": {}}
    )
    done = {(row["shape"], row["peer"]) for row in content["results"]}
    for shape in arguments.shapes:
        for peer in PEERS:
            if (shape, peer) in done:
                continue
            if time.monotonic() > deadline:
                print(f"stopped in time; run again to go on with {path}")
                return 0
            row = compare(shape, peer, steps=arguments.steps, device=device)
            content["results"].append(row)
            save(path, content)
            fast, other = row["arms"]["fast"], row["arms"][peer]
            shown = other["skipped"] or f"{other['seconds'] / fast['seconds']:.2f} times the fast path's time"
            print(f"{shape} {peer}: {shown} ({fast['seconds']:.3f} s)", flush=True)
            if device.type == "cuda":
                # After an illegal access nothing works in this process: it ends here, the next one goes on behind it.
                torch.cuda.synchronize()
        # Last, since it is the arms that need the machine.
        if shape not in content["memory"]:
            content["memory"][shape] = memory(shape, device=device)
        if device.type == "cpu" and shape not in content["time_shares"]:
            content["time_shares"][shape] = time_shares(shape)
        save(path, content)
    print(f"complete: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
