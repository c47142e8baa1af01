"""Operation counts of the attention operators for ``torch.utils.flop_counter``; importing this module registers them.

A multiplication with its addition counts as 2, as everywhere in PyTorch's counter. Counted are the matrix products over
visible (row, key) pairs: an implementation that recomputes scores or works on hidden pairs of a tile executes more.

Fake and meta tensors have no table to read: there each batch row counts as one sequence that fills it, after the whole
prefix. That is exact for dense batches and the most that a packed one can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from atman_kernels.plan import K_LENGTH, PREFIX_LENGTH, Q_LENGTH, SEQUENCE_COLUMNS
from atman_kernels.problem import NO_WINDOW

__all__ = ["attention_backward_flops", "attention_forward_flops", "attention_statistics_flops", "visible_pairs"]


def visible_pairs(sequences: Tensor | Sequence[Sequence[int]], *, causal: bool, window: int | None) -> tuple[int, int]:
    """(row, key) pairs that a plan's sequences compute: with their own keys, and with those of the shared prefix.

    Args:
        sequences: the plan's table, (n_seq, 7).
        causal, window: as in :func:`atman_kernels.attention_varlen`.
    """
    own = prefix = 0
    for row in sequences.tolist() if isinstance(sequences, Tensor) else sequences:
        length_q, length_k, length_prefix = row[Q_LENGTH], row[K_LENGTH], row[PREFIX_LENGTH]
        if not causal:
            own, prefix = own + length_q * length_k, prefix + length_q * length_prefix
            continue
        end = length_prefix + length_k
        begin = end - length_q
        # Rows see what lies up to their position, less what lies beyond the window.
        seen = _pairs_up_to(begin, end, 0), _pairs_up_to(begin, end, length_prefix)
        hidden = (0, 0)
        if window is not None:
            hidden = _pairs_up_to(begin, end, window), _pairs_up_to(begin, end, window + length_prefix)
        own += seen[1] - hidden[1]
        prefix += seen[0] - seen[1] - (hidden[0] - hidden[1])
    return own, prefix


def _pairs_up_to(begin: int, end: int, back: int) -> int:
    """Sum of max(position + 1 - back, 0) over the positions begin .. end - 1."""
    last, before = max(end - back, 0), max(begin - back, 0)
    return (last * (last + 1) - before * (before + 1)) // 2


def _table(sequences: Tensor, q: Tensor, k: Tensor, prefix_k: Tensor | None) -> list[list[int]]:
    if not sequences.is_meta and not isinstance(sequences, FakeTensor):
        return sequences.tolist()
    row = [0] * SEQUENCE_COLUMNS
    row[Q_LENGTH], row[K_LENGTH] = q.shape[1], k.shape[1]
    row[PREFIX_LENGTH] = 0 if prefix_k is None else prefix_k.shape[0]
    return [row] * q.shape[0]


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
    sequences: Tensor | Sequence[Sequence[int]],
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
    seen = NO_WINDOW if attention_window is None else attention_window
    pairs = sum(visible_pairs(sequences, causal=True, window=seen)) if need_distance else 0
    pairs += sum(visible_pairs(sequences, causal=True, window=min(window, seen)))
    if low < seen:
        pairs += visible_pairs(sequences, causal=True, window=min(high + 1, seen))[0]
        pairs -= visible_pairs(sequences, causal=True, window=low)[0] if low else 0
    return 2 * pairs * heads_q * head_dim


@register_flop_formula(torch.ops.atman_kernels.attention_forward, get_raw=True)
def _forward_formula(q: Tensor, *operands: Any, out_val: Any = None) -> int:
    k, _, _, prefix_k, _, sequences, _, _, _, causal, window = operands[:11]
    own, prefix = visible_pairs(_table(sequences, q, k, prefix_k), causal=causal, window=window)
    return attention_forward_flops(own + prefix, q.shape[2], q.shape[3])


@register_flop_formula(torch.ops.atman_kernels.attention_backward, get_raw=True)
def _backward_formula(do: Tensor, dlse: Any, o: Any, lse: Any, q: Tensor, *operands: Any, out_val: Any = None) -> int:
    k, _, _, prefix_k, _, sequences, _, _, _, causal, window = operands[:11]
    need_dq, need_dk, need_dv, _ = operands[-4:]
    own, prefix = visible_pairs(_table(sequences, q, k, prefix_k), causal=causal, window=window)
    return attention_backward_flops(
        own, prefix, q.shape[2], q.shape[3], need_dq=need_dq, need_dk=need_dk, need_dv=need_dv
    )


@register_flop_formula(torch.ops.atman_kernels.attention_forward_distance, get_raw=True)
def _forward_distance_formula(q: Tensor, *operands: Any, out_val: Any = None) -> int:
    # The distances are sums, not products.
    k, _, _, prefix_k, _, sequences, _, _, _, window, _ = operands
    pairs = sum(visible_pairs(_table(sequences, q, k, prefix_k), causal=True, window=window))
    return attention_forward_flops(pairs, q.shape[2], q.shape[3])


@register_flop_formula(torch.ops.atman_kernels.attention_statistics, get_raw=True)
def _statistics_formula(q: Tensor, *operands: Any, out_val: Any = None) -> int:
    k, _, _, prefix_k, _, sequences, _, _, _, attention_window, _, _, window, low, high, need_distance = operands
    return attention_statistics_flops(
        _table(sequences, q, k, prefix_k),
        q.shape[2],
        q.shape[3],
        attention_window=attention_window,
        window=window,
        horizon=(low, high),
        need_distance=need_distance,
    )
