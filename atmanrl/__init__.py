"""Saliency of a chain of thought, learned as an attention mask, and reinforcement learning on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atmanrl.config import MaskConfig
    from atmanrl.rollout import Rollout
    from atmanrl.saliency import ESTIMATORS, estimate_saliency, optimize_masks
    from atmanrl.training.rewards import saliency_reward

__all__ = ["ESTIMATORS", "MaskConfig", "Rollout", "estimate_saliency", "optimize_masks", "saliency_reward"]

_HOMES = {
    "ESTIMATORS": "atmanrl.saliency",
    "MaskConfig": "atmanrl.config",
    "Rollout": "atmanrl.rollout",
    "estimate_saliency": "atmanrl.saliency",
    "optimize_masks": "atmanrl.saliency",
    "saliency_reward": "atmanrl.training.rewards",
}


def __getattr__(name: str) -> Any:
    # Late, so that importing the package (for its version or its command line) does not load torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
