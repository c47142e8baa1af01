"""What a batch of optimised masks is summarised to in the training log."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from atmanrl.saliency import SaliencyResult


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean, NaN for no values (TRL leaves NaN out of its averages)."""
    values = list(values)
    return statistics.fmean(values) if values else float("nan")


def mask_metrics(masks: SaliencyResult) -> dict[str, float]:
    """Means over rollouts of the mask's losses (nats per answer token) and of what it restored.

    ``mask/restored_mass`` is the mean over rollouts of sum_v (1 - H_v / init), ``mask/restored`` the mean over all
    tokens. A reward that is a mean per token also rises when unsalient tokens go; the mass does not.
    """
    return {
        "mask/loss_initial": mean(item.loss_initial for item in masks),
        "mask/loss_final": mean(item.loss_final for item in masks),
        "mask/loss_unmasked": mean(item.loss_unmasked for item in masks),
        "mask/restored_mass": mean(float(item.restored.sum()) for item in masks),
        "mask/restored": mean(value for item in masks for value in item.restored.tolist()),
    }


def tokens_per_class(classes: Sequence[Sequence[str]], names: Sequence[str]) -> dict[str, float]:
    """``cot/<class>``: the class's tokens per chain of thought, for each of ``names``.

    Args:
        classes: the class of each chain-of-thought token, per rollout.
        names: all classes there are.
    """
    return {f"cot/{name}": mean(tokens.count(name) for tokens in map(list, classes)) for name in names}


def restored_per_class(
    masks: SaliencyResult, classes: Sequence[Sequence[str]], names: Sequence[str]
) -> dict[str, float]:
    """``mask/restored/<class>``: the mean 1 - H / init of the class's tokens; NaN for a class without a token."""
    restored: dict[str, list[float]] = {name: [] for name in names}
    for item, tokens in zip(masks, classes, strict=True):
        # A task that knows no classes names none.
        for name, value in zip(tokens, item.restored.tolist(), strict=bool(names)):
            restored[name].append(value)
    return {f"mask/restored/{name}": mean(values) for name, values in restored.items()}
