"""Masks that are optimised: the paper's, and one in a box with an L1 price on what stays enabled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atmanrl.config import MaskConfig
from atmanrl.rollout import Rollout
from atmanrl.saliency.engine import optimize_masks
from atmanrl.saliency.estimators.batches import Batch, score_in_batches
from atmanrl.saliency.estimators.bias_path import loss_and_gradient
from atmanrl.saliency.estimators.interface import Course, Passes, TokenScores
from atmanrl.saliency.result import RolloutSaliency

Start = Literal["enabled", "suppressed"]
StepRule = Literal["adam", "normalized-sgd", "spectral"]
Reading = Literal["last", "mean"]


@dataclass(frozen=True)
class Mask:
    """score_v = 1 - H_v / init after AdamW from full suppression: the paper's estimator.

    Attributes:
        config: see :class:`atmanrl.MaskConfig`.
        record_every: keep the course every so many steps, None: not at all.
        loss_unmasked: see :func:`optimize_masks`.

    Source: AtManRL (arXiv 2604.16158), section 3.
    """

    config: MaskConfig = field(default_factory=MaskConfig)
    record_every: int | None = None
    loss_unmasked: Mapping[Rollout, float] | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """ "mask"."""
        return "mask"

    def passes(self, rollout: Rollout) -> Passes:
        """A forward and a backward per step, and two forwards for the losses without a mask and at the end."""
        return Passes(self.config.steps + 2, self.config.steps)

    def __call__(
        self, model: PreTrainedModel, rollouts: Sequence[Rollout], *, token_budget: int | None, progress: bool
    ) -> list[TokenScores]:
        """See `Estimator`."""
        masks = optimize_masks(
            model,
            rollouts,
            self.config,
            progress=progress,
            record_every=self.record_every,
            token_budget=token_budget,
            loss_unmasked=self.loss_unmasked,
        )
        return [
            TokenScores(
                self.name,
                rollout,
                item.restored,
                item.restored,
                loss_initial=item.loss_initial,
                loss_final=item.loss_final,
                loss_unmasked=item.loss_unmasked,
                course=_course(item),
            )
            for rollout, item in zip(rollouts, masks, strict=True)
        ]


@dataclass(frozen=True)
class SparseMask:
    """How long a token stays enabled when that has a price: argmin over m in [0, 1]^T of L(m) + sparsity * |m|_1.

    The key bias is depth * (1 - m_v). An optimiser's step is followed by clipping to the box. Beside a rollout's tokens
    goes one that the loss does not see, so that the price alone moves it; score_v = (m_v - m_idle) / (1 - m_idle), at
    least -1: 1 for a token that never left, 0 for one that left like an idle one.

    Attributes:
        start: "enabled" begins at m = 1 and prices tokens out, "suppressed" at m = 0 and lets them in.
        depth: bias of a token at m = 0, natural-log units, negative.
        sparsity: nats per enabled token, positive.
        steps, lr: of the optimiser.
        rule: "adam" moves every token by about ``lr`` whatever its gradient's size; "normalized-sgd" divides each
            rollout's gradient by its largest magnitude, which keeps the ratios between tokens; "spectral" does so in
            the first step, then takes each rollout's curvature along the last step (Barzilai and Borwein, 1988) for the
            length, ``lr`` / 10 to 1 for the token that moves most.
        reading: "last" m after the last step, or its "mean" over the steps, which tells early leavers from late ones.
        record_every: keep m and the loss every so many steps as the course, None: not at all.

    Raises:
        ValueError: for a depth that is not negative, no steps, sparsity or lr <= 0, recording every 0 steps, or an
            unknown choice.
    """

    start: Start = "enabled"
    depth: float = -10.0
    sparsity: float = 0.1
    steps: int = 9
    lr: float = 0.3
    rule: StepRule = "normalized-sgd"
    reading: Reading = "mean"
    record_every: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (("start", Start), ("rule", StepRule), ("reading", Reading)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {getattr(self, name)!r}")
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
        return score_in_batches(
            model,
            rollouts,
            self._optimize,
            token_budget=token_budget,
            progress=progress,
            what=self.name,
            passes=self.steps + 2,
        )

    def _optimize(self, batch: Batch) -> list[TokenScores]:
        tokens, rollouts = len(batch.packed.cot_columns), len(batch.rollouts)
        start = batch.filled(1.0 if self.start == "enabled" else 0.0)
        # Each rollout's idle token stands behind all others.
        enabled = torch.cat([start, start.new_full((rollouts,), float(self.start == "enabled"))])
        no_slope = start.new_zeros(rollouts)
        owner = torch.arange(rollouts, device=start.device)
        owner = torch.cat([batch.per_token(owner), owner])
        with torch.no_grad():
            unmasked = batch.losses(torch.zeros_like(start))
        adam = torch.optim.Adam([enabled], lr=self.lr)
        mean = torch.zeros_like(enabled)
        last: tuple[Tensor, Tensor] | None = None
        course: list[tuple[int, Tensor, Tensor]] = []
        for step in range(self.steps):
            losses, slope = loss_and_gradient(batch, self.depth * (1 - enabled[:tokens]))
            if step == 0 or (self.record_every and step % self.record_every == 0):
                course.append((step, losses, enabled[:tokens].clone()))
            gradient = torch.cat([-self.depth * slope, no_slope]) + self.sparsity
            with torch.no_grad():
                if self.rule == "adam":
                    enabled.grad = gradient
                    adam.step()
                else:
                    largest = no_slope.scatter_reduce(0, owner, gradient.abs(), "amax")
                    length = self.lr / largest
                    if self.rule == "spectral" and last is not None:
                        moved, turned = (now - before for now, before in zip((enabled, gradient), last, strict=True))
                        curvature = _curvature(moved[:tokens], turned[:tokens], owner[:tokens], no_slope)
                        length = torch.clamp(1 / curvature, min=length / 10, max=1 / largest)
                    last = (enabled.clone(), gradient)
                    enabled -= length[owner] * gradient
                enabled.clamp_(0, 1)
                mean += enabled / self.steps
        with torch.no_grad():
            final = batch.losses(self.depth * (1 - enabled[:tokens]))
        course.append((self.steps, final, enabled[:tokens]))
        values, idle = (enabled if self.reading == "last" else mean).split([tokens, rollouts])
        idle = batch.per_token(idle)
        scores = ((values - idle) / (1 - idle)).clamp(min=-1).cpu().split(batch.packed.cot_lengths)
        columns = zip(course[0][1].tolist(), final.tolist(), unmasked.tolist(), strict=True)
        courses = [None] * rollouts if self.record_every is None else _courses(batch, course)
        return [
            TokenScores(self.name, rollout, score, score.clamp(min=0), *losses, course=own)
            for rollout, score, losses, own in zip(batch.rollouts, scores, columns, courses, strict=True)
        ]


def _curvature(moved: Tensor, turned: Tensor, owner: Tensor, zeros: Tensor) -> Tensor:
    """Per rollout <s, y> / <s, s> of the step s ``moved`` and the gradient's change y, at least 0; 0 without a step."""
    squared, product = (zeros.index_add(0, owner, moved * other) for other in (moved, turned))
    return (product / squared).nan_to_num(0.0).clamp(min=0)


def _courses(batch: Batch, records: Sequence[tuple[int, Tensor, Tensor]]) -> list[Course]:
    """Each rollout's part of the batch's (step, losses (n,), m (C_total,))."""
    steps = torch.tensor([step for step, _, _ in records])
    losses = torch.stack([losses for _, losses, _ in records]).cpu()
    enabled = torch.stack([values for _, _, values in records]).cpu().split(batch.packed.cot_lengths, dim=1)
    return [Course(steps, own, losses[:, i]) for i, own in enumerate(enabled)]


def _course(item: RolloutSaliency) -> Course | None:
    if item.trajectory is None:
        return None
    return Course(item.trajectory.steps, 1 - item.trajectory.masks / item.init, item.trajectory.losses)
