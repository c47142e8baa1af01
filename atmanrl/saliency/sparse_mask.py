"""A mask in a box with an L1 price on what stays enabled: how long a token stays in use when that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atmanrl.rollout import Rollout
from atmanrl.saliency.batches import Batch, in_batches
from atmanrl.saliency.packing import whole
from atmanrl.saliency.scores import Passes, TokenScores, Trajectory


@dataclass(frozen=True)
class SparseMask:
    """Sparse mask: argmin over m in [0, 1]^T of L(m) + sparsity * |m|_1. The score says how long a token is enabled.

    The key bias is depth * (1 - m_v). All tokens start enabled, m = 1. A step of each rollout goes down its gradient
    divided by the gradient's largest magnitude, which keeps the ratios between tokens; clipping to the box follows.
    One extra token per rollout is invisible to the loss, so only the price moves it. With the means of m
    over the steps, which tell early leavers from late ones, score_v = (m_v - m_idle) / (1 - m_idle), at least -1: 1 for
    a token that never left, 0 for one that left like an idle one.

    Attributes:
        depth: bias of a token at m = 0, natural-log units, negative.
        sparsity: nats per enabled token, positive.
        steps, lr: steps, and how far each moves the token with the largest gradient.
        record_every: keep m and the loss every so many steps as the trajectory, None: not at all.

    Raises:
        ValueError: for a depth that is not negative, no steps, sparsity or lr <= 0, or recording every 0 steps.
    """

    depth: float = -10.0
    sparsity: float = 0.1
    steps: int = 9
    lr: float = 0.3
    record_every: int | None = None

    def __post_init__(self) -> None:
        if not self.depth < 0:
            raise ValueError(f"depth must be negative, got {self.depth}")
        if self.steps < 1 or not self.lr > 0 or not self.sparsity > 0:
            raise ValueError(
                f"need steps >= 1, lr > 0 and sparsity > 0, got {self.steps}, {self.lr} and {self.sparsity}"
            )
        if self.record_every is not None and self.record_every < 1:
            raise ValueError(f"record_every must be at least 1, got {self.record_every}")

    @property
    def name(self) -> str:
        """ "sparse-mask"."""
        return "sparse-mask"

    def passes(self, rollout: Rollout) -> Passes:
        """A forward and a backward per step, and two forwards for the losses without a mask and at the end."""
        return Passes(self.steps + 2, self.steps)

    def __call__(
        self, model: PreTrainedModel, rollouts: Sequence[Rollout], *, token_budget: int | None, progress: bool
    ) -> list[TokenScores]:
        """See `Estimator`."""
        found = in_batches(
            model,
            [whole(rollout) for rollout in rollouts],
            self._optimize,
            token_budget=token_budget,
            progress=progress,
            what=self.name,
            passes=self.steps + 2,
        )
        return list(found)

    def _optimize(self, batch: Batch) -> list[TokenScores]:
        tokens, rollouts = len(batch.packed.cot_columns), len(batch.rollouts)
        start = batch.filled(1.0)
        # Each rollout's idle token stands behind all others.
        enabled = torch.cat([start, start.new_ones(rollouts)])
        no_slope = start.new_zeros(rollouts)
        owner = torch.arange(rollouts, device=start.device)
        owner = torch.cat([batch.per_token(owner), owner])
        with torch.no_grad():
            unmasked = batch.losses(torch.zeros_like(start))
        mean = torch.zeros_like(enabled)
        records: list[tuple[int, Tensor, Tensor]] = []
        for step in range(self.steps):
            losses, slope = batch.losses_and_gradient(self.depth * (1 - enabled[:tokens]))
            if step == 0 or (self.record_every and step % self.record_every == 0):
                records.append((step, enabled[:tokens], losses))
            gradient = torch.cat([-self.depth * slope, no_slope]) + self.sparsity
            length = self.lr / no_slope.scatter_reduce(0, owner, gradient.abs(), "amax")
            enabled = (enabled - length[owner] * gradient).clamp(0, 1)
            mean += enabled / self.steps
        with torch.no_grad():
            final = batch.losses(self.depth * (1 - enabled[:tokens]))
        records.append((self.steps, enabled[:tokens], final))
        values, idle = mean.split([tokens, rollouts])
        idle = batch.per_token(idle)
        scores = ((values - idle) / (1 - idle)).clamp(min=-1).cpu().split(batch.packed.cot_lengths)
        columns = zip(records[0][2].tolist(), final.tolist(), unmasked.tolist(), strict=True)
        trajectories: Sequence[Trajectory | None] = [None] * rollouts
        if self.record_every is not None:
            trajectories = batch.trajectories(records)
        return [
            TokenScores(self.name, rollout, score, score.clamp(min=0), *losses, trajectory=own)
            for rollout, score, losses, own in zip(batch.rollouts, scores, columns, trajectories, strict=True)
        ]
