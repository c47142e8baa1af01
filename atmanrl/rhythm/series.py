"""WAAD and FAI of rollouts from one forward pass, without attention maps.

WAAD_t says how far back the local heads look from token t (within a window), FAI_s how much the global heads look at
token s later on. Source: arXiv 2510.13554 (v2), equations 7 to 10.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels.hf import AttentionCall, observing
from atmanrl.config import SeriesConfig
from atmanrl.rollout import Rollout
from atmanrl.saliency.attention import Heads, layers_of, sampled_layers, select_heads
from atmanrl.saliency.batches import Batch, in_batches, prepared
from atmanrl.saliency.likelihood import ModelLikelihood
from atmanrl.saliency.packing import Segment

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RolloutSeries:
    """One number per response token, float32 on the model's device.

    Attributes:
        waad: (T,) windowed average attention distance.
        fai: (T,) future attention influence, 0 where no row of the horizon exists.
        entropy: (T,) of the model's distribution (temperature 1) in each token's place, nats; None unless asked for.
    """

    waad: Tensor
    fai: Tensor
    entropy: Tensor | None = None


class SeriesCollector:
    """Takes the statistics of the sampled layers while some forward runs; an observer for ``atman_kernels.hf``.

    Forwards may show a batch in parts, as long as every layer sees the same parts in the same order.

    Args:
        n_layers: of the model.
        responses: (B, T) bool of each part in turn: which positions are response tokens.
        config: layers, windows and head share.
        reduce: sums a tensor over all processes, whose responses the heads are then ranked by together.
    """

    def __init__(
        self, n_layers: int, responses: Sequence[Tensor], config: SeriesConfig, reduce: Reduce | None = None
    ) -> None:
        self._config, self._responses, self._reduce = config, list(responses), reduce
        layers = sampled_layers(n_layers, config.layers)
        # Per layer, per part: (1 + Hq,) rows and sums of distances, (N, Hq) WAAD and FAI of the N response tokens.
        self._distances: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        self._series: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}

    def __call__(self, call: AttentionCall) -> None:
        if call.layer_idx not in self._series:
            return
        rows = self._responses[len(self._series[call.layer_idx])]
        found = call.statistics(window=self._config.window, horizon=self._config.horizon, rows=rows)
        # A sequence's distance is a mean over its response rows, which differ in number.
        counts = _response_rows(call.plan.sequences, rows)
        counts = counts.to(found.distance.dtype)
        self._distances[call.layer_idx].append(torch.cat([counts.sum()[None], counts @ found.distance]))
        self._series[call.layer_idx].append((found.windowed_distance[rows], found.received[rows]))

    def extend(self, other: SeriesCollector) -> None:
        """Add what ``other``, of the same layers and windows, has seen behind what this one has."""
        for layer in self._series:
            self._distances[layer] += other._distances[layer]
            self._series[layer] += other._series[layer]

    def reads_distance(self, layer_idx: int) -> bool:
        """In the sampled layers."""
        return layer_idx in self._series

    def distance(self) -> dict[int, Tensor]:
        """(Hq,) mean distance of every sampled layer over all response rows."""
        sums = torch.stack([torch.stack(parts).sum(0) for parts in self._distances.values()])
        sums = sums if self._reduce is None else self._reduce(sums)
        return dict(zip(self._distances, sums[:, 1:] / sums[:, :1].clamp(min=1), strict=True))

    def series(self, lengths: Sequence[int]) -> list[RolloutSeries]:
        """WAAD and FAI of each response, given their lengths in the order in which they were shown."""
        local, distant = select_heads(self.distance(), self._config.head_share)
        waad, fai = self._mean(local, 0), self._mean(distant, 1)
        return [RolloutSeries(*pair) for pair in zip(waad.split(list(lengths)), fai.split(list(lengths)), strict=True)]

    def _mean(self, heads: Heads, which: int) -> Tensor:
        columns = [torch.cat([part[which][:, head] for part in self._series[layer]]) for layer, head in heads]
        return torch.stack(columns).mean(0)


def _response_rows(sequences: Tensor, rows: Tensor) -> Tensor:
    """How many rows of each sequence are response tokens."""
    before = torch.nn.functional.pad(rows.long().cumsum(1), (1, 0))
    batch, start, length = sequences[:, :3].long().unbind(1)
    return before[batch, start + length] - before[batch, start]


def attention_series(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    config: SeriesConfig | None = None,
    *,
    entropy: bool = False,
    token_budget: int | None = None,
    reduce: Reduce | None = None,
) -> list[RolloutSeries]:
    """WAAD and FAI of every response token, from one packed forward of the responses behind their prompts.

    Equal prompts run once: the responses see their keys and values as a shared prefix.

    Args:
        model: see :func:`atmanrl.saliency.batches.prepared`; restored on return.
        prompts, responses: token ids; prompts are not empty, an empty response gives empty series.
        config: heads and windows; default: the paper's.
        entropy: also compute the entropies, which takes the logits of all response tokens, in batches as small as
            those need.
        token_budget: see :func:`atmanrl.saliency.batches.in_batches`.
        reduce: see `SeriesCollector`; then every process must call.

    Raises:
        ValueError: a rollout exceeds the model's context or vocabulary.
    """
    config = SeriesConfig() if config is None else config
    rollouts = [
        Rollout(tuple(prompt), tuple(response), ()) for prompt, response in zip(prompts, responses, strict=True)
    ]
    model = prepared(model, rollouts)
    n_layers = layers_of(model)
    collector = SeriesCollector(n_layers, [], config, reduce)

    def compute(batch: Batch) -> list[Tensor | None]:
        # Each response stands behind its prompt's last token, whose row draws the first.
        is_response = [row > 0 for segment in batch.packed.segments for row in range(segment.n_rows)]
        own = SeriesCollector(n_layers, [torch.tensor([is_response], device=model.device)], config)
        assert isinstance(batch.likelihood, ModelLikelihood)
        with torch.no_grad(), observing(own):
            logits = batch.likelihood.logits()
        lengths = [len(segment.targets) for segment in batch.packed.segments]
        entropies = [_entropies(rows) if entropy else None for rows in logits.split(lengths)]
        # Last: a batch for which memory runs out is computed again.
        collector.extend(own)
        return entropies

    segments = [_behind_its_prompt(rollout, read=entropy) for rollout in rollouts]
    entropies = list(in_batches(model, segments, compute, token_budget=token_budget, forward_only=True))
    found = collector.series([len(response) for response in responses])
    return [replace(one, entropy=own) for one, own in zip(found, entropies, strict=True)]


def _behind_its_prompt(rollout: Rollout, *, read: bool) -> Segment:
    """A response and the prompt's last token before it; the rest of the prompt runs once for all its responses."""
    prompt, response = rollout.prompt_ids, rollout.completion_ids
    return Segment(
        rollout,
        before=prompt[:-1],
        sequence=prompt + response,
        seen=len(prompt) - 1,
        targets=response if read else (),
        behind=1,
    )


def _entropies(logits: Tensor) -> Tensor:
    # Some rows at a time: float32 logits, normalised ones and probabilities are each as large as the logits.
    parts = [torch.distributions.Categorical(logits=rows.float()).entropy() for rows in logits.split(1024)]
    return torch.cat(parts)
