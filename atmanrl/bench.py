"""``atmanrl bench``: mask-optimisation throughput of the engine and its peers, side by side."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from atmanrl.config import Dtype, ModelConfig
from atmanrl.evaluation.records import check_writable, write_text_atomically
from atmanrl.models import load_model
from atmanrl.saliency.throughput import (
    Measurement,
    check_arms,
    matrix_rate,
    measure,
    necessary_per_step,
    random_model,
    random_problem,
)

# Relative to the largest entry: rounding differs among arms, in bfloat16 by some per cent.
_SAME = 0.1


def bench_command(
    *,
    model: str | None,
    shape: str,
    dtype: Dtype,
    queries: int,
    rollouts: int,
    prompt: int,
    cot: tuple[int, int],
    answer: int,
    arms: Sequence[str],
    steps: int,
    output: Path | None,
    console: Console | None = None,
) -> int:
    """Measure, print a table and return the exit status.

    Args:
        model: directory or Hugging Face id; None: random weights of ``shape``.
        dtype: of the weights.
        queries, rollouts: the problem has queries x rollouts rollouts; prompt, cot, answer: their tokens.
        arms: names of :data:`atmanrl.saliency.throughput.ARMS`; ratios are to the first that runs.
        steps: timed steps per arm.
        output: JSON file to write.

    Raises:
        ValueError: for an unknown shape or arm, or lengths that make no rollout or none that the model can hold.
    """
    check_arms(arms)
    if min(queries, rollouts, prompt, cot[0], answer, steps) < 1 or cot[1] < cot[0]:
        raise ValueError("queries, rollouts, prompt, cot, answer and steps must be at least 1, and cot least <= most")
    if output is not None:
        check_writable(output, "--output")
    console = console or Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = _policy(model, shape, dtype, device)
    limit = getattr(policy.config, "max_position_embeddings", None)
    if limit is not None and prompt + cot[1] + answer > limit:
        raise ValueError(f"rollouts of up to {prompt + cot[1] + answer} tokens, the model's context holds {limit}")
    problem = random_problem(
        policy.config.vocab_size, queries=queries, rollouts=rollouts, prompt=prompt, cot=cot, answer=answer
    )
    rows = sum(len(rollout.completion_ids) - 1 for rollout in problem)
    necessary = necessary_per_step(policy, problem)
    rate = matrix_rate(device, policy.dtype)
    counted = "operations not counted" if necessary is None else f"necessary {necessary / 1e9:.1f} GFLOP per step"
    console.print(
        f"{model or shape}, {dtype}, {_device_name(device)}, {torch.get_num_threads()} threads; {queries} x {rollouts}"
        f" rollouts, {rows} completion rows; {counted}; matrix rate {rate / 1e9:.0f} GFLOP/s"
    )
    table = Table(
        "arm", "s/step", "rollout-steps/s", "tokens/s", "necessary / matrix rate", "operations / necessary", "peak MiB",
        "times first", "gradient",
    )  # fmt: skip
    results: list[Measurement] = []
    for result in measure(policy, problem, arms, steps=steps):
        results.append(result)
        first = next((other for other in results if other.skipped is None), result)
        table.add_row(*_row(result, first, len(problem), rows, necessary, rate))
    console.print(table)
    if output is not None:
        write_text_atomically(
            output,
            json.dumps(
                {
                    "model": model or shape, "dtype": dtype, "device": _device_name(device), "torch": torch.__version__,
                    "threads": torch.get_num_threads(), "queries": queries, "rollouts": rollouts, "prompt": prompt,
                    "cot": cot, "answer": answer, "rows": rows, "necessary_flops": necessary, "matrix_rate": rate,
                    "arms": [asdict(result) for result in results],
                },
                indent=1,
            ),
        )  # fmt: skip
    return 0


def _policy(model: str | None, shape: str, dtype: Dtype, device: torch.device) -> PreTrainedModel:
    if model is None:
        return random_model(shape, dtype=getattr(torch, dtype), device=device)
    loaded: PreTrainedModel = load_model(ModelConfig(model, dtype=dtype), device=device)
    return loaded


def _row(result: Measurement, first: Measurement, n: int, rows: int, necessary: int | None, rate: float) -> list[str]:
    if result.skipped is not None:
        return [result.arm, f"not run: {result.skipped}"]
    return [
        result.arm,
        f"{result.seconds:.3f}",
        f"{n / result.seconds:.1f}",
        f"{rows / result.seconds:.0f}",
        "" if necessary is None else f"{necessary / rate / result.seconds:.0%}",
        "" if result.flops is None or necessary is None else f"{result.flops / necessary:.3f}",
        "" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:.0f}",
        f"{result.seconds / first.seconds:.2f}",
        f"{result.gradient_error:.0e}{'' if result.gradient_error < _SAME else ' (differs)'}",
    ]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
