"""Gradients of the answer's loss by the key bias, at one point or along a path: a fixed number of passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from atmanrl.rollout import Rollout
from atmanrl.saliency.estimators.batches import Batch, score_in_batches
from atmanrl.saliency.estimators.interface import Passes, TokenScores, scored_in_nats

Path = Literal["bias", "weight"]


@dataclass(frozen=True)
class Gradient:
    """score_v = -dL / d key_bias_v at no bias, in nats per unit of log attention weight.

    To first order, how much the answer's loss rises when the token's attention weight falls by a factor e.
    """

    @property
    def name(self) -> str:
        """ "gradient"."""
        return "gradient"

    def passes(self, rollout: Rollout) -> Passes:
        """One forward and one backward."""
        return Passes(1, 1)

    def __call__(
        self, model: PreTrainedModel, rollouts: Sequence[Rollout], *, token_budget: int | None, progress: bool
    ) -> list[TokenScores]:
        """See `Estimator`."""

        def score(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            losses, slope = loss_and_gradient(batch, batch.filled(0.0))
            return -slope, {"loss_unmasked": losses}

        return score_batches(self, score, model, rollouts, token_budget=token_budget, progress=progress)


@dataclass(frozen=True)
class Integrated:
    """score_v = -integral of dL / d key_bias_v along the path on which all tokens rise from suppressed to free.

    The scores of a rollout sum to L(suppressed) - L(free), up to the error of the quadrature (completeness).

    Attributes:
        depth: the bias at the path's start, natural-log units, negative.
        steps: nodes of the Gauss-Legendre quadrature.
        path: "bias" moves the bias itself evenly; "weight" moves the attention weight's factor exp(bias) evenly, which
            spends more of the nodes near the free end.
        calibrate: let each rollout start where uniform suppression raises its loss by this share of what
            ``depth`` raises it by, in (0, 1], found by bisection; None: at ``depth``.
        bisections: forwards of that search.

    Raises:
        ValueError: for a depth that is not negative, no steps, an unknown path, or a share outside (0, 1].

    Source: integrated gradients (arXiv 1703.01365), with the key bias in place of the input.
    """

    depth: float = -8.0
    steps: int = 5
    path: Path = "bias"
    calibrate: float | None = None
    bisections: int = 6

    def __post_init__(self) -> None:
        if not self.depth < 0:
            raise ValueError(f"depth must be negative, got {self.depth}")
        if self.steps < 1 or self.bisections < 1:
            raise ValueError(f"steps and bisections must be at least 1, got {self.steps} and {self.bisections}")
        if self.path not in get_args(Path):
            raise ValueError(f"path must be one of {', '.join(get_args(Path))}, got {self.path!r}")
        if self.calibrate is not None and not 0 < self.calibrate <= 1:
            raise ValueError(f"calibrate must lie in (0, 1] or be None, got {self.calibrate}")

    @property
    def name(self) -> str:
        """ "integrated"."""
        return "integrated"

    def passes(self, rollout: Rollout) -> Passes:
        """A forward and a backward per node, and two forwards for the ends; the search's forwards where it is on."""
        return Passes(self.steps + 2 + (0 if self.calibrate is None else self.bisections), self.steps)

    def __call__(
        self, model: PreTrainedModel, rollouts: Sequence[Rollout], *, token_budget: int | None, progress: bool
    ) -> list[TokenScores]:
        """See `Estimator`."""
        return score_batches(self, self._score, model, rollouts, token_budget=token_budget, progress=progress)

    def _score(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        free = batch.filled(0.0)
        with torch.no_grad():
            unmasked, deepest = batch.losses(free), batch.losses(free + self.depth)
            depth = torch.full_like(unmasked, self.depth)
            if self.calibrate is not None:
                depth = calibrated_depth(
                    batch, unmasked, unmasked + self.calibrate * (deepest - unmasked), self.depth, self.bisections
                )
        nodes, weights = np.polynomial.legendre.leggauss(self.steps)
        total = torch.zeros_like(free)
        for node, weight in zip((1 + nodes) / 2, weights / 2, strict=True):
            bias, speed = self._point(float(node), depth)
            _, slope = loss_and_gradient(batch, batch.per_token(bias))
            total -= float(weight) * batch.per_token(speed) * slope
        return total, {"loss_initial": deepest, "loss_unmasked": unmasked, "loss_final": unmasked}

    def _point(self, t: float, depth: Tensor) -> tuple[Tensor, Tensor]:
        """(bias, d bias / dt) of each rollout at 0 <= t <= 1."""
        if self.path == "bias":
            return (1 - t) * depth, -depth
        lowest = depth.exp()
        factor = lowest + t * (1 - lowest)
        return factor.log(), (1 - lowest) / factor


def loss_and_gradient(batch: Batch, cot_bias: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) losses and (C_total,) d(sum of losses) / d bias at ``cot_bias``."""
    cot_bias = cot_bias.detach().requires_grad_()
    with torch.enable_grad():
        losses = batch.losses(cot_bias)
        (slope,) = torch.autograd.grad(losses.sum(), [cot_bias])
    return losses.detach(), slope


def calibrated_depth(batch: Batch, unmasked: Tensor, wanted: Tensor, deepest: float, bisections: int) -> Tensor:
    """(n,) the uniform bias, between ``deepest`` and 0, under which each rollout's loss is about ``wanted`` (n,)."""
    low, high = torch.full_like(unmasked, deepest), torch.zeros_like(unmasked)
    with torch.no_grad():
        for _ in range(bisections):
            middle = (low + high) / 2
            above = batch.losses(batch.per_token(middle)) > wanted
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


def score_batches(
    estimator: Gradient | Integrated,
    score: Callable[[Batch], tuple[Tensor, dict[str, Tensor]]],
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    *,
    token_budget: int | None,
    progress: bool,
) -> list[TokenScores]:
    """Run ``score``, which gives (C_total,) nats and named (n,) losses, on packed batches of ``rollouts``."""

    def named(batch: Batch) -> list[TokenScores]:
        nats, losses = score(batch)
        parts = nats.detach().split(batch.packed.cot_lengths)
        columns = {key: values.tolist() for key, values in losses.items()}
        return [
            scored_in_nats(estimator.name, rollout, part, **{key: values[i] for key, values in columns.items()})
            for i, (rollout, part) in enumerate(zip(batch.rollouts, parts, strict=True))
        ]

    return score_in_batches(
        model,
        rollouts,
        named,
        token_budget=token_budget,
        progress=progress,
        what=estimator.name,
        passes=round(estimator.passes(rollouts[0]).forward),
    )
