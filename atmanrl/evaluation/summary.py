"""Headline numbers of one run, and the paired comparison of two."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from atmanrl.evaluation.records import (
    CLASSES,
    NEEDED,
    RESTORED,
    RolloutRecord,
    Run,
    paired_rollouts,
    write_text_atomically,
)

Floats = NDArray[np.float64]


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation, ties at their mean rank; NaN where either side is constant or has one value.

    Args:
        a, b: (n,) numbers; of each only the order counts.

    Raises:
        ValueError: if the lengths differ.
    """
    x, y = _pair(a, b)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(stats.spearmanr(x, y).statistic)


def auroc(scores: ArrayLike, truth: ArrayLike) -> float:
    """Probability that a true token scores above a false one, ties counted half; NaN where one kind is missing.

    Args:
        scores: (n,) numbers.
        truth: (n,) booleans, or numbers that are true above 0.

    Raises:
        ValueError: if the lengths differ.
    """
    values, labels = _pair(scores, truth)
    true, false = values[labels > 0], values[labels <= 0]
    if not len(true) or not len(false):
        return float("nan")
    return float(stats.mannwhitneyu(true, false, method="asymptotic").statistic / (len(true) * len(false)))


def precision_at_k(scores: ArrayLike, truth: ArrayLike, k: int | None = None) -> float:
    """Share of true tokens among the k highest scores; k is the number of true tokens where None.

    Tokens tied at the border count with the share of them that fits. NaN where k is 0.

    Args:
        scores, truth: as of `auroc`.
        k: how many of the highest scores are looked at.

    Raises:
        ValueError: if the lengths differ or k exceeds them.
    """
    values, labels = _pair(scores, truth)
    positive = labels > 0
    k = int(positive.sum()) if k is None else k
    if k > len(values):
        raise ValueError(f"k is {k}, but there are {len(values)} tokens")
    if k == 0:
        return float("nan")
    border = np.sort(values)[-k]
    above, tied = values > border, values == border
    share = (k - above.sum()) / tied.sum()
    return float(((positive & above).sum() + share * (positive & tied).sum()) / k)


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"need two sequences of one length, got shapes {x.shape} and {y.shape}")
    return x, y


CONFIDENCE = 0.95
RESAMPLES = 10_000
# Replicates drawn at once: bounds the memory of the (block, prompts) table of draw counts.
_BLOCK = 500


@dataclass(frozen=True)
class Estimate:
    """A value with its interval.

    ``value`` is None where nothing was counted; ``low`` and ``high`` are None where no interval can be formed, which
    takes at least two prompts.
    """

    value: float | None
    low: float | None = None
    high: float | None = None


