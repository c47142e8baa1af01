"""Headline numbers of one run, and the paired comparison of two."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atmanrl.agreement import auroc, precision_at_k
from atmanrl.intervals import CONFIDENCE, RESAMPLES, Estimate, bootstrap_ratios, divide, estimates
from atmanrl.records import RESTORED, RolloutRecord, Run, paired_rollouts, write_text_atomically

# The built-in task's classes in reading order; classes of other tasks follow alphabetically.
_NEEDED = "needed"
_CLASS_ORDER = (_NEEDED, "filler", "other")


@dataclass(frozen=True)
class Metric:
    """A ratio of sums over rollouts: ``count(rollout)`` gives one rollout's numerator and denominator.

    Attributes:
        name: key in files.
        label: what a reader sees.
        unit: "%" for shares (values in 0..1, shown times 100), else the unit's name, "" where the label says it.
        count: (numerator, denominator) of a rollout; (0, 0) where the metric does not apply.
    """

    name: str
    label: str
    unit: str
    count: Callable[[RolloutRecord], tuple[float, float]]


@dataclass(frozen=True)
class Row:
    """One metric's estimates: one per run, and for two runs the paired difference second minus first."""

    name: str
    label: str
    unit: str
    runs: tuple[Estimate, ...]
    difference: Estimate | None = None


