"""What WAAD and FAI cost in a forward of a whole model, on a CPU.

    python -m benchmarks.observed_forward

A packed forward of a Llama of 30 M parameters (12 layers, random weights, fp32) as it runs anyway for old
log-probabilities, each rollout with its prompt: plain, and observed. Beside the difference, which other work on the
machine may hide, stands the time spent in the observer itself. And the series' own forward, which runs equal prompts
once; rollouts come in groups of eight with one prompt each. Arms run in turn; the fastest round of each counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from atman_kernels import AttentionPlan
from atman_kernels.hf import AttentionCall, observing
from atmanrl.config import SeriesConfig
from atmanrl.rhythm.series import SeriesCollector, attention_series
from atmanrl.saliency.likelihood import frozen
from atmanrl.saliency.throughput import random_model
from benchmarks.cpu import _seconds, provenance
from benchmarks.device import results_file, save

GROUP = 8
# Prompt, response, rollouts and rounds.
SHAPES = ((150, 250, 16, 8), (200, 1800, 4, 6), (200, 7800, 1, 4))


class TimedCollector(SeriesCollector):
    """Counts the seconds that it takes."""

    def __init__(self, n_layers: int, response: Tensor) -> None:
        super().__init__(n_layers, [response], SeriesConfig())
        self.seconds = 0.0

    def __call__(self, call: AttentionCall) -> None:
        start = time.perf_counter()
        super().__call__(call)
        self.seconds += time.perf_counter() - start


def measure(prompt: int, response: int, rollouts: int, rounds: int) -> dict[str, Any]:
    """Fastest milliseconds of each arm."""
    model = random_model("llama-30m", dtype=torch.float32, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(1, 1000, (-(-rollouts // GROUP), prompt), generator=generator).tolist()
    prompts = [queries[i // GROUP] for i in range(rollouts)]
    responses = torch.randint(1, 1000, (rollouts, response), generator=generator).tolist()
    rows = [token for pair in zip(prompts, responses, strict=True) for ids in pair for token in ids]
    packed, plan = torch.tensor(rows)[None], AttentionPlan([prompt + response] * rollouts)
    positions = torch.arange(prompt + response).repeat(rollouts)[None]
    is_response = positions >= prompt
    n_layers = model.config.num_hidden_layers

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

    in_observer: list[float] = []

    def observed() -> None:
        collector = TimedCollector(n_layers, is_response)
        with observing(collector):
            forward()
        in_observer.append(collector.seconds + _seconds(lambda: collector.series([response] * rollouts)))

    own = partial(attention_series, model, prompts, responses, token_budget=rollouts * (prompt + response))
    arms: dict[str, Callable[[], object]] = {"forward": forward, "observed": observed, "own forward": own}
    best = dict.fromkeys(arms, float("inf"))
    for _ in range(rounds):
        for name, run in arms.items():
            best[name] = min(best[name], _seconds(run))
    best["in the observer"] = min(in_observer)
    return {
        "prompt": prompt,
        "response": response,
        "rollouts": rollouts,
        "layers": n_layers,
        "ms": {name: 1e3 * seconds for name, seconds in best.items()},
    }


def main() -> int:
    facts = provenance()
    content: dict[str, Any] = {**facts, "results": []}
    path = results_file("observed_forward", facts)
    for shape in SHAPES:
        content["results"].append(measure(*shape))
        save(path, content)
        print(content["results"][-1], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
