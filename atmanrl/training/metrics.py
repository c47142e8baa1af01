"""What a batch of rollouts and of optimised masks contributes to the training log.

Functions return the single values, of rollouts or tokens. They are averaged where all processes' values are there, so
that a process with few values does not weigh as much as one with many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from atmanrl.saliency import TokenScores

Values = Mapping[str, Sequence[float]]


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
