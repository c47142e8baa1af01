"""The definition of attention with a key bias, in plain PyTorch: the oracle that every kernel is tested against.

For query row w, key column v and head h of one sequence, with h' the key/value head of h::

    s[h,w,v] = sm_scale * <q[h,w], k[h',v]> + key_bias[v]      for visible v
    p = softmax_v(s);   o[h,w] = sum_v p[h,w,v] v[h',v];   lse[h,w] = logsumexp_v s[h,w,v]

This module materialises the scores and works in any float dtype: products in the dtype of the inputs, softmax in fp32
(fp64 for fp64 inputs).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from atman_kernels.problem import LARGEST_LSE, AttentionProblem, StatisticsProblem

__all__ = ["attention", "attention_backward", "attention_forward", "attention_statistics", "visible_keys"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None = None,
    *,
    causal: bool = True,
    sm_scale: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
    prefix_length: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(sm_scale q k^T + key_bias) v, differentiable by autograd in q, k, v and key_bias.

    Args:
        q: queries, (B, Tq, Hq, D), any float dtype.
        k, v: keys and values, (B, Tk, Hkv, D), Hq a multiple of Hkv.
        key_bias: (B, Tk), natural-log units, added after the scale; the same for all heads and rows. None: zero.
        causal: row w sees the keys up to its own position; Tq != Tk aligns the edge bottom-right.
        sm_scale: default 1 / sqrt(D).
        window: with ``causal``, a row sees the ``window`` nearest keys including its own.
        return_lse: also return the logsumexp of the scores.
        prefix_length: how many of the leading keys are a prefix; see :func:`visible_keys`.

    Returns:
        o (B, Tq, Hq, D) in the dtype of q, and with ``return_lse`` lse (B, Hq, Tq) in fp32 (fp64 for fp64 inputs).
        A row that sees no key gives o = 0, lse = -inf and zero gradients.

    Source: AtManRL (arXiv 2604.16158), with H^AtMan constant along each column.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if sm_scale is None else sm_scale
    visible = visible_keys(
        q.shape[1], k.shape[1] - prefix_length, prefix_length, causal=causal, window=window, device=q.device
    )
    scores = _scores(_group_heads(q, k.shape[2]), k, key_bias, scale, visible)
    p, lse = _softmax(scores)
    o = torch.einsum("b h g q k, b k h d -> b q h g d", p.to(v.dtype), v)
    o = o.flatten(2, 3)
    return (o, lse.flatten(1, 2)) if return_lse else o


def visible_keys(
    length_q: int,
    length_k: int,
    prefix_length: int = 0,
    *,
    causal: bool,
    window: int | None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """(Tq, P + Tk) bool: which keys a row sees, the P prefix keys standing first.

    Positions count through the prefix: key j of the sequence itself has position P + j, row i has position
    P + Tk - Tq + i. Causal rows see positions up to their own; a window W keeps the last W of them.
    """
    row = torch.arange(length_q, device=device)[:, None] + (prefix_length + length_k - length_q)
    key = torch.arange(prefix_length + length_k, device=device)[None, :]
    if not causal:
        return torch.ones(length_q, prefix_length + length_k, dtype=torch.bool, device=device)
    seen = key <= row
    return seen if window is None else seen & (row - key < window)


class _Span(NamedTuple):
    """One sequence of the plan as index expressions into the packed tensors."""

    batch: int
    queries: slice
    keys: slice
    prefix: slice


def attention_forward(x: AttentionProblem) -> tuple[Tensor, Tensor]:
    """The forward operator over a plan's sequence table."""
    q = x.q
    o = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=_softmax_dtype(q.dtype), device=q.device)
    for span in _spans(x.sequences):
        o_i, lse_i = attention(
            q[span.batch, None, span.queries],
            _with_prefix(x.prefix_k, x.k, span),
            _with_prefix(x.prefix_v, x.v, span),
            _bias_with_prefix(x.key_bias, span),
            causal=x.causal,
            sm_scale=x.sm_scale,
            window=x.window,
            return_lse=True,
            prefix_length=span.prefix.stop - span.prefix.start,
        )
        o[span.batch, span.queries] = o_i[0]
        lse[span.batch, :, span.queries] = lse_i[0]
    return o, lse


