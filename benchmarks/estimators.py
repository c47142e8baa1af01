"""Rates every saliency estimator on Ledger: python -m benchmarks.estimators [--search].

Two sets of 128 chains of thought on the starting checkpoint: what it samples for held-out prompts, and reference chains
of held-out prompts with more filler and look-ups in them. Each estimator is scored against the planted truth (AUROC and
precision at k for the needed values), leave-one-out and substitution (Spearman), and by its deletion and insertion
curves (comprehensiveness, sufficiency), beside what it costs in passes. As a reward it is rated by
how often filler words put into a chain lower the reward. Intervals are paired over prompts.

``--search`` rates variants of the estimators on 64 training prompts instead, which is what the defaults were chosen by.
"""

from __future__ import annotations

import argparse
import math
import platform
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from atmanrl import ESTIMATORS, MaskConfig, Rollout, estimate_saliency, saliency_reward
from atmanrl.config import MASK_PRESETS, DataConfig, LedgerConfig, SeriesConfig
from atmanrl.evaluation.evaluate import evaluate
from atmanrl.evaluation.faithfulness import score_curves
from atmanrl.evaluation.summary import auroc, bootstrap_ratios, estimates, precision_at_k, spearman
from atmanrl.generation import GenerationSettings
from atmanrl.saliency import (
    Estimator,
    FutureInfluence,
    Integrated,
    Mask,
    SparseMask,
    Suppression,
    make_estimator,
    substitution_effects,
)
from atmanrl.tasks.ledger import (
    ANSWER,
    CHECKPOINT,
    FILLER,
    Example,
    classify_tokens,
    load,
    sample_chain,
    sample_examples,
)
from benchmarks.cpu import processor
from benchmarks.device import commit, results_file, save

PROMPTS, SEARCH_PROMPTS = 128, 64
FILLERS = 3
BUSY = LedgerConfig(filler_probability=0.7, lookup_probability=0.6)
# Whether a higher value is better.
MEASURES = {
    "auroc": True,
    "precision": True,
    "leave_one_out": True,
    "substitution": True,
    "comprehensiveness": True,
    "sufficiency": False,
}


@dataclass(frozen=True)
class Chains:
    """Rollouts with what is known about their tokens: (T,) per rollout each.

    Attributes:
        rollouts: prompt, chain of thought, marker and answer.
        needed: whether the answer copies the token.
        leave_one_out, substitution: rises of the answer's loss, nats.
    """

    rollouts: list[Rollout]
    needed: list[NDArray[np.bool_]]
    leave_one_out: list[NDArray[np.float64]]
    substitution: list[NDArray[np.float64]]


def sampled(model: PreTrainedModel, tokenizer: Any, *, held_out: bool) -> Chains:
    """The checkpoint's own completions that have an answer."""
    task = load(DataConfig())
    rows = (task.test if held_out else task.train).select(range(_prompts(held_out)))
    generation = GenerationSettings(max_new_tokens=64, samples=1)
    run = evaluate(model, tokenizer, task, rows, label="", saliency=False, seed=1234, generation=generation)
    found = [item for item in run.rollouts if len(item.cot) and len(item.answer)]
    rollouts = [Rollout(item.prompt.ids, item.cot.ids, item.answer.ids, item.marker.ids) for item in found]
    return _with_effects(model, rollouts, [[name == "needed" for name in item.classes] for item in found])


def busy(model: PreTrainedModel, tokenizer: Any, *, held_out: bool) -> Chains:
    """Reference chains with more idle tokens than the checkpoint has seen."""
    rng = random.Random(0)
    rollouts, needed = [], []
    for example in islice(sample_examples(BUSY, 0, held_out=held_out), _prompts(held_out)):
        words = sample_chain(example, BUSY, rng, example.pairs)
        rollouts.append(_reference(tokenizer, example, words))
        needed.append([name == "needed" for name in classify_tokens(example.row(), words)])
    return _with_effects(model, rollouts, needed)


def padded(tokenizer: Any, *, held_out: bool) -> tuple[list[Rollout], list[Rollout]]:
    """Chains of the asked pairs alone, and the same chains with `FILLERS` filler words in random places."""
    rng = random.Random(0)
    plain, filled = [], []
    for example in islice(sample_examples(LedgerConfig(), 0, held_out=held_out), _prompts(held_out)):
        words = [word for name in example.asked for word in (name, example.pairs[name])]
        longer = list(words)
        for _ in range(FILLERS):
            longer.insert(rng.randrange(len(longer) + 1), rng.choice(FILLER))
        plain.append(_reference(tokenizer, example, words))
        filled.append(_reference(tokenizer, example, longer))
    return plain, filled


def _prompts(held_out: bool) -> int:
    return PROMPTS if held_out else SEARCH_PROMPTS


def _reference(tokenizer: Any, example: Example, words: Sequence[str]) -> Rollout:
    parts = (tokenizer.encode(text, add_special_tokens=False) for text in (" ".join(words), example.answer, ANSWER))
    return Rollout(tokenizer.encode(example.prompt), *parts)


def reward_falls(
    model: PreTrainedModel, chains: tuple[list[Rollout], list[Rollout]], estimator: Estimator
) -> dict[str, Any]:
    """Share of the chains whose saliency reward the filler lowers, with its 95 % interval."""
    plain, filled = (saliency_reward(estimate_saliency(model, each, estimator, progress=False)) for each in chains)
    falls = (filled < plain).double().numpy()[:, None]
    replicates = bootstrap_ratios(falls, np.ones_like(falls))
    (found,) = estimates(falls.mean(0), replicates, n=len(falls))
    return asdict(found)


