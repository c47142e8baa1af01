"""Gradients of the answer's loss by the key bias, at one point or along a path: a fixed number of passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from atmanrl.rollout import Rollout
from atmanrl.saliency.batches import Batch, in_batches
from atmanrl.saliency.packing import whole
from atmanrl.saliency.scores import Passes, TokenScores, scored_in_nats


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
        segments = [whole(rollout) for rollout in rollouts]
        found = in_batches(
            model, segments, self._score, token_budget=token_budget, progress=progress, what=self.name, passes=1
        )
        return list(found)

    def _score(self, batch: Batch) -> list[TokenScores]:
        losses, slope = batch.losses_and_gradient(batch.filled(0.0))
        return _in_nats(self.name, batch, -slope, {"loss_unmasked": losses})


@dataclass(frozen=True)
class Integrated:
    """score_v = -integral of dL / d key_bias_v along the path on which the bias of all tokens rises evenly to 0.

    The scores of a rollout sum to L(suppressed) - L(free), up to the error of the quadrature (completeness).

    Attributes:
        depth: the bias at the path's start, natural-log units, negative.
        steps: nodes of the Gauss-Legendre quadrature.

    Raises:
        ValueError: for a depth that is not negative, or no steps.

    Source: integrated gradients (arXiv 1703.01365), with the key bias in place of the input.
    """

    depth: float = -8.0
    steps: int = 5

    def __post_init__(self) -> None:
        if not self.depth < 0:
            raise ValueError(f"depth must be negative, got {self.depth}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    @property
    def name(self) -> str:
        """ "integrated"."""
        return "integrated"

    def passes(self, rollout: Rollout) -> Passes:
        """A forward and a backward per node, and two forwards for the ends."""
        return Passes(self.steps + 2, self.steps)

    def __call__(
        self, model: PreTrainedModel, rollouts: Sequence[Rollout], *, token_budget: int | None, progress: bool
    ) -> list[TokenScores]:
        """See `Estimator`."""
        found = in_batches(
            model,
            [whole(rollout) for rollout in rollouts],
            self._score,
            token_budget=token_budget,
            progress=progress,
            what=self.name,
            passes=self.steps + 2,
        )
        return list(found)

    def _score(self, batch: Batch) -> list[TokenScores]:
        free = batch.filled(0.0)
        with torch.no_grad():
            unmasked, deepest = batch.losses(free), batch.losses(free + self.depth)
        nodes, weights = np.polynomial.legendre.leggauss(self.steps)
        total = torch.zeros_like(free)
        for node, weight in zip((1 + nodes) / 2, weights / 2, strict=True):
            _, slope = batch.losses_and_gradient(free + (1 - float(node)) * self.depth)
            total += float(weight) * self.depth * slope
        losses = {"loss_initial": deepest, "loss_unmasked": unmasked, "loss_final": unmasked}
        return _in_nats(self.name, batch, total, losses)


def _in_nats(name: str, batch: Batch, nats: Tensor, losses: Mapping[str, Tensor]) -> list[TokenScores]:
    """One :class:`TokenScores` per rollout from (C_total,) nats and named (n,) losses."""
    columns = {key: values.tolist() for key, values in losses.items()}
    parts = nats.detach().split(batch.packed.cot_lengths)
    return [
        scored_in_nats(name, rollout, part, **{key: values[i] for key, values in columns.items()})
        for i, (rollout, part) in enumerate(zip(batch.rollouts, parts, strict=True))
    ]
