"""The saliency reward: how much of a chain of thought the answer made the mask restore."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from atmanrl.rollout import Rollout

Direction = Literal["restored", "printed"]
Reduction = Literal["causal", "tokens"]


class Salient(Protocol):
    """A rollout with numbers per chain-of-thought token: of a mask, or of any other estimator."""

    @property
    def rollout(self) -> Rollout: ...

    @property
    def restored(self) -> Tensor: ...

    @property
    def normalized(self) -> Tensor: ...

    @property
    def skipped(self) -> str | None: ...


def saliency_reward(
    result: Sequence[Salient], direction: Direction = "restored", reduction: Reduction = "causal"
) -> Tensor:
    """R_sal = weighted mean over a rollout's CoT tokens of 1 - H / init ("restored") or of H / init ("printed").

    Args:
        result: what :func:`atmanrl.optimize_masks` or :func:`atmanrl.estimate_saliency` returned, n rollouts.
        direction: "restored" rewards tokens that the answer needed re-enabled, as the paper's prose says; "printed"
            rewards those it did not, as its Eqs. 3-5 are printed.
        reduction: "causal" weights CoT token i = 0..T-1 by T + K + N - i (K marker and N answer tokens), the number
            of rows from its own up to the last answer token's, both included: Eq. 3's mean over the lower triangle,
            where column v is seen by the rows v..n and so weighs n - v + 1. "tokens" is the plain mean.

    Returns:
        (n,) float32 on the CPU; 0 for a rollout for which nothing was optimised, in both directions.

    Raises:
        ValueError: for an unknown direction or reduction.

    Source: AtManRL (arXiv 2604.16158), Eq. 3.
    """
    if direction not in get_args(Direction):
        raise ValueError(f"unknown direction {direction!r}; choose one of {get_args(Direction)}")
    if reduction not in get_args(Reduction):
        raise ValueError(f"unknown reduction {reduction!r}; choose one of {get_args(Reduction)}")
    return torch.tensor([_reward(item, direction, reduction) for item in result], dtype=torch.float32)


def _reward(item: Salient, direction: Direction, reduction: Reduction) -> float:
    if item.skipped is not None:
        return 0.0
    values = (item.restored if direction == "restored" else item.normalized).double()
    if reduction == "tokens":
        return float(values.mean())
    weights = causal_weights(item)
    return float((weights * values).sum() / weights.sum())


def causal_weights(item: Salient) -> Tensor:
    """(T,) float64: the rows that see each CoT token's column, T + K + N - i for token i."""
    rows = len(item.rollout.completion_ids)
    return rows - torch.arange(len(item.rollout.cot_ids), dtype=torch.float64)
