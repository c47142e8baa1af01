"""Numbers as a reader sees them."""

from __future__ import annotations

from atmanrl.evaluation.intervals import Estimate
from atmanrl.evaluation.summary import Summary

_NONE = "–"


def number(value: float | None, unit: str = "", *, sign: bool = False) -> str:
    """A value with a sensible number of digits, shares times 100 (the unit stands in the label); "–" for None.

    Numbers without a unit below 0.001 keep two significant digits.
    """
    if value is None:
        return _NONE
    if unit == "%":
        value *= 100
    if not unit and 0 < abs(value) < 0.001:
        return f"{value:{'+' if sign else ''}.2g}".replace("-", "−")
    digits = 1 if unit == "%" else 2 if unit or abs(value) >= 1 else 3
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def interval(estimate: Estimate, unit: str = "", *, sign: bool = False) -> str:
    """The interval as "[low, high]", "" where there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"[{number(estimate.low, unit, sign=sign)}, {number(estimate.high, unit, sign=sign)}]"


def loss(value: float) -> str:
    """A loss with two significant digits, which may span many orders of magnitude."""
    return f"{value:.2g}"


def tick(value: float) -> str:
    """A value on a colour scale, which may span any range, with two significant digits."""
    return f"{value:.2g}".replace("-", "−")


def counted(count: int, noun: str) -> str:
    """ "1 token", "2 tokens"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def footnote(summary: Summary) -> str:
    """How many prompts and completions there were, and what the intervals are."""
    paired = ", paired differences" if len(summary.labels) == 2 else ""
    return (
        f"{counted(summary.prompts, 'prompt')}, {counted(summary.rollouts, 'completion')} per run; "
        f"{summary.confidence:.0%} percentile bootstrap intervals over prompts, {summary.resamples} resamples{paired}"
    )
