"""WAAD and FAI of rollouts from one forward pass, without attention maps.

WAAD_t says how far back the local heads look from token t (within a window), FAI_s how much the global heads look at
token s later on. Source: arXiv 2510.13554 (v2), equations 7 to 10.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atman_kernels import AttentionPlan
from atman_kernels.hf import AttentionCall, KeyValueRecord, observing
from atmanrl.config import SeriesConfig
from atmanrl.saliency.budget import halving_on_out_of_memory, within
from atmanrl.saliency.frozen import frozen
from atmanrl.saliency.heads import Heads, layers_of, sampled_layers, select_heads

Reduce = Callable[[Tensor], Tensor]

# Logits of one batch, 1 GiB in float32.
_MOST_LOGITS = 2**28


@dataclass(frozen=True)
class RolloutSeries:
    """One number per response token, float32 on the model's device.

    Attributes:
        waad: (T,) windowed average attention distance.
        fai: (T,) future attention influence, 0 where no row of the horizon exists.
        entropy: (T,) of the model's distribution (temperature 1) in each token's place, nats; None unless asked for.
        loss: mean negative log-likelihood of the answer's tokens, nats; NaN unless asked for.
    """

    waad: Tensor
    fai: Tensor
    entropy: Tensor | None = None
    loss: float = math.nan


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


@torch.no_grad()
def attention_series(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    config: SeriesConfig | None = None,
    *,
    entropy: bool = False,
    answers: Sequence[range] | None = None,
    token_budget: int = 16384,
    reduce: Reduce | None = None,
) -> list[RolloutSeries]:
    """WAAD and FAI of every response token, from one packed forward of the responses behind their prompts.

    Equal prompts run once: the responses see their keys and values as a shared prefix.

    Args:
        model: a causal LM whose attention goes through transformers' AttentionInterface; restored on return.
        prompts, responses: token ids; prompts are not empty, an empty response gives empty series.
        config: heads and windows; default: the paper's.
        entropy: also compute the entropies, which takes the logits of all response tokens, in batches as small as
            those need.
        answers: of each response the places of the tokens whose ``loss`` is wanted, or an empty range; takes the logits
            of those tokens.
        token_budget: tokens of one packed batch, prompts included; a longer rollout goes alone. If memory runs out,
            half of it is tried once.
        reduce: see `SeriesCollector`; then every process must call.
    """
    config = SeriesConfig() if config is None else config
    answers = [range(0)] * len(responses) if answers is None else answers
    if entropy:
        token_budget = min(token_budget, _MOST_LOGITS // model.config.get_text_config(decoder=True).vocab_size)
    sizes = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]

    def run(budget: int) -> tuple[SeriesCollector, list[tuple[Tensor | None, float]]]:
        parts = list(within(budget, range(len(sizes)), sizes))
        batches = [_pack([prompts[i] for i in part], [responses[i] for i in part], model.device) for part in parts]
        collector = SeriesCollector(layers_of(model), [batch.is_response for batch in batches], config, reduce)
        read = []
        for part, batch in zip(parts, batches, strict=True):
            lengths, spans = [len(responses[i]) for i in part], [answers[i] for i in part]
            logits = _logits(model, batch, collector, _wanted(batch, lengths, spans, entropy))
            read += _read(logits, batch, lengths, spans, entropy)
        return collector, read

    with frozen(model), torch.no_grad():
        collector, read = halving_on_out_of_memory(run, min(token_budget, sum(sizes)))
    found = collector.series([len(response) for response in responses])
    return [replace(one, entropy=own, loss=loss) for one, (own, loss) in zip(found, read, strict=True)]


@dataclass(frozen=True)
class _Packed:
    """Responses, each behind its prompt's last token, whose logits draw the first; the rest of each prompt, once.

    Attributes:
        prefix_ids, prefix_positions: (P_total,) int64, the distinct prompts without their last tokens.
        prefix_plan: one sequence per distinct prompt.
        ids, positions: (R_total,) int64; plan: one sequence per response, behind its part of the prefix.
        is_response: (1, R_total) bool, not the prompts' last tokens.
    """

    prefix_ids: Tensor
    prefix_positions: Tensor
    prefix_plan: AttentionPlan
    ids: Tensor
    positions: Tensor
    plan: AttentionPlan
    is_response: Tensor


def _pack(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device) -> _Packed:
    starts: dict[tuple[int, ...], int] = {}
    end = 0
    for prompt in prompts:
        prefix = tuple(prompt[:-1])
        if prefix not in starts:
            starts[prefix] = end
            end += len(prefix)
    own = [[*prompt[-1:], *response] for prompt, response in zip(prompts, responses, strict=True)]
    before = [len(prompt) - 1 for prompt in prompts]

    def on_device(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=device)

    lengths = [len(ids) for ids in own]
    return _Packed(
        prefix_ids=on_device(chain.from_iterable(starts)),
        prefix_positions=on_device(chain.from_iterable(range(len(prefix)) for prefix in starts)),
        prefix_plan=AttentionPlan([len(prefix) for prefix in starts], device=device),
        ids=on_device(chain.from_iterable(own)),
        positions=on_device(chain.from_iterable(range(b, b + n) for b, n in zip(before, lengths, strict=True))),
        plan=AttentionPlan(lengths, lengths, [starts[tuple(prompt[:-1])] for prompt in prompts], before, device=device),
        is_response=on_device(i > 0 for n in lengths for i in range(n)).bool()[None],
    )


def _wanted(batch: _Packed, lengths: Sequence[int], answers: Sequence[range], entropy: bool) -> Tensor:
    """The rows that draw the tokens whose logits are read: all of the responses, or those of the answers."""
    # Each response stands behind its prompt's last token.
    first = [0, *accumulate(length + 1 for length in lengths)][: len(lengths)]
    places = [range(n) if entropy else answer for n, answer in zip(lengths, answers, strict=True)]
    rows = [start + place for start, own in zip(first, places, strict=True) for place in own]
    return torch.tensor(rows, dtype=torch.int64, device=batch.ids.device)


def _logits(model: PreTrainedModel, batch: _Packed, collector: SeriesCollector, rows: Tensor) -> Tensor:
    """(len(rows), V) float32, while the collector looks on at the responses' rows."""
    # The plan says what each row sees; a 4-D mask, unused, keeps transformers from reading that off the positions.
    fixed: dict[str, Any] = {"attention_mask": torch.empty(1, 1, 0, 0, device=batch.ids.device), "use_cache": False}
    prefix = None
    if len(batch.prefix_ids):
        prefix = KeyValueRecord()
        model(
            input_ids=batch.prefix_ids[None],
            position_ids=batch.prefix_positions[None],
            attention_plan=batch.prefix_plan,
            logits_to_keep=1,
            capture=prefix,
            **fixed,
        )
    with observing(collector):
        output: Any = model(
            input_ids=batch.ids[None],
            position_ids=batch.positions[None],
            attention_plan=batch.plan,
            shared_prefix=prefix,
            logits_to_keep=rows,
            **fixed,
        )
    logits: Tensor = output.logits[0].float()
    return logits


def _read(
    logits: Tensor, batch: _Packed, lengths: Sequence[int], answers: Sequence[range], entropy: bool
) -> list[tuple[Tensor | None, float]]:
    """Entropies and mean loss of the answer of each response, from the logits of the rows of :func:`_wanted`."""
    tokens = batch.ids[batch.is_response[0]].split(list(lengths))
    own = logits.split(list(lengths) if entropy else [len(answer) for answer in answers])
    found = []
    for ids, rows, answer in zip(tokens, own, answers, strict=True):
        entropies = _entropies(rows) if entropy else None
        of_answer = rows[answer.start : answer.stop] if entropy else rows
        loss = nn.functional.cross_entropy(of_answer, ids[answer.start : answer.stop]).item() if answer else math.nan
        found.append((entropies, loss))
    return found


def _entropies(logits: Tensor) -> Tensor:
    # Some rows at a time: normalised logits and probabilities are as large as the logits.
    return torch.cat([torch.distributions.Categorical(logits=rows).entropy() for rows in logits.split(1024)])
