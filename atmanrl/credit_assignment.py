"""Gamma of a batch of rollouts by a configured strategy: what the trainer multiplies advantages with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from atmanrl import credit
from atmanrl.attention_series import RolloutSeries
from atmanrl.config import CreditConfig

READ_FROM_ATTENTION = ("local", "global", "coupled")
NEEDS_SERIES = (*READ_FROM_ATTENTION, "entropy")
"""Strategies that read the attention or the logits of a forward pass."""


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
        series: of each rollout, for the strategies in `NEEDS_SERIES`.
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
        gamma = _gamma(config, length, one, values, generator) if length else torch.ones(0)
        found.append(gamma.float().cpu())
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
