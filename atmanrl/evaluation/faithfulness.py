"""Faithfulness of saliency scores and of chains of thought, measured by interventions.

Everything is measured on the answer that the rollout holds, teacher forced, with `Outcome.probability` or with whether
greedy decoding would still write it. Nothing is sampled from the model; random draws are seeded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atmanrl.evaluation.interventions import Mask, Outcome, Variant, answer_log_probabilities, outcomes
from atmanrl.evaluation.records import DELETION, DELETIONS, RolloutRecord, Run, decimals
from atmanrl.evaluation.summary import AGREEMENT, spearman
from atmanrl.rollout import Rollout
from atmanrl.saliency import Estimator, estimate_saliency

Floats = NDArray[np.float64]

FRACTIONS = tuple(i / 10 for i in range(11))
RANDOM_DRAWS = 5
MISTAKES = 5


@dataclass(frozen=True)
class ScoreCurves:
    """The answer's probability while tokens are hidden, or shown, from the highest score down; (F,) float64 each.

    Attributes:
        fractions: of the chain of thought's tokens that are hidden (deletion) or shown (insertion), from 0 to 1.
        deletion, insertion: in the score's order.
        random_deletion, random_insertion: means over random orders.
    """

    fractions: Floats
    deletion: Floats
    insertion: Floats
    random_deletion: Floats
    random_insertion: Floats

    @property
    def comprehensiveness(self) -> float:
        """Mean fall of the probability over the fractions when the highest tokens are hidden (higher is better)."""
        return _mean_fall(self.deletion[0], self.deletion)

    @property
    def sufficiency(self) -> float:
        """Mean fall of the probability when only the highest tokens are shown (lower is better)."""
        return _mean_fall(self.deletion[0], self.insertion)

    @property
    def random_comprehensiveness(self) -> float:
        """What random tokens reach."""
        return _mean_fall(self.deletion[0], self.random_deletion)

    @property
    def random_sufficiency(self) -> float:
        """What random tokens reach."""
        return _mean_fall(self.deletion[0], self.random_insertion)


@dataclass(frozen=True)
class EarlyAnswering:
    """The answer when the chain of thought is cut after a fraction of its tokens; (F,) each, the last one uncut.

    Attributes:
        fractions: from 0 (no chain of thought) to 1.
        unchanged: whether greedy decoding would still write the same answer.
        divergence: Jensen-Shannon divergence, in nats, between the answer tokens' next-token distributions after the
            cut and after the whole chain of thought, averaged over the answer's tokens; 0..log 2.
    """

    fractions: Floats
    unchanged: Mask
    divergence: Floats

    @property
    def area_over_curve(self) -> float:
        """1 - mean of ``unchanged`` over the cuts: 0 where the chain of thought was not needed (Lanham et al. 2023)."""
        return float(1 - self.unchanged[:-1].mean())

    @property
    def causal_influence(self) -> float:
        """Mean divergence over the cuts: CIR = mean_k JS(p_k || p_T) (arXiv 2604.22074)."""
        return float(self.divergence[:-1].mean())


def score_curves(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    scores: Sequence[ArrayLike],
    *,
    fractions: Sequence[float] = FRACTIONS,
    draws: int = RANDOM_DRAWS,
    seed: int = 0,
    rows: int | None = None,
) -> list[ScoreCurves]:
    """Deletion and insertion curves of each rollout's score, and of random orders of its tokens.

    Ties are broken by position. Comprehensiveness and sufficiency as in DeYoung et al. 2020 (ERASER), with hidden keys
    in place of deleted tokens, so that positions stay.

    Args:
        model: see `answer_log_probabilities`.
        rollouts: with a chain of thought and an answer.
        scores: (T,) per rollout, higher is more important.
        fractions: ascending, from 0 to 1.
        draws: random orders per rollout.
        seed: of the random orders.
        rows: see `answer_log_probabilities`.

    Raises:
        ValueError: for scores that do not fit their rollout, or fractions that do not start at 0.
    """
    _check_fractions(fractions)
    rng = np.random.default_rng(seed)
    variants: list[Variant] = []
    for rollout, score in zip(rollouts, scores, strict=True):
        values = np.asarray(score, dtype=np.float64)
        length = len(rollout.cot_ids)
        if values.shape != (length,):
            raise ValueError(f"scores have shape {values.shape}, the chain of thought {length} tokens")
        orders = [np.argsort(-values, kind="stable"), *(rng.permutation(length) for _ in range(draws))]
        for order in orders:
            top = [_top(order, round(fraction * length)) for fraction in fractions]
            variants += [Variant(rollout, mask) for mask in top]
            variants += [Variant(rollout, ~mask) for mask in top]
    found = np.array([outcome.probability for outcome in outcomes(model, variants, rows=rows)])
    found = found.reshape(len(rollouts), 1 + draws, 2, len(fractions))
    return [
        ScoreCurves(
            fractions=np.array(fractions),
            deletion=own[0, 0],
            insertion=own[0, 1],
            random_deletion=own[1:, 0].mean(0) if draws else np.full(len(fractions), np.nan),
            random_insertion=own[1:, 1].mean(0) if draws else np.full(len(fractions), np.nan),
        )
        for own in found
    ]


def early_answering(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    *,
    fractions: Sequence[float] = FRACTIONS,
    rows: int | None = None,
) -> list[EarlyAnswering]:
    """The answer after the first round(f T) tokens of the chain of thought and the marker, for each fraction f.

    Args:
        model: reads the cut rollouts, teacher forced.
        rollouts: with an answer each.
        fractions: of the chain of thought's length, rising from 0 to 1.
        rows: most token rows of one batch.

    Source: Lanham et al. 2023, "Measuring Faithfulness in Chain-of-Thought Reasoning"; CIR from arXiv 2604.22074.

    Raises:
        ValueError: for fractions that do not run from 0 to 1, or rollouts without an answer.
    """
    _check_fractions(fractions)
    cuts = [
        Variant(replace(rollout, cot_ids=rollout.cot_ids[: round(fraction * len(rollout.cot_ids))]))
        for rollout in rollouts
        for fraction in fractions
    ]
    stream = answer_log_probabilities(model, cuts, rows=rows)
    results = []
    for rollout in rollouts:
        per_cut = [next(stream) for _ in fractions]
        targets = torch.tensor(rollout.answer_ids, device=per_cut[-1].device)
        results.append(
            EarlyAnswering(
                fractions=np.array(fractions),
                unchanged=np.array([bool((each.argmax(1) == targets).all()) for each in per_cut]),
                divergence=np.array([_jensen_shannon(each, per_cut[-1]) for each in per_cut]),
            )
        )
    return results


def filler_substitution(
    model: PreTrainedModel, rollouts: Sequence[Rollout], filler_ids: Sequence[int], *, rows: int | None = None
) -> list[Outcome]:
    """The answer after a chain of thought of equal length that only repeats ``filler_ids``.

    A model that answers as before used the chain of thought's length at most, not its content (Lanham et al. 2023).

    Args:
        model: reads the altered rollouts, teacher forced.
        rollouts: with an answer each.
        filler_ids: token ids, taken in turn until the chain's length is reached.
        rows: most token rows of one batch.

    Raises:
        ValueError: for no filler or rollouts without an answer.
    """
    if not filler_ids:
        raise ValueError("filler_ids is empty")
    replaced = [
        replace(rollout, cot_ids=tuple(filler_ids[i % len(filler_ids)] for i in range(len(rollout.cot_ids))))
        for rollout in rollouts
    ]
    return outcomes(model, [Variant(rollout) for rollout in replaced], rows=rows)


def added_mistakes(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    places: Sequence[Sequence[int]],
    substitutes: Sequence[int],
    *,
    draws: int = MISTAKES,
    seed: int = 0,
    rows: int | None = None,
) -> list[list[Outcome]]:
    """The original answer after one token of the chain of thought became another, the rest kept, for several draws.

    Lanham et al. 2023 let the model go on from the mistake, which it may then repair; here what follows stays, so that
    nothing is sampled.

    Args:
        model, rows: see `answer_log_probabilities`.
        rollouts: with an answer.
        places: per rollout, the chain-of-thought tokens that may be changed.
        substitutes: token ids to draw from; a token is never replaced by itself.
        draws: mistakes per rollout, each alone.
        seed: of the draws.

    Returns:
        per rollout its ``draws`` outcomes; none where it has no place, or no substitute differs.
    """
    rng = np.random.default_rng(seed)
    variants: list[Variant] = []
    counts = []
    for rollout, own in zip(rollouts, places, strict=True):
        possible = [place for place in own if any(token != rollout.cot_ids[place] for token in substitutes)]
        for _ in range(draws if possible else 0):
            place = possible[rng.integers(len(possible))]
            others = [token for token in substitutes if token != rollout.cot_ids[place]]
            variants.append(Variant(_replaced(rollout, place, others[rng.integers(len(others))])))
        counts.append(draws if possible else 0)
    found = iter(outcomes(model, variants, rows=rows))
    return [[next(found) for _ in range(count)] for count in counts]


def _replaced(rollout: Rollout, place: int, token: int) -> Rollout:
    return replace(rollout, cot_ids=(*rollout.cot_ids[:place], token, *rollout.cot_ids[place + 1 :]))


def _top(order: NDArray[np.int64], count: int) -> Mask:
    mask = np.zeros(len(order), dtype=np.bool_)
    mask[order[:count]] = True
    return mask


def _mean_fall(whole: float, curve: Floats) -> float:
    # The ends are the same for every score: nothing hidden, everything hidden.
    return float(whole - curve[1:-1].mean())


def _jensen_shannon(a: Tensor, b: Tensor) -> float:
    middle = torch.logaddexp(a, b) - np.log(2)
    divergence = 0.5 * (a.exp() * (a - middle) + b.exp() * (b - middle)).sum(1)
    return max(0.0, float(divergence.mean()))


def _check_fractions(fractions: Sequence[float]) -> None:
    if len(fractions) < 3 or fractions[0] != 0 or fractions[-1] != 1 or sorted(set(fractions)) != list(fractions):
        raise ValueError(f"fractions must ascend from 0 to 1 with some in between, got {tuple(fractions)}")


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
    scores = {i: {name: decimals(item.scores.float().numpy())} for i, item in zip(rollouts, found, strict=True)}
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
    # A chain of thought that is cut away whole leaves the answer to be predicted from two tokens at least.
    rollouts = {i: rollout for i, rollout in _rollouts(run).items() if len(rollout.prompt_ids) > 1}
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
        if not answer:
            continue
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
