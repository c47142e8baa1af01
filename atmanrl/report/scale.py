"""The fixed diverging colour scale of a score.

The scale comes from how the score was computed, not from the values at hand, so that two pages can be compared by eye.
For the mask it is centred on what weight decay alone restores, 1 - (1 - lr * weight_decay) ** steps, and reaches as far
as ``steps`` steps of AdamW's nominal size ``lr`` move a token: steps * lr / |init|. With the paper's numbers that is
0.00995 +- 0.5. A token at the centre is one that the answer's gradient did not move. AdamW's steps can exceed ``lr``
where gradients grow, so some values lie beyond the ends and take their colour.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from atmanrl.config import MaskConfig
from atmanrl.records import RESTORED, Run

_SPARSE_MASK = "sparse-mask"
LEVELS = 10
"""Shades on each side of the centre."""


@dataclass(frozen=True)
class Scale:
    """Colours values from ``centre - reach`` to ``centre + reach``; values beyond take the end's colour."""

    centre: float
    reach: float

    def __post_init__(self) -> None:
        if not self.reach > 0:
            raise ValueError(f"the scale's reach must be positive, got {self.reach}")

    def level(self, value: float) -> int:
        """Shade of a value: -LEVELS .. LEVELS, 0 at the centre."""
        position = (value - self.centre) / self.reach
        return round(LEVELS * min(1.0, max(-1.0, position)))

    @property
    def ticks(self) -> tuple[float, float, float]:
        """Lowest value, centre and highest value."""
        return self.centre - self.reach, self.centre, self.centre + self.reach


def scale_for(runs: Iterable[Run]) -> Scale:
    """The scale shared by runs of one score.

    For the mask it follows from the mask's configuration in ``settings["mask"]``, the paper's where a run does not say;
    configurations that differ share the widest. The sparse mask's reaches from -1 to 1. Any other score is centred on 0
    and reaches its largest magnitude.
    """
    runs = list(runs)
    if all(run.score == _SPARSE_MASK for run in runs):
        return Scale(0.0, 1.0)
    if all(run.score == RESTORED for run in runs):
        return max((_mask_scale(run.settings.get("mask") or {}) for run in runs), key=lambda scale: scale.reach)
    values = (value for run in runs for rollout in run.rollouts for value in rollout.scores.get(run.score, ()))
    return Scale(0.0, max((abs(value) for value in values), default=0.0) or 1.0)


def _mask_scale(settings: Mapping[str, Any]) -> Scale:
    paper = MaskConfig()
    steps, lr, weight_decay, init = (
        settings.get(name, getattr(paper, name)) for name in ("steps", "lr", "weight_decay", "init")
    )
    centre = 1 - (1 - lr * weight_decay) ** steps
    # A fully re-enabled token stands at 1, however many steps were left.
    return Scale(centre, min(1 - centre, steps * lr / abs(init)) or 1.0)
