"""Interface of estimators: rollouts in; one number per chain-of-thought token, and the cost, out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atmanrl.rollout import Rollout


class Passes(NamedTuple):
    """Cost of one rollout's scores, in passes over all its rows: T chain-of-thought, K marker, N answer tokens.

    A forward over half the rows counts 0.5. The prompt's one forward is common to all estimators and left out. The
    backward of a frozen model computes no weight gradients and costs about one forward.

    Attributes:
        forward: forwards.
        backward: backwards.
    """

    forward: float
    backward: float = 0.0

    @property
    def total(self) -> float:
        """Forward-equivalents."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Trajectory:
    """How an optimisation went, on the CPU.

    Attributes:
        steps: (K,) int64, updates done before each record; the last is the number of steps.
        scores: (K, T) how far each token was enabled after that many updates: 1 - H / init of the paper's mask, m of
            the sparse one.
        losses: (K,) of the answer, in nats.
    """

    steps: Tensor
    scores: Tensor
    losses: Tensor


@dataclass(frozen=True)
class TokenScores:
    """Scores of one rollout's T chain-of-thought tokens, on the CPU; higher means the answer rests more on the token.

    Attributes:
        estimator: the name of what gave them.
        rollout: whose tokens these are.
        scores: (T,) in the estimator's own unit, whose ranking and zero mean what its documentation says.
        restored: (T,) scores mapped to 0..1. The reward averages them: 1 - H / init of the paper's mask; of a sparse
            mask its score, 0 for a negative one; for scores in nats the share 1 - exp(-score) of the answer's
            probability that the token carries, 0 for a negative score.
        loss_initial: mean negative log-likelihood of the answer, in nats, where the estimator starts suppressed.
        loss_final: the same where it ends.
        loss_unmasked: the same without suppression. NaN, like the other two, where the estimator does not see it.
        skipped: why nothing was estimated, None where something was.
        trajectory: of the optimisation, where it was recorded.
        mask: (T,) H of the paper's mask, the raw parameter, neither clamped nor scaled: float32, float64 for a float64
            model. None of another estimator.
    """

    estimator: str
    rollout: Rollout
    scores: Tensor
    restored: Tensor
    loss_initial: float = math.nan
    loss_final: float = math.nan
    loss_unmasked: float = math.nan
    skipped: str | None = None
    trajectory: Trajectory | None = None
    mask: Tensor | None = None

    @property
    def normalized(self) -> Tensor:
        """(T,) 1 - restored; of the paper's mask H / init: 1 at the start, 0 for a fully re-enabled token."""
        return 1 - self.restored


class Estimator(Protocol):
    """A way to score tokens. Implementations are frozen dataclasses of their settings."""

    @property
    def name(self) -> str:
        """As on the command line."""
        ...

    def passes(self, rollout: Rollout) -> Passes:
        """What the scores of ``rollout`` cost."""
        ...

    def __call__(
        self, model: PreTrainedModel, rollouts: Sequence[Rollout], *, token_budget: int | None, progress: bool
    ) -> list[TokenScores]:
        """Score rollouts that each have a chain of thought and an answer.

        Args:
            model: a causal LM on transformers' AttentionInterface, borrowed frozen.
            rollouts: at least one; scores do not depend on the companions, up to rounding.
            token_budget: packed rows per pass, None for as many as fit the free memory.
            progress: show a bar on stderr.
        """
        ...


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


def scored_in_nats(
    estimator: str,
    rollout: Rollout,
    nats: Tensor,
    *,
    loss_initial: float = math.nan,
    loss_final: float = math.nan,
    loss_unmasked: float = math.nan,
) -> TokenScores:
    """Scores whose unit is a rise of the answer's loss in nats: a rise by s lowers its probability by 1 - exp(-s)."""
    nats = nats.detach().cpu()
    share_lost = -torch.expm1(-nats.clamp(min=0))
    return TokenScores(estimator, rollout, nats, share_lost, loss_initial, loss_final, loss_unmasked)
