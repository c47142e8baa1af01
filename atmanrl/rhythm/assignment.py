"""Gamma of a batch of rollouts by a configured strategy: what the trainer multiplies advantages with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels.hf import observing
from atmanrl.config import CreditConfig
from atmanrl.rhythm import credit
from atmanrl.rhythm.series import Reduce, RolloutSeries, SeriesCollector, attention_series
from atmanrl.saliency.heads import layers_of

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
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        answers: Mapping[int, range] | None = None,
    ) -> list[float]:
        """Read the series from a forward of its own.

        Args:
            answers: places of the answer in some of the responses, by index.

        Returns:
            the mean negative log-likelihood of each answer; NaN without one.
        """
        places = {} if answers is None else answers
        self._series = attention_series(
            model,
            prompts,
            responses,
            self.config.series,
            entropy=self.config.strategy == "entropy",
            answers=[places.get(i, range(0)) for i in range(len(responses))],
            reduce=self._reduce,
        )
        return [one.loss for one in self._series]

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
        return credit.local_chunk(series.waad, **strength)
    if config.strategy == "global":
        return credit.global_anchor(series.fai, **strength)
    if config.strategy == "coupled":
        return credit.coupled_rhythm(
            series.waad,
            series.fai,
            alpha=config.alpha,
            lookback=config.lookback,
            waad_quantile=config.waad_quantile,
            delta_quantile=config.delta_quantile,
            **strength,
        )
    if config.strategy == "random":
        return credit.random_tokens(length, generator, **strength)
    if config.strategy == "entropy":
        assert series.entropy is not None
        return credit.high_entropy(series.entropy, **strength)
    gamma = torch.ones(length)
    if config.strategy == "saliency" and restored is not None:
        gamma[: len(restored)] = credit.salient(restored, floor=config.floor)
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