def attention_backward(do: Tensor, dlse: Tensor | None, x: AttentionProblem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward operator over a plan's sequence table, by the explicit formulas; always all four gradients.

    With dp = do v^T and delta = sum_v p dp::

        ds = p (dp - delta + dlse);  dq = sm_scale ds k;  dk = sm_scale ds^T q;  dv = p^T do
        dkey_bias[v] = sum_h sum_w ds[h,w,v]

    ``dkey_bias`` is summed in the softmax dtype from unrounded ds.
    """
    q, k, v, sm_scale = x.q, x.k, x.v, x.sm_scale
    heads_kv = k.shape[2]
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    dkey_bias = torch.zeros(k.shape[:2], dtype=_softmax_dtype(q.dtype), device=q.device)
    for span in _spans(x.sequences):
        n_prefix = span.prefix.stop - span.prefix.start
        q_i = _group_heads(q[span.batch, None, span.queries], heads_kv)
        do_i = _group_heads(do[span.batch, None, span.queries], heads_kv)
        k_i, v_i = _with_prefix(x.prefix_k, k, span), _with_prefix(x.prefix_v, v, span)
        visible = visible_keys(
            q_i.shape[1], k_i.shape[1] - n_prefix, n_prefix, causal=x.causal, window=x.window, device=q.device
        )
        p, _ = _softmax(_scores(q_i, k_i, _bias_with_prefix(x.key_bias, span), sm_scale, visible))
        dp = torch.einsum("b q h g d, b k h d -> b h g q k", do_i, v_i).to(p.dtype)
        row_term = (p * dp).sum(-1, keepdim=True)
        if dlse is not None:
            # (1, Hq, Tq) as the (1, Hkv, group, Tq, 1) of row_term.
            row_term = row_term - dlse[span.batch, None, :, span.queries].view(*row_term.shape)
        ds = p * (dp - row_term)
        ds_rounded = (ds * sm_scale).to(q.dtype)
        dq_i = torch.einsum("b h g q k, b k h d -> b q h g d", ds_rounded, k_i)
        dk_i = torch.einsum("b h g q k, b q h g d -> b k h d", ds_rounded, q_i)
        dv_i = torch.einsum("b h g q k, b q h g d -> b k h d", p.to(do.dtype), do_i)
        dq[span.batch, span.queries] = dq_i[0].flatten(1, 2)
        dk[span.batch, span.keys] = dk_i[0, n_prefix:]
        dv[span.batch, span.keys] = dv_i[0, n_prefix:]
        dkey_bias[span.batch, span.keys] = ds[..., n_prefix:].sum((0, 1, 2, 3))
    return dq, dk, dv, dkey_bias


def attention_statistics(x: StatisticsProblem, need_distance: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row and column sums of the attention map, from the map itself; see ``atman_kernels.statistics``.

    With p = exp(scores - lse), or the softmax of the scores where lse is beyond LARGEST_LSE, and d the distance from a
    row back to a key::

        distance = mean over chosen rows of sum_v p d;  windowed_distance = sum_v p min(d, window)
        received[v] = mean over chosen rows with low <= d <= high of p
    """
    q, k, lse = x.q, x.k, x.lse
    heads_q, heads_kv = q.shape[2], k.shape[2]
    n_seq = x.sequences.shape[0]
    dtype = _softmax_dtype(q.dtype)
    distance = torch.zeros(n_seq if need_distance else 0, heads_q, dtype=dtype, device=q.device)
    windowed = torch.zeros(lse.shape, dtype=dtype, device=q.device)
    received = torch.zeros(k.shape[0], heads_q, k.shape[1], dtype=dtype, device=q.device)
    received_count = torch.zeros(k.shape[:2], dtype=torch.int32, device=q.device)
    low, high = x.horizon
    for i, span in enumerate(_spans(x.sequences)):
        n_prefix = span.prefix.stop - span.prefix.start
        q_i, k_i = q[span.batch, None, span.queries], _with_prefix(x.prefix_k, k, span)
        n_rows, n_keys = q_i.shape[1], k_i.shape[1]
        visible = visible_keys(
            n_rows, n_keys - n_prefix, n_prefix, causal=True, window=x.attention_window, device=q.device
        )
        scores = _scores(_group_heads(q_i, heads_kv), k_i, _bias_with_prefix(x.key_bias, span), x.sm_scale, visible)
        scores = scores[0].flatten(0, 1)
        lse_i = lse[span.batch, :, span.queries, None]
        p = torch.exp(scores - lse_i.masked_fill(lse_i == -torch.inf, torch.inf))
        p = torch.where(lse_i.isfinite() & (lse_i.abs() > LARGEST_LSE), _softmax(scores)[0], p)
        d = torch.arange(n_rows, device=q.device)[:, None] + (n_keys - n_rows) - torch.arange(n_keys, device=q.device)
        chosen = torch.ones(n_rows, dtype=torch.bool, device=q.device)
        if x.rows is not None:
            chosen = x.rows[span.batch, span.queries]
        if need_distance and chosen.any():
            distance[i] = (p * d).sum(-1)[:, chosen].mean(-1)
        windowed[span.batch, :, span.queries] = (p * d.clamp(max=x.window)).sum(-1)
        counted = chosen[:, None] & (d >= low) & (d <= high)
        count = counted.sum(0)
        mean = (p * counted).sum(1) / count.clamp(min=1)
        received[span.batch, :, span.keys] = mean[:, n_prefix:]
        received_count[span.batch, span.keys] = count[n_prefix:].to(torch.int32)
    return distance, windowed, received, received_count


def _group_heads(x: Tensor, heads_kv: int) -> Tensor:
    """(B, Tq, Hq, D) as (B, Tq, Hkv, group, D)."""
    return x.view(*x.shape[:2], heads_kv, x.shape[2] // heads_kv, x.shape[3])


def _scores(q: Tensor, k: Tensor, key_bias: Tensor | None, sm_scale: float, visible: Tensor) -> Tensor:
    scores = torch.einsum("b q h g d, b k h d -> b h g q k", q, k).to(_softmax_dtype(q.dtype)) * sm_scale
    if key_bias is not None:
        scores = scores + key_bias[:, None, None, None, :]
    return scores.masked_fill(~visible, -torch.inf)


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and logsumexp over the last axis; rows of nothing but -inf give p = 0, lse = -inf and zero gradients."""
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], -torch.inf)
    highest = scores.detach().amax(-1, keepdim=True)
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    e = torch.exp(scores - highest)
    total = e.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (highest + total.log()).masked_fill(empty, -torch.inf)
    return e / total, lse.squeeze(-1)


def _softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _spans(sequences: Tensor) -> list[_Span]:
    return [
        _Span(
            batch,
            slice(q_start, q_start + q_length),
            slice(k_start, k_start + k_length),
            slice(prefix_start, prefix_start + prefix_length),
        )
        for batch, q_start, q_length, k_start, k_length, prefix_start, prefix_length in sequences.tolist()
    ]


def _with_prefix(prefix: Tensor | None, own: Tensor, span: _Span) -> Tensor:
    keys = own[span.batch, span.keys]
    return (keys if prefix is None else torch.cat([prefix[span.prefix], keys]))[None]


def _bias_with_prefix(key_bias: Tensor | None, span: _Span) -> Tensor | None:
    if key_bias is None:
        return None
    bias = key_bias[span.batch, span.keys]
    return torch.cat([bias.new_zeros(span.prefix.stop - span.prefix.start), bias])[None]
