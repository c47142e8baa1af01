"""How far the cheaper mask presets agree with the paper's, and what they save.

    python -m benchmarks.presets

8 held-out Ledger prompts x 8 reference chains on the starting checkpoint. Agreement is Spearman's correlation of each
chain's mask with the one that ``paper`` learns on the same model, and of the saliency rewards over all chains; cost is
the share of ``paper``'s row-steps (rows x updates) and of its processor time on one thread. "float8" is compared with
``paper`` on the checkpoint in bfloat16, from which it rounds; "bfloat16" says what that rounding alone does.
"""

from __future__ import annotations

import json
import math
import platform
import random
import statistics
import sys
import time
from itertools import islice
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from atmanrl import MaskConfig, Rollout, optimize_masks, saliency_reward
from atmanrl.config import MASK_PRESETS, LedgerConfig
from atmanrl.evaluation.summary import spearman
from atmanrl.saliency import TokenScores
from atmanrl.tasks.ledger import ANSWER, CHECKPOINT, sample_chain, sample_examples
from benchmarks.cpu import processor
from benchmarks.device import commit, results_file, save

PROMPTS, CHAINS = 8, 8
# Below this loss under the initial mask there is nothing to restore, and a mask is rounding noise.
LEAST_LOSS = 1e-2


def chains(seed: int = 0) -> list[Rollout]:
    """Reference chains of held-out prompts with their right answers."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    config, rng = LedgerConfig(), random.Random(seed)
    found = []
    for example in islice(sample_examples(config, seed, held_out=True), PROMPTS):
        prompt = tuple(tokenizer.encode(example.prompt))
        for _ in range(CHAINS):
            words = sample_chain(example, config, rng, example.pairs)
            parts = (
                tokenizer.encode(text, add_special_tokens=False) for text in (" ".join(words), example.answer, ANSWER)
            )
            found.append(Rollout(prompt, *map(tuple, parts)))
    return found


def learn(model: PreTrainedModel, rollouts: list[Rollout], config: MaskConfig) -> tuple[list[TokenScores], float]:
    """The masks, and the processor seconds that they took."""
    start = time.process_time()
    result = optimize_masks(model, rollouts, config, progress=False)
    return result, time.process_time() - start


def agreement(result: list[TokenScores], paper: list[TokenScores], row_steps: float) -> dict[str, Any]:
    """How closely masks and rewards follow the paper's; ``row_steps``: the share of its rows x updates."""
    compared = [(a.mask, b.mask) for a, b in zip(result, paper, strict=True) if b.loss_initial > LEAST_LOSS]
    correlations = [c for a, b in compared if not math.isnan(c := spearman(a, b))]
    return {
        "chains": len(correlations),
        "mask_correlation_mean": statistics.mean(correlations),
        "mask_correlation_worst": min(correlations),
        "reward_correlation": spearman(saliency_reward(result), saliency_reward(paper)),
        "reward_mean": saliency_reward(result).mean().item(),
        "row_steps": row_steps,
    }


def main() -> int:
    torch.set_num_threads(1)
    rollouts = chains()
    facts = {
        "device": processor(),
        "commit": commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "chains": len(rollouts),
    }
    path = results_file("presets", facts)
    content: dict[str, Any] = {**facts, "results": {}}
    exact = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    rounded = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.bfloat16)
    paper, paper_seconds = learn(exact, rollouts, MaskConfig())
    rounded_paper, rounded_seconds = learn(rounded, rollouts, MaskConfig())
    for name, config in {**MASK_PRESETS, "bfloat16": MaskConfig()}.items():
        on_bfloat16 = name == "bfloat16" or config.weights == "float8"
        result, seconds = learn(rounded if on_bfloat16 else exact, rollouts, config)
        base = (rounded_paper, rounded_seconds) if config.weights == "float8" else (paper, paper_seconds)
        content["results"][name] = {
            **agreement(result, base[0], config.steps / MaskConfig().steps),
            "seconds": seconds / base[1],
        }
        save(path, content)
        print(name, json.dumps(content["results"][name]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
