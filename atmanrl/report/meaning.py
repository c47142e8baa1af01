"""What a score says, in the words that stand under the colours and in the page's explanation."""

from __future__ import annotations

from dataclasses import dataclass

from atmanrl.evaluation.records import RESTORED
from atmanrl.report.scale import IN_NATS


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
    """What the score of that name says."""
    return _MEANINGS.get(score, _OTHER)
