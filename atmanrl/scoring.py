"""Interventions on a recorded run: its tokens' deletion effects and its completions' faithfulness, added to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atmanrl.agreement import spearman
from atmanrl.faithfulness import EarlyAnswering, ScoreCurves, early_answering, filler_substitution, score_curves
from atmanrl.records import RolloutRecord, Run
from atmanrl.rollouts import Rollout
from atmanrl.saliency.estimators import estimate_saliency

DELETION = "deletion"
"""Name of the score: rise of the answer's mean negative log-likelihood (nats) when the token is hidden."""

# What stands in for a chain of thought, repeated to its length.
FILLER = " ."


def with_deletion_effects(model: PreTrainedModel, run: Run) -> Run:
    """The run with a score ``DELETION`` beside its others wherever there is a chain of thought and an answer."""
    rollouts = _rollouts(run)
    effects = estimate_saliency(model, list(rollouts.values()), "leave-one-out")
    scores = {i: {DELETION: tuple(item.scores.tolist())} for i, item in zip(rollouts, effects, strict=True)}
    records = [
        replace(item, scores={**item.scores, **scores[i]}) if i in scores else item
        for i, item in enumerate(run.rollouts)
    ]
    return replace(run, rollouts=tuple(records))


def with_faithfulness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: Run, *, seed: int = 0, prefix: str = ""
) -> Run:
    """The run with faithfulness measures per completion (`RolloutRecord.measures`).

    Of the chain of thought: ``early_answering_aoc``, ``causal_influence``, ``no_cot_unchanged`` and
    ``filler_unchanged`` (see `atmanrl.faithfulness`). Of the run's score, where there is one: ``comprehensiveness`` and
    ``sufficiency`` with what random tokens reach, and ``deletion_spearman``, its rank correlation with the deletion
    effects where the run holds them.

    Args:
        model: whose answers are probed: the run's own, or the initial model to hold the reader fixed.
        tokenizer: its tokenizer.
        run: recorded completions.
        seed: of the random orders.
        prefix: put before the measures' names, so that one run can hold those under several models.
    """
    rollouts = _rollouts(run)
    items = list(rollouts.values())
    filler = tokenizer.encode(FILLER, add_special_tokens=False)
    early = early_answering(model, items)
    replaced = filler_substitution(model, items, filler)
    measured: dict[int, dict[str, float]] = {
        i: _of_the_chain(cut) | {"filler_unchanged": float(other.unchanged)}
        for i, cut, other in zip(rollouts, early, replaced, strict=True)
    }
    scored = {i: rollout for i, rollout in rollouts.items() if run.score in run.rollouts[i].scores}
    curves = score_curves(model, list(scored.values()), [run.rollouts[i].scores[run.score] for i in scored], seed=seed)
    for i, curve in zip(scored, curves, strict=True):
        measured[i] |= _of_the_score(run.rollouts[i], run.score, curve)
    records = [
        replace(item, measures={**item.measures, **_named(measured[i], prefix)}) if i in measured else item
        for i, item in enumerate(run.rollouts)
    ]
    return replace(run, rollouts=tuple(records))


def _rollouts(run: Run) -> dict[int, Rollout]:
    return {
        i: Rollout(item.prompt.ids, item.cot.ids, item.answer.ids, item.marker.ids)
        for i, item in enumerate(run.rollouts)
        if len(item.cot) and len(item.answer)
    }


def _of_the_chain(early: EarlyAnswering) -> dict[str, float]:
    return {
        "early_answering_aoc": early.area_over_curve,
        "causal_influence": early.causal_influence,
        "no_cot_unchanged": float(early.unchanged[0]),
    }


def _of_the_score(item: RolloutRecord, score: str, curves: ScoreCurves) -> dict[str, float]:
    values = {
        "comprehensiveness": curves.comprehensiveness,
        "random_comprehensiveness": curves.random_comprehensiveness,
        "sufficiency": curves.sufficiency,
        "random_sufficiency": curves.random_sufficiency,
    }
    if DELETION in item.scores and score != DELETION:
        values["deletion_spearman"] = spearman(item.scores[score], item.scores[DELETION])
    return values


def _named(values: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {f"{prefix}{name}": value for name, value in values.items() if math.isfinite(value)}
