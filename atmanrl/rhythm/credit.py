"""From series over a rollout's tokens to gamma_t, the factor of each token's advantage: pure functions, no model.

Source: "Attention Illuminates LLM Reasoning" (arXiv 2510.13554, v2), equations 14 to 19; what it leaves open is a named
argument whose default is `atmanrl.config.CreditConfig`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
