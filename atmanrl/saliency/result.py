"""What mask optimisation returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from atmanrl.config import MaskConfig
from atmanrl.rollout import Rollout


class NonFiniteLossError(FloatingPointError):
    """A rollout's loss is NaN or infinite.

    Args:
        rollout: its index in the list given, an attribute as well.
        loss: the value, an attribute as well.
        when: at which step, for the message, an attribute as well.
    """

    def __init__(self, rollout: int, loss: float, when: str) -> None:
        super().__init__(f"the loss of rollout {rollout} is {loss} {when}")
        self.rollout, self.loss, self.when = rollout, loss, when


def check_finite(losses: Tensor, numbers: Sequence[int], when: str) -> None:
    """Raise NonFiniteLossError for the first of ``losses`` (n,) that is none, named by its rollout's number."""
    wrong = losses.isfinite().logical_not()
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0])
        raise NonFiniteLossError(numbers[place], losses[place].item(), when)


@dataclass(frozen=True)
class Trajectory:
    """How a mask and its loss developed, on the CPU.

    Attributes:
        steps: (K,) int64, updates done before each record; the last is the number of steps.
        masks: (K, T) raw H after that many updates.
        losses: (K,) the loss under that mask, in nats.
    """

    steps: Tensor
    masks: Tensor
    losses: Tensor


@dataclass(frozen=True)
class RolloutSaliency:
    """The mask of one rollout's T chain-of-thought tokens, on the CPU, without gradient.

    Attributes:
        rollout: whose tokens these are.
        mask: (T,) float32 (float64 for a float64 model): H, the raw parameter, neither clamped nor scaled.
        init: H at the start.
        loss_initial: mean negative log-likelihood of the answer in nats, with every H at ``init``.
        loss_final: the same after the last update.
        loss_unmasked: the same without a mask.
        steps: updates done; fewer than the configuration's where the rollout ended early.
        skipped: why nothing was optimised; None where something was. The losses of a skipped rollout are NaN.
        trajectory: what ``record_every`` recorded, else None.
    """

    rollout: Rollout
    mask: Tensor
    init: float
    loss_initial: float = float("nan")
    loss_final: float = float("nan")
    loss_unmasked: float = float("nan")
    steps: int = 0
    skipped: str | None = None
    trajectory: Trajectory | None = None

    @property
    def normalized(self) -> Tensor:
        """(T,) H / init: 1 at the start, 0 for a fully re-enabled token, above 1 for one pushed further down."""
        return self.mask / self.init

    @property
    def restored(self) -> Tensor:
        """(T,) 1 - H / init: the token's saliency, 0 at the start and 1 when fully re-enabled."""
        return 1 - self.normalized


class SaliencyResult(Sequence[RolloutSaliency]):
    """One :class:`RolloutSaliency` per rollout, in the order given.

    Args:
        items: the rollouts' results.
        config: the configuration used, an attribute as well.
    """

    def __init__(self, items: Sequence[RolloutSaliency], config: MaskConfig) -> None:
        self._items = tuple(items)
        self.config = config

    @overload
    def __getitem__(self, index: int) -> RolloutSaliency: ...

    @overload
    def __getitem__(self, index: slice) -> SaliencyResult: ...

    def __getitem__(self, index: int | slice) -> RolloutSaliency | SaliencyResult:
        if isinstance(index, slice):
            return SaliencyResult(self._items[index], self.config)
        return self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[RolloutSaliency]:
        return iter(self._items)

    def __repr__(self) -> str:
        skipped = sum(item.skipped is not None for item in self)
        return f"SaliencyResult({len(self)} rollouts, {skipped} skipped)"


def skipped(rollout: Rollout, reason: str, config: MaskConfig) -> RolloutSaliency:
    """A rollout for which nothing is optimised: its mask stays at the initial value."""
    return RolloutSaliency(rollout, torch.full((len(rollout.cot_ids),), config.init), config.init, skipped=reason)
