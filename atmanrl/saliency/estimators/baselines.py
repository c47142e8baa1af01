"""Scores that cost next to nothing: attention received from the answer, and chance."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atmanrl.rollouts import Rollout
from atmanrl.saliency.budget import split
from atmanrl.saliency.estimators.batches import ROWS, shown
from atmanrl.saliency.estimators.interface import Passes, TokenScores
from atmanrl.saliency.frozen import frozen
from atmanrl.saliency.likelihood import ModelLikelihood
from atmanrl.saliency.packing import PackedRollouts, pack


@dataclass(frozen=True)
class ReceivedAttention:
    """score_v = mean over layers, heads and the rows that predict the answer of their attention to token v, in 0..1."""

    @property
    def name(self) -> str:
        """ "attention"."""
        return "attention"

    def passes(self, rollout: Rollout) -> Passes:
        """One forward."""
        return Passes(1)

    def __call__(
        self, model: PreTrainedModel, rollouts: Sequence[Rollout], *, token_budget: int | None, progress: bool
    ) -> list[TokenScores]:
        """See `Estimator`."""
        results: list[TokenScores] = []
        groups = split(rollouts, range(len(rollouts)), token_budget or ROWS)
        with frozen(model), torch.no_grad():
            for group in shown(groups, self.name, progress):
                members = [rollouts[index] for index in group]
                batch = pack(members, answer_loss="value", device=model.device)
                received = _Received(model, batch)
                ModelLikelihood(model, batch).logits(torch.zeros(batch.n_rows, device=model.device), capture=received)
                results += [
                    TokenScores(self.name, rollout, score, score)
                    for rollout, score in zip(members, received.means(), strict=True)
                ]
        return results


class _Received:
    """Adds up the attention from each rollout's loss rows to its chain of thought, layer by layer."""

    def __init__(self, model: PreTrainedModel, batch: PackedRollouts) -> None:
        modules: Iterable[Any] = model.modules()
        self._modules: dict[int, Any] = {
            module.layer_idx: module
            for module in modules
            if hasattr(module, "layer_idx") and hasattr(module, "scaling")
        }
        self._columns = batch.cot_columns.split(batch.cot_lengths)
        self._rows = batch.loss_rows.split(batch.loss_lengths.tolist())
        self._sums = [torch.zeros(length, dtype=torch.float32, device=batch.ids.device) for length in batch.cot_lengths]
        self._layers = 0

    def record(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> None:
        module = self._modules[layer_idx]
        window = getattr(module, "sliding_window", None)
        group = q.shape[2] // k.shape[2]
        self._layers += 1
        for total, rows, columns in zip(self._sums, self._rows, self._columns, strict=True):
            keys = k[0, columns].repeat_interleave(group, dim=1).float()
            scores = torch.einsum("rhd,chd->hrc", q[0, rows].float(), keys) * module.scaling
            p = (scores - lse[0][:, rows, None]).exp()
            if window is not None:
                p = p * (rows[:, None] - columns[None, :] < window)
            total += p.mean((0, 1))

    def means(self) -> list[Tensor]:
        return [(total / self._layers).cpu() for total in self._sums]


@dataclass(frozen=True)
class Random:
    """score_v uniform in 0..1: what every other estimator must beat.

    Attributes:
        seed: of the draws, which depend on it and on the rollout's tokens alone.
    """

    seed: int = 0

    @property
    def name(self) -> str:
        """ "random"."""
        return "random"

    def passes(self, rollout: Rollout) -> Passes:
        """None."""
        return Passes(0)

    def __call__(
        self, model: PreTrainedModel, rollouts: Sequence[Rollout], *, token_budget: int | None, progress: bool
    ) -> list[TokenScores]:
        """See `Estimator`."""
        results = []
        for rollout in rollouts:
            key = zlib.crc32(repr((self.seed, rollout)).encode())
            score = torch.rand(len(rollout.cot_ids), generator=torch.Generator().manual_seed(key))
            results.append(TokenScores(self.name, rollout, score, score))
        return results
