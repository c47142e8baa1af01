"""Interventions on a recorded run: its tokens' deletion effects and its completions' faithfulness, added to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atmanrl.evaluation.agreement import spearman
from atmanrl.evaluation.faithfulness import (
    EarlyAnswering,
    ScoreCurves,
    added_mistakes,
    early_answering,
    filler_substitution,
    score_curves,
)
from atmanrl.evaluation.interventions import Outcome, Variant, outcomes
from atmanrl.evaluation.recording import decimals
from atmanrl.evaluation.records import DELETION, DELETIONS, RolloutRecord, Run
from atmanrl.evaluation.summary import AGREEMENT
from atmanrl.rollout import Rollout
from atmanrl.saliency import Estimator, estimate_saliency

# What stands in for a chain of thought, repeated to its length.
FILLER = " ."


def with_scores(
    model: PreTrainedModel, run: Run, estimator: str | Estimator, name: str, *, progress: bool | None = None
) -> Run:
    """The run with one more score per token wherever there is a chain of thought and an answer.

    Args:
        model: whose answers are explained.
        run: recorded completions.
        estimator: see `estimate_saliency`.
        name: of the score in `RolloutRecord.scores`; one of that name is replaced.
        progress: show progress bars on stderr; default: if stderr is a terminal.
    """
    rollouts = _rollouts(run)
    found = estimate_saliency(model, list(rollouts.values()), estimator, progress=progress)
    scores = {i: {name: decimals(item.scores)} for i, item in zip(rollouts, found, strict=True)}
    records = [
        replace(item, scores={**item.scores, **scores[i]}) if i in scores else item
        for i, item in enumerate(run.rollouts)
    ]
    return replace(run, rollouts=tuple(records))


def with_deletion_effects(model: PreTrainedModel, run: Run, *, progress: bool | None = None) -> Run:
    """The run with a score ``DELETION`` beside its others, and with the measure ``AGREEMENT``.

    The measure is the rank correlation of the run's own score with the deletion effects within each completion, where
    that score is another one and neither is constant.

    Args:
        model: what the run's rollouts are read by.
        run: rollouts with an answer; the others stay as they are.
        progress: show a bar; None: where stderr is a terminal.
    """
    run = with_scores(model, run, "leave-one-out", DELETION, progress=progress)
    if run.score in DELETIONS:
        return run
    return replace(run, rollouts=tuple(_rated(item, run.score) for item in run.rollouts))


def _rated(item: RolloutRecord, score: str) -> RolloutRecord:
    if DELETION not in item.scores or score not in item.scores:
        return item
    agreement = spearman(item.scores[score], item.scores[DELETION])
    return replace(item, measures={**item.measures, **_named({AGREEMENT: agreement}, "")})


def with_faithfulness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: Run, *, seed: int = 0, prefix: str = ""
) -> Run:
    """The run with faithfulness measures per completion (`RolloutRecord.measures`).

    Of the chain of thought: ``early_answering_aoc``, ``causal_influence``, ``no_cot_unchanged``, ``filler_unchanged``
    and ``mistake_unchanged`` (see `atmanrl.evaluation.faithfulness`), and ``accuracy_no_cot``, whether greedy decoding
    writes the
    ground truth without a chain of thought. A mistake changes a token with a digit, or any token where there is none,
    to another one of that kind in the run. Of the run's score, where there is one: ``comprehensiveness`` and
    ``sufficiency`` with what random tokens reach.

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
    mistaken = _mistakes(model, run, rollouts, seed)
    measured: dict[int, dict[str, float]] = {
        i: _of_the_chain(cut) | {"filler_unchanged": float(other.unchanged)} | _mean_unchanged(mistakes)
        for i, cut, other, mistakes in zip(rollouts, early, replaced, mistaken, strict=True)
    }
    for i, correct in _correct_without_chain(model, tokenizer, run, rollouts).items():
        measured[i]["accuracy_no_cot"] = float(correct)
    scored = {i: rollout for i, rollout in rollouts.items() if run.score in run.rollouts[i].scores}
    curves = score_curves(model, list(scored.values()), [run.rollouts[i].scores[run.score] for i in scored], seed=seed)
    for i, curve in zip(scored, curves, strict=True):
        measured[i] |= _of_the_score(curve)
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


def _mistakes(model: PreTrainedModel, run: Run, rollouts: Mapping[int, Rollout], seed: int) -> list[list[Outcome]]:
    numbers = {i: [any(c.isdigit() for c in text) for text in run.rollouts[i].cot.texts] for i in rollouts}
    by_digits = any(any(digits) for digits in numbers.values())
    places = [
        [place for place, has_digit in enumerate(digits) if has_digit or not by_digits] for digits in numbers.values()
    ]
    pool = sorted({rollout.cot_ids[i] for rollout, own in zip(rollouts.values(), places, strict=True) for i in own})
    return added_mistakes(model, list(rollouts.values()), places, pool, seed=seed)


def _mean_unchanged(mistakes: Sequence[Outcome]) -> dict[str, float]:
    if not mistakes:
        return {}
    return {"mistake_unchanged": sum(outcome.unchanged for outcome in mistakes) / len(mistakes)}


def _correct_without_chain(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: Run, rollouts: Mapping[int, Rollout]
) -> dict[int, bool]:
    variants: dict[int, Variant] = {}
    for i, rollout in rollouts.items():
        item = run.rollouts[i]
        if item.expected is None:
            continue
        answer = rollout.answer_ids
        if not item.correct:
            # Written as the completion wrote its own answer: with the space before it, if there was one.
            space = item.answer.text[: len(item.answer.text) - len(item.answer.text.lstrip())]
            answer = tuple(tokenizer.encode(space + item.expected, add_special_tokens=False))
        variants[i] = Variant(replace(rollout, cot_ids=(), answer_ids=answer))
    found = outcomes(model, list(variants.values()))
    return {i: outcome.unchanged for i, outcome in zip(variants, found, strict=True)}


def _of_the_chain(early: EarlyAnswering) -> dict[str, float]:
    return {
        "early_answering_aoc": early.area_over_curve,
        "causal_influence": early.causal_influence,
        "no_cot_unchanged": float(early.unchanged[0]),
    }


def _of_the_score(curves: ScoreCurves) -> dict[str, float]:
    return {
        "comprehensiveness": curves.comprehensiveness,
        "random_comprehensiveness": curves.random_comprehensiveness,
        "sufficiency": curves.sufficiency,
        "random_sufficiency": curves.random_sufficiency,
    }


def _named(values: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {f"{prefix}{name}": value for name, value in values.items() if math.isfinite(value)}
