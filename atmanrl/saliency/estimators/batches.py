"""Packed batches within a budget of rows, each with the likelihood of its answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from atmanrl.rollouts import Rollout
from atmanrl.saliency.budget import affordable_rows, split
from atmanrl.saliency.decoder import FrozenDecoder, why_unsupported
from atmanrl.saliency.likelihood import AnswerLikelihood, ModelLikelihood
from atmanrl.saliency.packing import PackedRollouts, pack

ROWS = 8192
"""Packed rows per pass where no budget is given."""

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Batch:
    """Rollouts packed together.

    Attributes:
        rollouts: in the order given.
        packed: their layout.
        likelihood: of their answers.
        dtype: of biases and losses.
    """

    rollouts: list[Rollout]
    packed: PackedRollouts
    likelihood: AnswerLikelihood
    dtype: torch.dtype

    def losses(self, cot_bias: Tensor) -> Tensor:
        """(n,) mean negative log-likelihood of each answer under ``cot_bias`` (C_total,), differentiable in it."""
        return self.packed.mean_per_rollout(self.likelihood(self.packed.key_bias(cot_bias)))

    def per_token(self, per_rollout: Tensor) -> Tensor:
        """(C_total,) each rollout's number at each of its tokens."""
        lengths = torch.tensor(self.packed.cot_lengths, device=per_rollout.device)
        return per_rollout.repeat_interleave(lengths)

    def per_rollout(self, tokens: Tensor) -> Tensor:
        """(n,) sums of ``tokens`` (C_total,) over each rollout."""
        index = self.per_token(torch.arange(len(self.rollouts), device=tokens.device))
        return tokens.new_zeros(len(self.rollouts)).index_add(0, index, tokens)

    def filled(self, value: float) -> Tensor:
        """(C_total,) of ``value``."""
        return torch.full((len(self.packed.cot_columns),), value, dtype=self.dtype, device=self.packed.ids.device)


def each_batch(
    model: PreTrainedModel, rollouts: Sequence[Rollout], *, token_budget: int | None, progress: bool, what: str
) -> Iterator[Batch]:
    """Batches of ``rollouts`` in their order; ``model`` is inside :func:`atmanrl.saliency.frozen.frozen`.

    Args:
        token_budget: packed rows per batch, prompts included; None: `ROWS`, or what fits the free memory.
        what: named beside the progress bar.
    """
    fast = why_unsupported(model) is None
    if token_budget is None:
        affordable = affordable_rows(model, rollouts) if fast else None
        token_budget = ROWS if affordable is None else min(ROWS, affordable)
    make = FrozenDecoder if fast else ModelLikelihood
    for group in shown(split(rollouts, range(len(rollouts)), token_budget), what, progress):
        members = [rollouts[index] for index in group]
        packed = pack(members, answer_loss="value", device=model.device)
        yield Batch(members, packed, make(model, packed), bias_dtype(model))


def bias_dtype(model: PreTrainedModel) -> torch.dtype:
    """float32, or float64 for a float64 model."""
    return torch.float64 if model.dtype == torch.float64 else torch.float32


def shown(items: Iterable[_Item], what: str, progress: bool, *, total: int | None = None) -> Iterable[_Item]:
    """``items``, with a progress bar on stderr where asked."""
    return track(items, what, total=total, console=Console(stderr=True), disable=not progress, transient=True)
