"""How well a score per token agrees with another, or with a known truth."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation, ties at their mean rank; NaN where either side is constant or has one value.

    Args:
        a, b: (n,) numbers; of each only the order counts.

    Raises:
        ValueError: if the lengths differ.
    """
    x, y = _pair(a, b)
    if len(x) < 2:
        return float("nan")
    rx, ry = ranks(x), ranks(y)
    rx, ry = rx - rx.mean(), ry - ry.mean()
    norm = np.sqrt((rx @ rx) * (ry @ ry))
    return float(rx @ ry / norm) if norm else float("nan")


def auroc(scores: ArrayLike, truth: ArrayLike) -> float:
    """Probability that a true token scores above a false one, ties counted half; NaN where one kind is missing.

    Args:
        scores: (n,) numbers.
        truth: (n,) booleans, or numbers that are true above 0.

    Raises:
        ValueError: if the lengths differ.
    """
    values, labels = _pair(scores, truth)
    positive = labels > 0
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        return float("nan")
    above = ranks(values)[positive].sum() - n_positive * (n_positive + 1) / 2
    return float(above / (n_positive * n_negative))


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


def ranks(values: ArrayLike) -> Floats:
    """Ranks from 1, ties at their mean rank."""
    array = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank: Floats = last - (counts - 1) / 2
    return mean_rank[inverse]


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"need two sequences of one length, got shapes {x.shape} and {y.shape}")
    return x, y
