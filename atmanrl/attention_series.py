"""WAAD and FAI of rollouts from one forward pass, without attention maps.

WAAD_t says how far back the local heads look from token t (within a window), FAI_s how much the global heads look at
token s later on. Source: arXiv 2510.13554 (v2), equations 7 to 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels import AttentionPlan
from atman_kernels.hf import AttentionCall, observing
from atmanrl.config import SeriesConfig
from atmanrl.saliency.frozen import frozen
from atmanrl.saliency.heads import Heads, layers_of, sampled_layers, select_heads


@dataclass(frozen=True)
class RolloutSeries:
    """One number per response token, float32 on the model's device.

    Attributes:
        waad: (T,) windowed average attention distance; fai: (T,) future attention influence, 0 where no row of the
            horizon exists.
        entropy: (T,) of the distribution each token was drawn from, nats; None unless asked for.
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
    """

    def __init__(self, n_layers: int, responses: Sequence[Tensor], config: SeriesConfig) -> None:
        self._config, self._responses = config, list(responses)
        layers = sampled_layers(n_layers, config.layers)
        # Per layer, per part: (sum of distances, rows), (N, Hq) WAAD and FAI of the N response tokens.
        self._distances: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
        self._series: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}

    def __call__(self, call: AttentionCall) -> None:
        if call.layer_idx not in self._series:
            return
        rows = self._responses[len(self._series[call.layer_idx])]
        found = call.statistics(window=self._config.window, horizon=self._config.horizon, rows=rows)
        # A sequence's distance is a mean over its response rows, which differ in number.
        counts = _response_rows(call.plan.sequences, rows)
        self._distances[call.layer_idx].append((counts.to(found.distance.dtype) @ found.distance, counts.sum()))
        self._series[call.layer_idx].append((found.windowed_distance[rows], found.received[rows]))

    def distance(self) -> dict[int, Tensor]:
        """(Hq,) mean distance of every sampled layer over all response rows."""
        return {
            layer: torch.stack([total for total, _ in parts]).sum(0)
            / torch.stack([count for _, count in parts]).sum().clamp(min=1)
            for layer, parts in self._distances.items()
        }

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


@torch.no_grad()
def attention_series(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    config: SeriesConfig | None = None,
    *,
    entropy: bool = False,
    token_budget: int = 16384,
) -> list[RolloutSeries]:
    """WAAD and FAI of every response token, from one packed forward of prompts and responses.

    Args:
        model: a causal LM whose attention goes through transformers' AttentionInterface; restored on return.
        prompts, responses: token ids; an empty response gives empty series.
        config: heads and windows; default: the paper's.
        entropy: also compute the entropies, which takes the logits of all response tokens.
        token_budget: tokens of one packed batch; a longer rollout goes alone.
    """
    config = SeriesConfig() if config is None else config
    parts = _parts([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], token_budget)
    device = model.device
    is_response, entropies = [], []
    for part in parts:
        flags = [flag for i in part for flag in [False] * len(prompts[i]) + [True] * len(responses[i])]
        is_response.append(torch.tensor(flags, dtype=torch.bool, device=device)[None])
    collector = SeriesCollector(layers_of(model), is_response, config)
    with frozen(model), torch.no_grad(), observing(collector):
        for part, rows in zip(parts, is_response, strict=True):
            ids = [token for i in part for token in (*prompts[i], *responses[i])]
            lengths = [len(prompts[i]) + len(responses[i]) for i in part]
            # The logits that drew a token stand one row before it.
            drawn_at = rows[0].nonzero()[:, 0] - 1 if entropy else torch.zeros(1, dtype=torch.int64, device=device)
            output: Any = model(
                input_ids=torch.tensor(ids, device=device)[None],
                position_ids=torch.cat([torch.arange(n, device=device) for n in lengths])[None],
                attention_mask=torch.empty(1, 1, 0, 0, device=device),
                use_cache=False,
                logits_to_keep=drawn_at,
                attention_plan=AttentionPlan(lengths, device=device),
            )
            if entropy:
                entropies.append(torch.distributions.Categorical(logits=output.logits[0].float()).entropy())
    found = collector.series([len(response) for response in responses])
    if not entropy:
        return found
    split = torch.cat(entropies).split([len(response) for response in responses])
    return [RolloutSeries(one.waad, one.fai, part) for one, part in zip(found, split, strict=True)]


def _parts(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Consecutive indices whose lengths add up to at most ``budget``, or single ones above it."""
    parts: list[list[int]] = []
    used = budget + 1
    for index, length in enumerate(lengths):
        if used + length > budget:
            parts.append([])
            used = 0
        parts[-1].append(index)
        used += length
    return parts