def bootstrap_ratios(
    numerators: NDArray[np.float64],
    denominators: NDArray[np.float64],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Replicates of sum(numerators) / sum(denominators), prompts drawn with replacement.

    All columns share each replicate's draw of prompts, so the difference of two columns' replicates is the paired
    bootstrap of the difference (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).

    Args:
        numerators: (n, m) float64, summed over a prompt's completions.
        denominators: (n, m) float64, likewise.
        resamples: number of replicates.
        seed: of the draws; equal seeds and n give equal draws.

    Returns:
        (resamples, m) float64; NaN where a replicate's denominator is 0.

    Raises:
        ValueError: if the shapes differ or there is no prompt.
    """
    if numerators.shape != denominators.shape or numerators.ndim != 2:
        raise ValueError(f"need two (n, m) arrays, got {numerators.shape} and {denominators.shape}")
    n = len(numerators)
    if n == 0:
        raise ValueError("the bootstrap needs at least one prompt")
    rng = np.random.default_rng(seed)
    replicates = []
    for start in range(0, resamples, _BLOCK):
        counts = rng.multinomial(n, np.full(n, 1.0 / n), size=min(_BLOCK, resamples - start)).astype(np.float64)
        replicates.append(divide(counts @ numerators, counts @ denominators))
    return np.concatenate(replicates)


def estimates(
    values: NDArray[np.float64], replicates: NDArray[np.float64], *, n: int, confidence: float = CONFIDENCE
) -> list[Estimate]:
    """Values (m,) with the central ``confidence`` interval of their replicates (resamples, m).

    With fewer than two prompts (``n``) every replicate is the sample itself, and there is no interval. A replicate
    without anything to count is left out.
    """
    tail = 100 * (1 - confidence) / 2
    result = []
    for value, column in zip(values, replicates.T, strict=True):
        defined = column[~np.isnan(column)]
        if np.isnan(value) or n < 2 or not len(defined):
            result.append(Estimate(None if np.isnan(value) else float(value)))
            continue
        low, high = np.percentile(defined, [tail, 100 - tail])
        result.append(Estimate(float(value), float(low), float(high)))
    return result


def divide(numerators: NDArray[np.float64], denominators: NDArray[np.float64]) -> NDArray[np.float64]:
    """Elementwise quotient, NaN where the denominator is 0."""
    quotients = np.full(numerators.shape, np.nan)
    np.divide(numerators, denominators, out=quotients, where=denominators != 0)
    return quotients


SATURATED_LOSS = 0.01
"""Answer loss under the initial mask, in nats per token, below which a mask has nothing to restore: its values are then
decided by rounding (fp32 and fp64 give different masks), not by the answer."""

AGREEMENT = "deletion_spearman"
"""Name of the measure: rank correlation of a run's score with the deletion effects, within a completion."""

_WORTH_A_WARNING = 0.25

_LABELS = {AGREEMENT: "rank correlation with deletion"}
_Count = Callable[..., tuple[float, float]]


@dataclass(frozen=True)
class Metric:
    """A ratio of sums over prompts: ``count(rollouts)`` gives the numerator and denominator of one prompt's rollouts.

    Attributes:
        name: key in files.
        label: what a reader sees.
        unit: "%" for shares (values in 0..1, shown times 100), else the unit's name, "" where the label says it.
        count: (numerator, denominator); (0, 0) where the metric does not apply.
    """

    name: str
    label: str
    unit: str
    count: Callable[[Sequence[RolloutRecord]], tuple[float, float]]


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

    @property
    def warning(self) -> str:
        """A warning about masks that had nothing to restore; "" if there are few."""
        row = next((row for row in self.rows if row.name == "saturated"), None)
        shares = [] if row is None else [estimate.value or 0.0 for estimate in row.runs]
        if not shares or max(shares) < _WORTH_A_WARNING:
            return ""
        listed = " and ".join(f"{share:.0%} ({label})" for share, label in zip(shares, self.labels, strict=True))
        return (
            f"In {listed} of the completions the initial mask leaves the answer's loss below {SATURATED_LOSS} nats per "
            f"token: there was nothing to restore, and these masks say little about which tokens matter."
        )

    def save(self, path: str | Path) -> None:
        """Write the summary as JSON, atomically."""
        data = {"format": "atmanrl.summary", "version": 1, **asdict(self)}
        write_text_atomically(path, json.dumps(data, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def summarize(run: Run, *, seed: int = 0, resamples: int = RESAMPLES, confidence: float = CONFIDENCE) -> Summary:
    """Every metric of one run with its percentile bootstrap interval over prompts.

    Args:
        run: completions with scores.
        seed: of the resampling.
        resamples: number of replicates.
        confidence: of the intervals, in (0, 1).
    """
    return _summary((run.label,), [run.rollouts], run.score, seed, resamples, confidence)


def compare(
    before: Run, after: Run, *, seed: int = 0, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> Summary:
    """Every metric of two runs over the prompts they share, and the paired difference after - before.

    Args:
        before, after: runs scored by the same score.
        seed, resamples, confidence: as of `summarize`; the same replicates on both sides.

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
    """The token classes that occur, in the order of `CLASSES`."""
    found = {name for rollout in rollouts for name in rollout.classes}
    known = [name for name in CLASSES if name in found]
    return known + sorted(found.difference(known))


def metrics(
    classes: Sequence[str],
    score: str = RESTORED,
    *,
    graded: bool = True,
    samples: int = 1,
    measures: Sequence[str] = (),
) -> list[Metric]:
    """The metrics of a run whose tokens fall into ``classes``, with the accuracy where answers were ``graded``,
    and pass@k for k = 2, 4, ... and n = ``samples`` completions per prompt.

    Where the task knows which tokens are needed, the score is also rated by how well it finds them: AUROC and
    precision at k (k the number of needed tokens), means over completions. ``measures`` are means over the completions
    that have them.

    Means over tokens are pooled: a long chain of thought weighs more than a short one. The summed score per chain of
    thought stands beside the means because deleting tokens raises a mean without making any token matter more.
    """
    classes = classes if len(classes) > 1 else ()

    def metric(name: str, label: str, unit: str, count: _Count, /, **fixed: Any) -> Metric:
        return Metric(name, label, unit, partial(_summed, count=partial(count, **fixed)))

    rows = [
        metric("cot_tokens", "CoT length", "tokens", lambda rollout: (len(rollout.cot), 1)),
        *(metric(f"{name}_tokens", f"{name} per CoT", "tokens", _tokens_of_class, name=name) for name in classes),
        metric("truncated", "truncated", "%", lambda rollout: (rollout.truncated, 1)),
        metric("unanswered", "no answer found", "%", lambda rollout: (rollout.predicted is None, 1)),
        metric(f"{score}_mean", f"mean {score}", "", _mean_score, score=score, name=None),
        *(metric(f"{score}_{name}", f"{score}, {name}", "", _mean_score, score=score, name=name) for name in classes),
        metric(f"{score}_mass", f"summed {score} per CoT", "", _summed_score, score=score),
    ]
    if graded:
        passed = [Metric(f"pass_at_{k}", f"pass@{k}", "%", partial(_passed, k=k)) for k in _passes(samples)]
        rows = [metric("accuracy", "accuracy", "%", _accuracy), *passed, *rows]
    if score == RESTORED:
        rows.append(metric("saturated", "masks with nothing to restore", "%", _saturated))
    if NEEDED in classes:
        rows += [
            metric(f"{score}_auroc", f"AUROC of {score}", "", _recovery, score=score, measure=auroc),
            metric(f"{score}_precision", f"precision@k of {score}", "", _recovery, score=score, measure=precision_at_k),
        ]
    for name in measures:
        unit = "%" if "accuracy" in name or name.endswith("_unchanged") else ""
        label = _LABELS.get(name, name.replace("_", " "))
        rows.append(metric(name, label, unit, _measure, name=name))
    return rows


def _summed(rollouts: Sequence[RolloutRecord], count: _Count) -> tuple[float, float]:
    counts = [count(rollout) for rollout in rollouts]
    return sum(numerator for numerator, _ in counts), sum(denominator for _, denominator in counts)


def _passes(samples: int) -> list[int]:
    """2, 4, 8, ... up to the number of samples, and that number."""
    return sorted({2**i for i in range(1, samples.bit_length())} | {samples} - {1})


def _passed(rollouts: Sequence[RolloutRecord], k: int) -> tuple[float, float]:
    # The unbiased estimate from n samples with c correct ones (Chen et al., arXiv 2107.03374, Eq. 1).
    n, correct = len(rollouts), sum(bool(rollout.correct) for rollout in rollouts)
    return 1 - math.comb(n - correct, k) / math.comb(n, k), 1


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


def _saturated(rollout: RolloutRecord) -> tuple[float, float]:
    return (0, 0) if rollout.loss is None else (rollout.loss.initial < SATURATED_LOSS, 1)


def _recovery(
    rollout: RolloutRecord, score: str, measure: Callable[[Sequence[float], Sequence[bool]], float]
) -> tuple[float, float]:
    values = rollout.scores.get(score)
    if not values or not rollout.classes:
        return 0, 0
    found = measure(values, [name == NEEDED for name in rollout.classes])
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
    sides = [[rollout for rollout in side if not rollout.unusable] for side in sides]
    everything = [rollout for side in sides for rollout in side]
    if not everything:
        raise ValueError(f"{labels[0]!r} holds no rollouts: nothing to summarise")
    graded = any(rollout.correct is not None for rollout in everything)
    measures = list(dict.fromkeys(name for rollout in everything for name in rollout.measures))
    columns = metrics(
        token_classes(everything), score, graded=graded, samples=_samples(everything, len(sides)), measures=measures
    )
    prompts = list(dict.fromkeys(rollout.prompt_id for rollout in sides[0]))
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
    rollouts: Sequence[RolloutRecord], prompts: Sequence[str], columns: Sequence[Metric]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    completions: dict[str, list[RolloutRecord]] = {prompt_id: [] for prompt_id in prompts}
    for rollout in rollouts:
        completions[rollout.prompt_id].append(rollout)
    counts = np.array([[metric.count(group) for metric in columns] for group in completions.values()], dtype=np.float64)
    return counts[..., 0], counts[..., 1]


def _samples(rollouts: Sequence[RolloutRecord], sides: int) -> int:
    """Completions per prompt and run; 1 where prompts have different numbers of them."""
    numbers = {count / sides for count in Counter(rollout.prompt_id for rollout in rollouts).values()}
    return int(numbers.pop()) if len(numbers) == 1 else 1