def _with_effects(model: PreTrainedModel, rollouts: list[Rollout], needed: list[list[bool]]) -> Chains:
    return Chains(
        rollouts,
        [np.array(each) for each in needed],
        _scores(model, rollouts, Suppression()),
        [each.numpy() for each in substitution_effects(model, rollouts)],
    )


def _scores(model: PreTrainedModel, rollouts: list[Rollout], estimator: Estimator) -> list[NDArray[np.float64]]:
    scored = estimate_saliency(model, rollouts, estimator, progress=False)
    return [item.scores.double().numpy() for item in scored]


def rate(model: PreTrainedModel, chains: Chains, estimator: Estimator) -> tuple[dict[str, Any], NDArray[np.float64]]:
    """An estimator's mean cost and curves, and its (rollouts, measures) values, NaN where one does not apply."""
    scores = _scores(model, chains.rollouts, estimator)
    curves = score_curves(model, chains.rollouts, scores, draws=0)
    values = [
        [
            auroc(score, needed),
            precision_at_k(score, needed),
            spearman(score, left_out),
            spearman(score, replaced),
            curve.comprehensiveness,
            curve.sufficiency,
        ]
        for score, needed, left_out, replaced, curve in zip(
            scores, chains.needed, chains.leave_one_out, chains.substitution, curves, strict=True
        )
    ]
    passes = np.mean([estimator.passes(rollout) for rollout in chains.rollouts], axis=0)
    facts = {
        "settings": {key: _json(value) for key, value in vars(estimator).items()},
        "forwards": float(passes[0]),
        "backwards": float(passes[1]),
        "deletion": np.mean([curve.deletion for curve in curves], axis=0).tolist(),
        "insertion": np.mean([curve.insertion for curve in curves], axis=0).tolist(),
    }
    return facts, np.array(values, dtype=np.float64)


def table(model: PreTrainedModel, chains: Chains, estimators: Mapping[str, Estimator]) -> dict[str, Any]:
    """Each estimator's measures with 95 % intervals, and their paired differences from the paper's mask."""
    rated = {name: rate(model, chains, estimator) for name, estimator in estimators.items()}
    values = np.concatenate([matrix for _, matrix in rated.values()], axis=1)
    replicates = bootstrap_ratios(np.nan_to_num(values), np.isfinite(values).astype(np.float64))
    means = np.nanmean(values, axis=0)
    columns = {name: slice(i * len(MEASURES), (i + 1) * len(MEASURES)) for i, name in enumerate(rated)}
    reference = columns["mask"]
    results = {}
    for name, (facts, _) in rated.items():
        own = columns[name]
        found = estimates(means[own], replicates[:, own], n=len(values))
        gaps = estimates(means[own] - means[reference], replicates[:, own] - replicates[:, reference], n=len(values))
        results[name] = {
            **facts,
            "measures": {key: asdict(value) for key, value in zip(MEASURES, found, strict=True)},
            "over_mask": {key: asdict(value) for key, value in zip(MEASURES, gaps, strict=True)},
        }
    return results


def chosen() -> dict[str, Estimator]:
    """Every estimator with its defaults, and FAI as far as chains of Ledger's length have later rows."""
    near = {"fai, horizon 3 to 100": FutureInfluence(SeriesConfig(horizon=(3, 100)))}
    return {name: make_estimator(name) for name in ESTIMATORS} | near


def variants() -> Iterator[tuple[str, Estimator]]:
    """What was tried: the paper's mask with other settings, depths, steps and prices."""
    yield "mask", Mask()
    for name in ("tenth", "quarter"):
        yield f"mask, {name}", Mask(MASK_PRESETS[name])
    for scale, sparsity in ((30.0, 0.0), (50.0, 0.0), (10.0, 0.02), (10.0, 0.1), (30.0, 0.05)):
        yield (
            f"mask, scale {scale:g}, sparsity {sparsity:g}",
            Mask(replace(MaskConfig(), scale=scale, sparsity=sparsity)),
        )
    for depth, steps in product((-4.0, -8.0, -15.0), (5, 10)):
        yield f"integrated, depth {depth:g}, {steps} nodes", Integrated(depth, steps)
    for steps in (9, 19):
        yield f"sparse, {steps} steps", SparseMask(steps=steps)
    for depth, sparsity, lr in product((-6.0, -10.0, -15.0), (0.03, 0.1, 0.3), (0.2, 0.5)):
        yield (
            f"sparse, depth {depth:g}, price {sparsity:g}, lr {lr:g}",
            SparseMask(depth=depth, sparsity=sparsity, lr=lr),
        )


def _json(value: Any) -> Any:
    if isinstance(value, MaskConfig | SeriesConfig):
        plain = type(value)()
        return {key: each for key, each in asdict(value).items() if each != getattr(plain, key)}
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", action="store_true", help="rate variants on training prompts")
    search = parser.parse_args(arguments).search
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT).eval()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    estimators = dict(variants()) if search else chosen()
    content: dict[str, Any] = {
        "device": processor(),
        "commit": commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "reward_falls": {},
        "sets": {},
    }
    path = results_file("estimator_search" if search else "estimators", content)
    pairs = padded(tokenizer, held_out=not search)
    for name, estimator in estimators.items():
        content["reward_falls"][name] = reward_falls(model, pairs, estimator)
    for draw in (sampled, busy):
        chains = draw(model, tokenizer, held_out=not search)
        tokens = sum(len(rollout.cot_ids) for rollout in chains.rollouts)
        content["sets"][draw.__name__] = {
            "rollouts": len(chains.rollouts),
            "tokens": tokens / len(chains.rollouts),
            "results": table(model, chains, estimators),
        }
        save(path, content)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
