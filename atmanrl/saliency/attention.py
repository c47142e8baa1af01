"""Scores from the attention of one forward: attention from the answer's rows, and attention from later rows.

Local and global heads are those that look back least and furthest, in the layers of the middle third of a model.
Source: arXiv 2510.13554 (v2), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels.hf import AttentionCall, observing
from atmanrl.config import SeriesConfig
from atmanrl.rollout import Rollout
from atmanrl.saliency.batches import Batch, in_batches
from atmanrl.saliency.packing import PackedRollouts, whole
from atmanrl.saliency.scores import Passes, TokenScores

Heads = list[tuple[int, int]]


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
        return _observed(self.name, _Received, model, rollouts, token_budget=token_budget, progress=progress)


@dataclass(frozen=True)
class FutureInfluence:
    """score_v = FAI_v = mean over the global heads and later rows t of their attention to token v, in 0..1.

    Rows are those of the completion from low to high tokens behind v, for ``config.horizon`` = (low, high); a token
    without such a row scores 0. The global heads are those with the highest mean backward attention distance, chosen
    for each rollout by itself, so that scores do not depend on the companions.

    Attributes:
        config: layers, head share and horizon; its window is not used.

    Source: arXiv 2510.13554 (v2), equations 7, 8 and 10.
    """

    config: SeriesConfig = field(default_factory=SeriesConfig)

    @property
    def name(self) -> str:
        """ "fai"."""
        return "fai"

    def passes(self, rollout: Rollout) -> Passes:
        """One forward."""
        return Passes(1)

    def __call__(
        self, model: PreTrainedModel, rollouts: Sequence[Rollout], *, token_budget: int | None, progress: bool
    ) -> list[TokenScores]:
        """See `Estimator`."""
        layers = sampled_layers(layers_of(model), self.config.layers)

        def collector(batch: PackedRollouts) -> _Influence:
            return _Influence(batch, layers, self.config)

        return _observed(self.name, collector, model, rollouts, token_budget=token_budget, progress=progress)


class _Collector(Protocol):
    """Sees every layer's attention of a packed batch."""

    def __call__(self, call: AttentionCall) -> None: ...

    def reads_distance(self, layer_idx: int) -> bool: ...

    def scores(self) -> list[Tensor]:
        """(T,) per rollout."""
        ...


def _observed(
    name: str,
    collector: Callable[[PackedRollouts], _Collector],
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    *,
    token_budget: int | None,
    progress: bool,
) -> list[TokenScores]:
    def score(batch: Batch) -> list[TokenScores]:
        found = collector(batch.packed)
        with torch.no_grad(), observing(found):
            losses = batch.losses(batch.filled(0.0)).tolist()
        columns = zip(batch.rollouts, found.scores(), losses, strict=True)
        return [TokenScores(name, rollout, own, own, loss_unmasked=loss) for rollout, own, loss in columns]

    segments = [whole(rollout) for rollout in rollouts]
    found = in_batches(
        model, segments, score, token_budget=token_budget, forward_only=True, progress=progress, what=name
    )
    return list(found)


class _Received:
    """Adds up the attention from each rollout's loss rows to its chain of thought, layer by layer."""

    def __init__(self, batch: PackedRollouts) -> None:
        self._columns = batch.cot_columns.split(batch.cot_lengths)
        self._rows = batch.loss_rows.split(batch.loss_lengths.tolist())
        self._sums = [torch.zeros(length, dtype=torch.float32, device=batch.ids.device) for length in batch.cot_lengths]
        self._layers = 0

    def __call__(self, call: AttentionCall) -> None:
        q, k, lse = call.q[0], call.k[0], call.lse[0]
        group = q.shape[1] // k.shape[1]
        sm_scale = q.shape[2] ** -0.5 if call.sm_scale is None else call.sm_scale
        self._layers += 1
        for total, rows, columns in zip(self._sums, self._rows, self._columns, strict=True):
            keys = k[columns].repeat_interleave(group, dim=1).float()
            scores = torch.einsum("rhd,chd->hrc", q[rows].float(), keys) * sm_scale
            p = (scores - lse[:, rows, None]).exp()
            if call.window is not None:
                p = p * (rows[:, None] - columns[None, :] < call.window)
            total += p.mean((0, 1))

    def reads_distance(self, layer_idx: int) -> bool:
        return False

    def scores(self) -> list[Tensor]:
        return [(total / self._layers).cpu() for total in self._sums]


class _Influence:
    """Takes distance and attention received of every head of the sampled layers."""

    def __init__(self, batch: PackedRollouts, layers: Sequence[int], config: SeriesConfig) -> None:
        self._batch, self._config = batch, config
        self._layers = frozenset(layers)
        self._distances: dict[int, Tensor] = {}
        self._received: dict[int, Tensor] = {}

    def __call__(self, call: AttentionCall) -> None:
        if call.layer_idx in self._layers:
            found = call.statistics(window=1, horizon=self._config.horizon)
            self._distances[call.layer_idx] = found.distance.cpu()
            self._received[call.layer_idx] = found.received[0, self._batch.cot_columns].float().cpu()

    def reads_distance(self, layer_idx: int) -> bool:
        return layer_idx in self._layers

    def scores(self) -> list[Tensor]:
        lengths = self._batch.cot_lengths
        received = {layer: values.split(lengths) for layer, values in self._received.items()}
        scores = []
        for i in range(len(lengths)):
            distance = {layer: each[i] for layer, each in self._distances.items()}
            _, distant = select_heads(distance, self._config.head_share)
            scores.append(torch.stack([received[layer][i][:, head] for layer, head in distant]).mean(0))
        return scores


def sampled_layers(n_layers: int, count: int = 5) -> list[int]:
    """``count`` evenly spaced layers from floor(L / 3) to floor(2 L / 3), both included; fewer in a shallow model."""
    first, last = n_layers // 3, 2 * n_layers // 3
    spaced = torch.linspace(first, min(last, n_layers - 1), count, dtype=torch.float64)
    return sorted({round(place) for place in spaced.tolist()})


def layers_of(model: PreTrainedModel) -> int:
    """The number of decoder layers."""
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def select_heads(distance: dict[int, Tensor], share: float = 0.3) -> tuple[Heads, Heads]:
    """The ``share`` of all (layer, head) with the lowest and with the highest mean distance, at least one each.

    Args:
        distance: (Hq,) mean backward attention distance of each sampled layer's heads.
    """
    ranked = sorted(
        (value, layer, head) for layer, values in distance.items() for head, value in enumerate(values.tolist())
    )
    count = max(1, round(share * len(ranked)))
    heads = [(layer, head) for _, layer, head in ranked]
    return heads[:count], heads[-count:]
