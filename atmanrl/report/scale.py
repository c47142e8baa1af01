"""Diverging colour scales: one that is fixed by what the score is, one fitted to the values of a page.

A fixed scale comes from how the score was computed, not from the values at hand, so that two pages can be compared by
eye. For the mask it is centred on what weight decay alone restores, 1 - (1 - lr * weight_decay) ** steps, and reaches
as far as ``steps`` steps of AdamW's nominal size ``lr`` move a token: steps * lr / |init|. With the paper's numbers
that is 0.00995 +- 0.5. A token at the centre is one that the answer's gradient did not move. AdamW's steps can exceed
``lr`` where gradients grow, so some values lie beyond the ends and take their colour. The sparse mask's reaches from -1
to 1. A score in nats is coloured by the share of the answer's probability that it stands for, 1 - exp(-|x|), which has
no end: half the colour at log 2 = 0.69 nats, all of it from 3 nats on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from atmanrl.config import MaskConfig
from atmanrl.evaluation.records import DELETION, RESTORED, Run

IN_NATS = frozenset({DELETION, "leave-one-out", "atman", "atman-concept", "integrated", "gradient"})
"""Scores that are a rise of the answer's mean negative log-likelihood."""
LEVELS = 10
"""Shades on each side of the centre."""


@dataclass(frozen=True)
class Scale:
    """Colours x = (value - centre) / reach.

    Attributes:
        centre, reach: in the score's unit.
        curve: "linear" colours by x from -1 to 1, beyond which it is that of the end; "share" by
            sign(x) (1 - exp(-|x|)).
    """

    centre: float
    reach: float
    curve: Literal["linear", "share"] = "linear"

    def __post_init__(self) -> None:
        if not self.reach > 0:
            raise ValueError(f"the scale's reach must be positive, got {self.reach}")

    def level(self, value: float) -> int:
        """Shade of a value: -LEVELS .. LEVELS, 0 at the centre."""
        x = (value - self.centre) / self.reach
        position = math.copysign(-math.expm1(-abs(x)), x) if self.curve == "share" else min(1.0, max(-1.0, x))
        # Halves upwards, as browsers round.
        return math.floor(LEVELS * position + 0.5)

    @property
    def ticks(self) -> tuple[float, ...]:
        """Values at even distances along the colours, from the lowest to the highest; the centre in the middle."""
        if self.curve == "linear":
            return self.centre - self.reach, self.centre, self.centre + self.reach
        # Where the last shade begins, and where half of the colour is reached.
        last, half = -math.log(0.5 / LEVELS), math.log(2)
        return tuple(self.centre + self.reach * x for x in (-last, -half, 0.0, half, last))

    def to_json(self) -> dict[str, Any]:
        """For the page's script."""
        return asdict(self)


def fixed_scale(runs: Iterable[Run], score: str) -> Scale | None:
    """The scale that follows from what the score is; None where its size depends on the chain's length (attention).

    The mask's follows from its configuration in ``settings["mask"]``, the paper's where a run does not say;
    configurations that differ share the widest.
    """
    if score == RESTORED:
        return max((_mask_scale(run.settings.get("mask") or {}) for run in runs), key=lambda scale: scale.reach)
    if score == "sparse-mask":
        return Scale(0.0, 1.0)
    return Scale(0.0, 1.0, "share") if score in IN_NATS else None


def fitted_scale(runs: Iterable[Run], score: str) -> Scale:
    """The scale whose end is the value of the largest magnitude; the centre is that of the fixed one, 0 without."""
    runs = list(runs)
    fixed = fixed_scale(runs, score)
    centre = 0.0 if fixed is None else fixed.centre
    values = (value for run in runs for rollout in run.rollouts for value in rollout.scores.get(score, ()))
    return Scale(centre, max((abs(value - centre) for value in values), default=0.0) or 1.0)


def scale_for(runs: Iterable[Run], score: str) -> Scale:
    """The fixed scale, or the fitted one where there is none."""
    runs = list(runs)
    return fixed_scale(runs, score) or fitted_scale(runs, score)


def _mask_scale(settings: Mapping[str, Any]) -> Scale:
    paper = MaskConfig()
    steps, lr, weight_decay, init = (
        settings.get(name, getattr(paper, name)) for name in ("steps", "lr", "weight_decay", "init")
    )
    centre = 1 - (1 - lr * weight_decay) ** steps
    # A fully re-enabled token stands at 1, however many steps were left.
    return Scale(centre, min(1 - centre, steps * lr / abs(init)) or 1.0)


@dataclass(frozen=True)
class Meaning:
    """Words for the scale's two ends and its centre, and a paragraph for the reader."""

    low: str
    centre: str
    high: str
    text: str


_MASK = Meaning(
    "pushed down",
    "not moved",
    "needed",
    "The chain of thought's tokens were suppressed in every attention layer, and one number per token was then "
    "optimised to bring the model's own answer back. Restored says how far a token was re-enabled: 0 is as "
    "suppressed as it started, 1 is fully enabled. The colours are fixed by the optimiser's settings, not by the "
    "values: no colour is what weight decay restores without any gradient; the ends are as far as the optimiser's"
    " steps go at their nominal size, and values beyond them take the end's colour. Where the answer's loss "
    "hardly rises under the initial mask, a mask has little to restore and its colours say little: compare the "
    "three losses beside each completion (no mask · initial mask → final mask).",
)
_SPARSE = Meaning(
    "in the way",
    "idle",
    "needed",
    "Every token of the chain of thought started enabled, and enabled tokens had a price. The score says how long"
    " a token stayed worth it to the model's own answer: 0 for one that left as an idle token does, 1 for one "
    "that never left, below 0 for one that the answer is better off without. The colours reach from -1 to 1 on "
    "every page.",
)
_NATS = Meaning(
    "in the way",
    "no effect",
    "needed",
    "The score is in nats of the answer's mean negative log-likelihood: how much the loss rises when the token is"
    " hidden, suppressed or, for gradients, would be by extrapolation. The fixed colours show the share 1 - exp(-x) "
    "of the answer's probability that a rise by x nats takes away: half the colour at 0.69 nats, all of it from 3.",
)
_ATTENTION = Meaning(
    "",
    "none",
    "looked at most",
    "The score is a share of attention, from 0 to 1; how large it is depends on how many tokens there are, so the "
    "colours reach to the largest one on this page.",
)
_OTHER = Meaning("lower", "zero", "higher", "The colours reach to the score's largest magnitude on this page.")

_MEANINGS = {RESTORED: _MASK, "sparse-mask": _SPARSE, "attention": _ATTENTION, "fai": _ATTENTION}
_MEANINGS |= dict.fromkeys(IN_NATS, _NATS)


def meaning_of(score: str) -> Meaning:
    """The meaning of the score of that name."""
    return _MEANINGS.get(score, _OTHER)
