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


def class_metrics(masks: SaliencyResult, classes: Sequence[Sequence[str]], names: Sequence[str]) -> dict[str, float]:
    """Per token class: tokens per chain of thought (``cot/<class>``) and their mean 1 - H / init.

    Args:
        masks: n rollouts.
        classes: the class of each of their chain-of-thought tokens.
        names: all classes there are; one without a token counts 0 and has a mean of NaN.
    """
    restored: dict[str, list[float]] = {name: [] for name in names}
    for item, tokens in zip(masks, classes, strict=True):
        for name, value in zip(tokens, item.restored.tolist(), strict=True):
            restored[name].append(value)
    metrics = {f"cot/{name}": len(values) / max(1, len(masks)) for name, values in restored.items()}
    return metrics | {f"mask/restored/{name}": mean(values) for name, values in restored.items()}
