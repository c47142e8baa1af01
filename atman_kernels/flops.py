"""Operation counts of the attention operators for ``torch.utils.flop_counter``; importing this module registers them.

A multiplication with its addition counts as 2, as everywhere in PyTorch's counter. Counted are the matrix products
over visible (row, key) pairs: an implementation that recomputes scores or
works on hidden pairs of a tile executes more.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from atman_kernels.plan import K_LENGTH, PREFIX_LENGTH, Q_LENGTH

__all__ = ["attention_backward_flops", "attention_forward_flops", "attention_statistics_flops", "visible_pairs"]


def visible_pairs(sequences: Tensor, *, causal: bool, window: int | None) -> tuple[int, int]:
    """(row, key) pairs that a plan's sequences compute: with their own keys, and with those of the shared prefix.

    Args:
        sequences: the plan's table, (n_seq, 7).
        causal, window: as in :func:`atman_kernels.attention_varlen`.
    """
    own = prefix = 0
    for row in sequences.tolist():
        length_q, length_k, length_prefix = row[Q_LENGTH], row[K_LENGTH], row[PREFIX_LENGTH]
        if not causal:
            own, prefix = own + length_q * length_k, prefix + length_q * length_prefix
            continue
        position = torch.arange(length_q) + (length_prefix + length_k - length_q)
        first = torch.zeros_like(position) if window is None else (position - window + 1).clamp(min=0)
        own += int((position + 1 - first.clamp(min=length_prefix)).clamp(min=0).sum())
        prefix += int((position.clamp(max=length_prefix - 1) + 1 - first).clamp(min=0).sum())
    return own, prefix


def attention_forward_flops(pairs: int, heads_q: int, head_dim: int) -> int:
    """4 Hq D per visible pair: scores and weighted values."""
    return 4 * pairs * heads_q * head_dim


def attention_backward_flops(
    own: int, prefix: int, heads_q: int, head_dim: int, *, need_dq: bool, need_dk: bool, need_dv: bool
) -> int:
    """Per visible pair 4 Hq D for the scores and dp, and 2 Hq D for each of dq, dk and dv that is needed.

    Keys of the shared prefix get no dk and dv; dkey_bias is a sum, not a product.
    """
    products_own = 2 + need_dq + need_dk + need_dv
    products_prefix = 2 + need_dq
    return 2 * heads_q * head_dim * (products_own * own + products_prefix * prefix)


def attention_statistics_flops(
    sequences: Tensor,
    heads_q: int,
    head_dim: int,
    *,
    attention_window: int | None,
    window: int,
    horizon: tuple[int, int],
    need_distance: bool,
) -> int:
    """2 Hq D per (row, key) pair whose score is needed, for each of the statistics that are asked for.

    The distance needs all visible pairs, the windowed distance those less than ``window`` apart, and what a key of the
    sequence itself receives those of the horizon. Arguments as in :func:`atman_kernels.attention_statistics`.
    """
    low, high = horizon
    seen = attention_window or sys.maxsize
    pairs = sum(visible_pairs(sequences, causal=True, window=attention_window)) if need_distance else 0
    pairs += sum(visible_pairs(sequences, causal=True, window=min(window, seen)))
    if low < seen:
        pairs += visible_pairs(sequences, causal=True, window=min(high + 1, seen))[0]
        pairs -= visible_pairs(sequences, causal=True, window=low)[0] if low else 0
    return 2 * pairs * heads_q * head_dim


@register_flop_formula(torch.ops.atman_kernels.attention_forward, get_raw=True)
def _forward_formula(q: Tensor, *operands: Any, out_val: Any = None) -> int:
    sequences, _, _, _, causal, window = operands[5:11]
    own, prefix = visible_pairs(sequences, causal=causal, window=None if window < 0 else window)
    return attention_forward_flops(own + prefix, q.shape[2], q.shape[3])


@register_flop_formula(torch.ops.atman_kernels.attention_backward, get_raw=True)
def _backward_formula(do: Tensor, dlse: Any, o: Any, lse: Any, q: Tensor, *operands: Any, out_val: Any = None) -> int:
    sequences, _, _, _, causal, window = operands[5:11]
    need_dq, need_dk, need_dv, _ = operands[-4:]
    own, prefix = visible_pairs(sequences, causal=causal, window=None if window < 0 else window)
    return attention_backward_flops(
        own, prefix, q.shape[2], q.shape[3], need_dq=need_dq, need_dk=need_dk, need_dv=need_dv
    )


@register_flop_formula(torch.ops.atman_kernels.attention_forward_distance, get_raw=True)
def _forward_distance_formula(q: Tensor, *operands: Any, out_val: Any = None) -> int:
    # The distances are sums, not products.
    sequences, _, _, _, window, _ = operands[5:11]
    pairs = sum(visible_pairs(sequences, causal=True, window=None if window < 0 else window))
    return attention_forward_flops(pairs, q.shape[2], q.shape[3])


@register_flop_formula(torch.ops.atman_kernels.attention_statistics, get_raw=True)
def _statistics_formula(q: Tensor, *operands: Any, out_val: Any = None) -> int:
    sequences, _, _, _, attention_window, _, _, window, low, high, need_distance = operands[5:]
    return attention_statistics_flops(
        sequences,
        q.shape[2],
        q.shape[3],
        attention_window=None if attention_window < 0 else attention_window,
        window=window,
        horizon=(low, high),
        need_distance=need_distance,
    )
