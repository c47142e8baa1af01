"""From series over a rollout's tokens to gamma_t, the factor of each token's advantage, and a batch's by a strategy.

Source: "Attention Illuminates LLM Reasoning" (arXiv 2510.13554, v2), equations 14 to 19. Each choice that the paper
leaves open is a named argument with the default of `atmanrl.config.CreditConfig`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels.hf import observing
from atmanrl.config import CreditConfig
from atmanrl.rhythm.series import Reduce, RolloutSeries, SeriesCollector, attention_series
from atmanrl.saliency.attention import layers_of

READ_FROM_ATTENTION = ("local", "global", "coupled")
NEEDS_SERIES = (*READ_FROM_ATTENTION, "entropy")
"""Strategies that read the attention or the logits of a forward pass."""


class CreditAssignment:
    """Gamma of one batch of rollouts after another, from a forward that runs anyway or from one of its own.

    Args:
        config: the strategy and its parameters.
        reduce: see `SeriesCollector`.
    """

    def __init__(self, config: CreditConfig, reduce: Reduce | None = None) -> None:
        self.config, self._reduce = config, reduce
        self._series: list[RolloutSeries] | None = None

    def begin(self) -> None:
        """Forget the batch before."""
        self._series = None

    @property
    def needs_forward(self) -> bool:
        """Whether the strategy reads a forward of the batch and none has been read."""
        return self.config.strategy in NEEDS_SERIES and self._series is None

    @contextmanager
    def watching(self, model: PreTrainedModel, response: Tensor, size: int) -> Iterator[None]:
        """Read the series from the forwards inside the block, where the strategy and the model's attention allow it.

        Args:
            response: (B, T) bool, the response tokens; size: rows of it that each forward shows.
        """
        if self.config.strategy not in READ_FROM_ATTENTION or model.config._attn_implementation != "atman":
            yield
            return
        collector = SeriesCollector(layers_of(model), response.split(size), self.config.series, self._reduce)
        with observing(collector):
            yield
        self._series = collector.series(response.sum(1).tolist())

    def forward(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> None:
        """Read the series from a forward of its own."""
        entropy = self.config.strategy == "entropy"
        self._series = attention_series(
            model, prompts, responses, self.config.series, entropy=entropy, reduce=self._reduce
        )

    def gammas(self, lengths: Sequence[int], restored: Mapping[int, Tensor], seed: int) -> list[Tensor]:
        """gamma of the batch; arguments as in :func:`gammas`."""
        return gammas(self.config, lengths, series=self._series, restored=restored, seed=seed)


def gammas(
    config: CreditConfig,
    lengths: Sequence[int],
    *,
    series: Sequence[RolloutSeries] | None = None,
    restored: Mapping[int, Tensor] | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """gamma (T,) of every rollout's response tokens, float32 on the CPU.

    Args:
        config: the strategy and its parameters.
        lengths: response tokens of each rollout.
        series: of each rollout, for the strategies in `NEEDS_SERIES`; tokens behind the end of one get 1.
        restored: for "saliency": restored values of the response's leading tokens, by index of the rollout. Tokens and
            rollouts without one get 1.
        seed: of the "random" strategy.

    Raises:
        ValueError: if the strategy's input is missing.
    """
    if config.strategy in NEEDS_SERIES and series is None:
        raise ValueError(f"the {config.strategy!r} strategy needs series")
    if config.strategy == "saliency" and restored is None:
        raise ValueError("the 'saliency' strategy needs restored values")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i, length in enumerate(lengths):
        one = series[i] if series is not None else RolloutSeries(torch.zeros(0), torch.zeros(0))
        values = None if restored is None else restored.get(i)
        gamma = torch.ones(length)
        if length:
            own = _gamma(config, length, one, values, generator)
            gamma[: len(own)] = own
        found.append(gamma)
    return found


def _gamma(
    config: CreditConfig, length: int, series: RolloutSeries, restored: Tensor | None, generator: torch.Generator
) -> Tensor:
    strength = {"gain": config.gain, "share": config.share}
    if config.strategy == "local":
        return local_chunk(series.waad, **strength)
    if config.strategy == "global":
        return global_anchor(series.fai, **strength)
    if config.strategy == "coupled":
        return coupled_rhythm(
            series.waad,
            series.fai,
            alpha=config.alpha,
            lookback=config.lookback,
            waad_quantile=config.waad_quantile,
            delta_quantile=config.delta_quantile,
            **strength,
        )
    if config.strategy == "random":
        return random_tokens(length, generator, **strength)
    if config.strategy == "entropy":
        assert series.entropy is not None
        return high_entropy(series.entropy, **strength)
    gamma = torch.ones(length)
    if config.strategy == "saliency" and restored is not None:
        gamma[: len(restored)] = salient(restored, floor=config.floor)
    return gamma


def weighted_advantages(advantages: Tensor, gammas: Sequence[Tensor], n_tokens: int, sign: str) -> Tensor:
    """gamma_t A, (B, n_tokens): 1 x A on padding, and with ``sign`` "positive" on all tokens of a negative A.

    Args:
        advantages: (B,); gammas: one (T,) per rollout, T at most ``n_tokens``.
    """
    factor = torch.ones(len(gammas), n_tokens)
    for row, gamma in zip(factor, gammas, strict=True):
        row[: len(gamma)] = gamma
    factor = factor.to(advantages.device, advantages.dtype)
    if sign == "positive":
        factor = torch.where(advantages[:, None] > 0, factor, 1.0)
    return advantages[:, None] * factor


def waad_change(waad: Tensor) -> Tensor:
    """Delta_t = |WAAD_t - WAAD_{t+1}| (Eq. 14), (T,); the last token's is 0."""
    change = torch.zeros_like(waad)
    change[:-1] = waad.diff().abs()
    return change


