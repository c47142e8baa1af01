"""Percentile bootstrap over prompts for ratios of sums, paired by construction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
