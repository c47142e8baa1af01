"""The saliency reward, and the numbers that a batch of rollouts and of its scores adds to the training log.

The log takes the single values, of rollouts or tokens. They are averaged where all processes' values are there, so that
a process with few values does not weigh as much as one with many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from atmanrl.rollout import Rollout
from atmanrl.saliency import TokenScores

Direction = Literal["restored", "printed"]
Reduction = Literal["causal", "tokens"]
Values = Mapping[str, Sequence[float]]


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


def log_values(log_metric: Callable[[str, float], None], values: Values) -> None:
    """Hand every value to TRL's ``log_metric``, which sums and counts over all processes."""
    for name, column in values.items():
        for value in column:
            log_metric(name, float(value))


def mask_metrics(masks: Sequence[TokenScores]) -> dict[str, list[float]]:
    """The masks' losses (nats per answer token), where the estimator sees them, and what they restored.

    ``mask/restored_mass`` has sum_v (1 - H_v / init) of each rollout, or another estimator's
    `TokenScores.restored`, ``mask/restored`` the value of every token. A
    reward that is a mean per token also rises when unsalient tokens go; the mass does not.
    """
    losses = {
        f"mask/{name}": [value for item in masks if not math.isnan(value := getattr(item, name))]
        for name in ("loss_initial", "loss_final", "loss_unmasked")
    }
    return losses | {
        "mask/restored_mass": [float(item.restored.sum()) for item in masks],
        "mask/restored": [value for item in masks for value in item.restored.tolist()],
    }


def tokens_per_class(classes: Sequence[Sequence[str]], names: Sequence[str]) -> dict[str, list[float]]:
    """``cot/<class>``: the class's tokens in each chain of thought, for each of ``names``.

    Args:
        classes: the class of each chain-of-thought token, per rollout.
        names: all classes there are.
    """
    return {f"cot/{name}": [list(tokens).count(name) for tokens in classes] for name in names}


def restored_per_class(
    masks: Sequence[TokenScores], classes: Sequence[Sequence[str]], names: Sequence[str]
) -> dict[str, list[float]]:
    """``mask/restored/<class>``: 1 - H / init of each of the class's tokens."""
    restored: dict[str, list[float]] = {f"mask/restored/{name}": [] for name in names}
    for item, tokens in zip(masks, classes, strict=True):
        # A task that knows no classes names none.
        for name, value in zip(tokens, item.restored.tolist(), strict=bool(names)):
            restored[f"mask/restored/{name}"].append(value)
    return restored