@dataclass(frozen=True)
class Summary:
    """Metrics of one run, or of two over the prompts both answered.

    Attributes:
        labels: the runs' labels.
        prompts: number of prompts, the unit that is resampled.
        rollouts: number of completions per run.
        confidence, resamples, seed: of the intervals.
        rows: one per metric.
    """

    labels: tuple[str, ...]
    prompts: int
    rollouts: int
    confidence: float
    resamples: int
    seed: int
    rows: tuple[Row, ...]

    def __getitem__(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def save(self, path: str | Path) -> None:
        """Write the summary as JSON, atomically."""
        data = {"format": "atmanrl.summary", "version": 1, **asdict(self)}
        write_text_atomically(path, json.dumps(data, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def summarize(run: Run, *, seed: int = 0, resamples: int = RESAMPLES, confidence: float = CONFIDENCE) -> Summary:
    """Every metric of one run with its percentile bootstrap interval over prompts."""
    return _summary((run.label,), [run.rollouts], run.score, seed, resamples, confidence)


def compare(
    before: Run, after: Run, *, seed: int = 0, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> Summary:
    """Every metric of two runs over the prompts they share, and the paired difference after - before.

    Raises:
        ValueError: if the runs share no prompt, or are scored by different scores.
    """
    if before.score != after.score:
        raise ValueError(
            f"{before.label!r} is scored by {before.score!r}, {after.label!r} by {after.score!r}: not comparable"
        )
    pairs = paired_rollouts(before, after)
    sides = [[pair[0] for pair in pairs], [pair[1] for pair in pairs]]
    return _summary((before.label, after.label), sides, before.score, seed, resamples, confidence)


def token_classes(rollouts: Iterable[RolloutRecord]) -> list[str]:
    """The token classes that occur, the built-in task's first."""
    found = {name for rollout in rollouts for name in rollout.classes}
    known = [name for name in _CLASS_ORDER if name in found]
    return known + sorted(found.difference(known))


def metrics(
    classes: Sequence[str], score: str = RESTORED, *, graded: bool = True, measures: Sequence[str] = ()
) -> list[Metric]:
    """The metrics of a run whose tokens fall into ``classes``, with the accuracy where answers were ``graded``.

    Where the task knows which tokens are needed, the score is also rated by how well it finds them: AUROC and
    precision at k (k the number of needed tokens), means over completions. ``measures`` are means over the completions
    that have them.

    Means over tokens are pooled: a long chain of thought weighs more than a short one. The summed score per chain of
    thought stands beside the means because deleting tokens raises a mean without making any token matter more.
    """
    classes = classes if len(classes) > 1 else ()
    rows = [
        Metric("cot_tokens", "CoT length", "tokens", lambda rollout: (len(rollout.cot), 1)),
        *(
            Metric(f"{name}_tokens", f"{name} per CoT", "tokens", partial(_tokens_of_class, name=name))
            for name in classes
        ),
        Metric("truncated", "truncated", "%", lambda rollout: (rollout.truncated, 1)),
        Metric("unanswered", "no answer found", "%", lambda rollout: (rollout.predicted is None, 1)),
        Metric(f"{score}_mean", f"mean {score}", "", partial(_mean_score, score=score, name=None)),
        *(
            Metric(f"{score}_{name}", f"{score}, {name}", "", partial(_mean_score, score=score, name=name))
            for name in classes
        ),
        Metric(f"{score}_mass", f"summed {score} per CoT", "", partial(_summed_score, score=score)),
    ]
    if _NEEDED in classes:
        rows += [
            Metric(f"{score}_auroc", f"AUROC of {score}", "", partial(_recovery, score=score, measure=auroc)),
            Metric(
                f"{score}_precision",
                f"precision@k of {score}",
                "",
                partial(_recovery, score=score, measure=precision_at_k),
            ),
        ]
    for name in measures:
        unit = "%" if name.endswith("_unchanged") else ""
        rows.append(Metric(name, name.replace("_", " "), unit, partial(_measure, name=name)))
    if graded:
        rows.insert(0, Metric("accuracy", "accuracy", "%", _accuracy))
    return rows


def _accuracy(rollout: RolloutRecord) -> tuple[float, float]:
    return (0, 0) if rollout.correct is None else (rollout.correct, 1)


def _tokens_of_class(rollout: RolloutRecord, name: str) -> tuple[float, float]:
    return rollout.classes.count(name), 1


def _mean_score(rollout: RolloutRecord, score: str, name: str | None) -> tuple[float, float]:
    values = rollout.scores.get(score, ())
    if name is not None:
        values = tuple(v for v, token_class in zip(values, rollout.classes, strict=False) if token_class == name)
    return sum(values), len(values)


def _summed_score(rollout: RolloutRecord, score: str) -> tuple[float, float]:
    values = rollout.scores.get(score)
    return (0, 0) if values is None else (sum(values), 1)


def _recovery(
    rollout: RolloutRecord, score: str, measure: Callable[[Sequence[float], Sequence[bool]], float]
) -> tuple[float, float]:
    values = rollout.scores.get(score)
    if not values or not rollout.classes:
        return 0, 0
    found = measure(values, [name == _NEEDED for name in rollout.classes])
    return (0, 0) if math.isnan(found) else (found, 1)


def _measure(rollout: RolloutRecord, name: str) -> tuple[float, float]:
    return (rollout.measures[name], 1) if name in rollout.measures else (0, 0)


def _summary(
    labels: tuple[str, ...],
    sides: Sequence[Sequence[RolloutRecord]],
    score: str,
    seed: int,
    resamples: int,
    confidence: float,
) -> Summary:
    everything = [rollout for side in sides for rollout in side]
    if not everything:
        raise ValueError(f"{labels[0]!r} holds no rollouts: nothing to summarise")
    graded = any(rollout.correct is not None for rollout in everything)
    measures = list(dict.fromkeys(name for rollout in everything for name in rollout.measures))
    columns = metrics(token_classes(everything), score, graded=graded, measures=measures)
    prompts = {prompt_id: i for i, prompt_id in enumerate(dict.fromkeys(rollout.prompt_id for rollout in sides[0]))}
    counts = [_counts_per_prompt(side, prompts, columns) for side in sides]
    numerators = np.concatenate([count[0] for count in counts], axis=1)
    denominators = np.concatenate([count[1] for count in counts], axis=1)
    values = divide(numerators.sum(0), denominators.sum(0))
    replicates = bootstrap_ratios(numerators, denominators, resamples=resamples, seed=seed)
    n, m = len(prompts), len(columns)
    per_run = [
        estimates(values[i : i + m], replicates[:, i : i + m], n=n, confidence=confidence)
        for i in range(0, m * len(sides), m)
    ]
    differences: list[Estimate] | list[None] = [None] * m
    if len(sides) == 2:
        differences = estimates(
            values[m:] - values[:m], replicates[:, m:] - replicates[:, :m], n=n, confidence=confidence
        )
    rows = tuple(
        Row(metric.name, metric.label, metric.unit, tuple(run[i] for run in per_run), differences[i])
        for i, metric in enumerate(columns)
    )
    return Summary(labels, n, len(sides[0]), confidence, resamples, seed, rows)


def _counts_per_prompt(
    rollouts: Sequence[RolloutRecord], prompts: dict[str, int], columns: Sequence[Metric]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    numerators, denominators = np.zeros((2, len(prompts), len(columns)))
    for rollout in rollouts:
        for j, metric in enumerate(columns):
            numerator, denominator = metric.count(rollout)
            numerators[prompts[rollout.prompt_id], j] += numerator
            denominators[prompts[rollout.prompt_id], j] += denominator
    return numerators, denominators