def highest(values: Tensor, share: float) -> Tensor:
    """(T,) bool: the round(share * T) tokens with the highest values; of equal ones the earlier."""
    chosen = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    chosen[torch.argsort(values, descending=True, stable=True)[: round(share * len(values))]] = True
    return chosen


def local_chunk(waad: Tensor, *, gain: float = 1.5, share: float = 0.4) -> Tensor:
    """gamma_t = 1 + (gain - 1) [t among the highest ``share`` of Delta] (Eq. 15), (T,)."""
    return amplify(highest(waad_change(waad), share), gain)


def global_anchor(fai: Tensor, *, gain: float = 1.5, share: float = 0.4) -> Tensor:
    """gamma_t = 1 + (gain - 1) [t among the highest ``share`` of FAI] (Eq. 17), (T,)."""
    return amplify(highest(fai, share), gain)


def locally_dominated(
    waad: Tensor,
    fai: Tensor,
    *,
    share: float = 0.4,
    lookback: int = 3,
    waad_quantile: float = 0.5,
    delta_quantile: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """The anchors D that read locally just after a boundary (Eq. 18), and the token that introduces each.

    t is in D if it is among the highest ``share`` of FAI, WAAD_t is at most the ``waad_quantile`` of the rollout, and
    the largest Delta_u of the ``lookback`` tokens before t is at least the ``delta_quantile``.

    Returns:
        (T,) bool, and (T,) int64: the argmax of Delta over the ``lookback`` tokens before t (the earliest of equal
        ones); for t = 0, which has none, 0.
    """
    change = waad_change(waad)
    n = len(waad)
    dominated = torch.zeros(n, dtype=torch.bool, device=waad.device)
    introduction = torch.zeros(n, dtype=torch.int64, device=waad.device)
    if n < 2:
        return dominated, introduction
    # Column j of row t is Delta of token t - lookback + j; tokens before the first count as -inf.
    before = torch.cat([change.new_full((lookback,), -torch.inf), change])[: n - 1 + lookback].unfold(0, lookback, 1)
    largest, place = before.max(1)
    introduction[1:] = (torch.arange(n, device=waad.device) - lookback + place)[1:]
    reads_locally = waad <= torch.quantile(waad, waad_quantile)
    after_boundary = largest >= torch.quantile(change, delta_quantile)
    dominated = highest(fai, share) & reads_locally & after_boundary
    return dominated, introduction


def coupled_rhythm(
    waad: Tensor,
    fai: Tensor,
    *,
    gain: float = 1.5,
    share: float = 0.4,
    alpha: float = 0.5,
    lookback: int = 3,
    waad_quantile: float = 0.5,
    delta_quantile: float = 0.5,
) -> Tensor:
    """Global anchors, with ``alpha`` of a locally dominated anchor's bonus moved to its introduction (Eq. 19), (T,).

    gamma_t = 1 + (gain - 1) ([t in G, not D] + (1 - alpha) [t in D] + alpha #{s in D: intro(s) = t}), G the highest
    ``share`` of FAI and D as in :func:`locally_dominated`. The bonuses sum to (gain - 1) |G|.
    """
    dominated, introduction = locally_dominated(
        waad, fai, share=share, lookback=lookback, waad_quantile=waad_quantile, delta_quantile=delta_quantile
    )
    bonus = highest(fai, share).to(waad.dtype)
    bonus = torch.where(dominated, 1 - alpha, bonus)
    bonus += alpha * torch.bincount(introduction[dominated], minlength=len(waad)).to(waad.dtype)
    return 1 + (gain - 1) * bonus


def random_tokens(n_tokens: int, generator: torch.Generator, *, gain: float = 1.5, share: float = 0.4) -> Tensor:
    """The control arm: as many tokens as the other arms choose, drawn from ``generator``, (T,) on its device."""
    return amplify(highest(torch.rand(n_tokens, generator=generator, device=generator.device), share), gain)


def high_entropy(entropy: Tensor, *, gain: float = 1.5, share: float = 0.4) -> Tensor:
    """gamma_t from the entropy of the model's distribution (temperature 1) in token t's place, (T,)."""
    return amplify(highest(entropy, share), gain)


def salient(restored: Tensor, *, floor: float = 0.5) -> Tensor:
    """gamma_t = floor + (1 - floor) max(restored_t, 0) / mean(max(restored, 0)), (T,): mean 1, at least ``floor``.

    All 1 where nothing was restored. Not in either paper.
    """
    weight = restored.clamp(min=0)
    mean = weight.mean()
    if not mean > 0:
        return torch.ones_like(restored)
    return floor + (1 - floor) * weight / mean


def amplify(chosen: Tensor, gain: float) -> Tensor:
    """1 + (gain - 1) [chosen], float32."""
    return 1 + (gain - 1) * chosen.float()
