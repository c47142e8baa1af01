"""Row and column sums of the attention map, computed from q, k and lse without the map: functions and operators.

``atman_kernels::attention_statistics`` takes the operands of ``atman_kernels.ops`` as far as scores need them, and

    lse (B, Hq, Tq)   of the attention whose statistics are wanted
    rows (B, Tq) bool or None   the chosen query rows; None: all
    attention_window   keys that a row of the attention sees, NO_WINDOW for all
    window, low, high, need_distance   see :func:`atman_kernels.attention_statistics`

and returns distance (n_seq, Hq), (0, Hq) unless needed; windowed_distance (B, Hq, Tq); received (B, Hq, Tk);
received_count (B, Tk) int32. It has no gradient.

``atman_kernels::attention_forward_distance`` is the causal attention, which gives o and lse, bit for bit as
``attention_forward`` does, and distance (B, Hq, Tq), sum_s p[t,s] (t - s) of every row. The attention visits all pairs
anyway, so the distance costs next to nothing there and half a forward elsewhere. Only the C++ kernel has it
(:func:`fuses_distance`); it has no gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from atman_kernels import _cpu, ops, reference, trust
from atman_kernels.attention import (
    bounded,
    check_bias_range,
    check_layout,
    checks_values,
    forced_backend,
    scale_of,
)
from atman_kernels.plan import K_START, AttentionPlan, SharedPrefix
from atman_kernels.problem import AttentionProblem, Statistics, StatisticsProblem


class AttentionStatistics(NamedTuple):
    """The results of :func:`attention_statistics`, per query head.

    Attributes:
        distance: (n_seq, Hq), mean over the chosen rows t of sum_s p[t,s] (t - s); 0 where no row is chosen.
        windowed_distance: (Tq_total, Hq), sum_s p[t,s] min(t - s, window) of every row.
        received: (Tk_total, Hq), mean p[t,s] over the chosen rows t with low <= t - s <= high; 0 where there is none.
        received_count: (Tk_total,) int32, how many such rows there are.
    """

    distance: Tensor
    windowed_distance: Tensor
    received: Tensor
    received_count: Tensor


def attention_statistics(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    cu_seqlens_q: Tensor | AttentionPlan | None = None,
    cu_seqlens_k: Tensor | None = None,
    plan: AttentionPlan | None = None,
    key_bias: Tensor | None = None,
    prefix: SharedPrefix | None = None,
    window: int = 10,
    horizon: tuple[int, int] = (10, 100),
    rows: Tensor | None = None,
    sm_scale: float | None = None,
    attention_window: int | None = None,
    need_distance: bool = True,
) -> AttentionStatistics:
    """Backward distance, windowed distance and attention received of causal attention p = exp(scores - lse).

    Memory is linear in the number of tokens. ``windowed_distance`` costs ``window`` keys per row and ``received`` the
    rows of the horizon per key, because a row's p sum to 1; only ``distance`` costs all visible pairs. Results are the
    same bits every time, and carry no gradient.

    Args:
        q: packed queries (Tq_total, Hq, D), after the rotary embedding; dtypes as in ``attention_varlen``.
        k: packed keys (Tk_total, Hkv, D); Hq a multiple of Hkv.
        lse: (Hq, Tq_total) float32 (float64 with float64 inputs), natural log, as ``attention_varlen`` returned it for
            the same operands. A row with lse = -inf saw no key and gives zeros.
        cu_seqlens_q, cu_seqlens_k, plan, key_bias, prefix, sm_scale: as in ``attention_varlen``; positions count
            through the prefix, whose own keys get no ``received``.
        window: W of the windowed distance, in tokens.
        horizon: (low, high), both included: how many tokens after a key the rows stand that ``received`` averages.
        rows: (Tq_total,) bool, the chosen query rows; default: all.
        attention_window: the sliding window of the attention itself; default: none.
        need_distance: False leaves ``distance`` empty, (0, Hq), and saves most of the cost.

    Returns:
        :class:`AttentionStatistics`, float32 (float64 for float64 inputs).

    Raises:
        ValueError: as ``attention_varlen``; an lse or rows of the wrong shape or dtype; a window below 1; a horizon
            that is not 0 <= low <= high.

    Source: "Attention Illuminates LLM Reasoning" (arXiv 2510.13554), equations 7, 9 and 10 for one head.
    """
    plan = check_layout(q, k, k, key_bias, cu_seqlens_q, cu_seqlens_k, plan, prefix, "attention_statistics")
    heads_q = q.shape[1]
    if lse.shape != (heads_q, q.shape[0]):
        raise ValueError(f"lse must have shape {(heads_q, q.shape[0])}, got {tuple(lse.shape)}")
    if checks_values(lse) and bool(lse.isnan().any()):
        raise ValueError(f"lse has {int(lse.isnan().sum())} NaN values")
    if rows is not None and rows.shape != (q.shape[0],):
        raise ValueError(f"rows must have one entry per query row, {q.shape[0]}, got {tuple(rows.shape)}")
    found = statistics_of_rows(
        q[None],
        k[None],
        lse[None],
        plan=plan,
        key_bias=None if key_bias is None else key_bias[None],
        prefix=prefix,
        window=window,
        horizon=horizon,
        rows=None if rows is None else rows[None],
        sm_scale=sm_scale,
        attention_window=attention_window,
        need_distance=need_distance,
    )
    return AttentionStatistics(found.distance, *(x[0] for x in found[1:]))


def statistics_of_rows(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    plan: AttentionPlan,
    key_bias: Tensor | None,
    prefix: SharedPrefix | None,
    window: int,
    horizon: tuple[int, int],
    rows: Tensor | None,
    sm_scale: float | None,
    attention_window: int | None,
    need_distance: bool,
) -> AttentionStatistics:
    """:func:`attention_statistics` of padded batches: tensors have a batch axis first, and a plan says what is where.

    For an lse that the attention has just computed: its values are not checked, NaN give NaN.

    Args:
        q: (B, Tq, Hq, D); k: (B, Tk, Hkv, D); lse: (B, Hq, Tq); key_bias: (B, Tk); rows: (B, Tq) bool.
        plan: from :meth:`AttentionPlan.from_rows`, or of a packed batch where B = 1.

    Returns:
        distance (n_seq, Hq), windowed_distance (B, Tq, Hq), received (B, Tk, Hq), received_count (B, Tk); zeros outside
        the plan's sequences.

    Raises:
        ValueError: as :func:`attention_statistics`, shapes and values of lse apart.
    """
    low, high = horizon
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if not 0 <= low <= high:
        raise ValueError(f"horizon must be (low, high) with 0 <= low <= high, got {horizon}")
    if attention_window is not None and attention_window < 1:
        raise ValueError(f"attention_window must be at least 1, got {attention_window}")
    expected = torch.float64 if q.dtype == torch.float64 else torch.float32
    if lse.dtype != expected or lse.device != q.device:
        raise ValueError(f"lse must be {expected} on {q.device}, got {lse.dtype} on {lse.device}")
    if rows is not None and (rows.dtype != torch.bool or rows.device != q.device):
        raise ValueError(f"rows must be bool on {q.device}, got {rows.dtype} on {rows.device}")
    if key_bias is not None and checks_values(key_bias):
        check_bias_range(key_bias, q)
    distance, windowed, received, count = torch.ops.atman_kernels.attention_statistics.default(
        q.detach(), k.detach(), lse.detach(), None if key_bias is None else key_bias.detach(),
        None if prefix is None else prefix.k, rows, plan.sequences, plan.tiles_q, plan.tiles_k,
        scale_of(q, sm_scale), bounded(attention_window), plan.covers, forced_backend(),
        bounded(window), bounded(low), bounded(high), need_distance,
    )  # fmt: skip
    return AttentionStatistics(distance, windowed.transpose(1, 2), received.transpose(1, 2), count)


def attention_with_distance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    *,
    plan: AttentionPlan,
    prefix: SharedPrefix | None = None,
    sm_scale: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention and, along with it, the backward distance sum_s p[t,s] (t - s) of every row; no gradient.

    The attention visits every pair anyway: the distance costs next to nothing here, and half of an attention's forward
    in :func:`attention_statistics`. For operands that :func:`fuses_distance`, in a model whose attention is observed:
    shapes and values are not checked.

    Args:
        q: (B, Tq, Hq, D); k, v: (B, Tk, Hkv, D); key_bias: (B, Tk) float32; a packed batch has B = 1.
        plan: where the sequences lie; prefix, sm_scale, window: as in ``attention_varlen``.

    Returns:
        o (B, Tq, Hq, D) and lse (B, Hq, Tq), the bits of the attention itself; distance (B, Hq, Tq) float32 in tokens,
        0 in rows without a key.
    """
    prefix_k, prefix_v = (None, None) if prefix is None else (prefix.k, prefix.v)
    o, lse, distance = torch.ops.atman_kernels.attention_forward_distance.default(
        q.detach(), k.detach(), v.detach(), None if key_bias is None else key_bias.detach(), prefix_k, prefix_v,
        plan.sequences, plan.tiles_q, plan.tiles_k, scale_of(q, sm_scale), bounded(window), plan.covers,
    )  # fmt: skip
    return o, lse, distance


def fuses_distance(q: Tensor) -> bool:
    """Whether :func:`attention_with_distance` computes for these queries: where the C++ kernel does."""
    return q.device.type == "cpu" and ops.kernels_for(forced_backend(), q) is _cpu


def mean_of_chosen_rows(values: Tensor, plan: AttentionPlan, rows: Tensor | None) -> Tensor:
    """(n_seq, H) means of ``values`` (B, H, T) over each sequence's chosen rows; 0 where none is chosen.

    Args:
        rows: (B, T) bool; None: all.
    """
    batch, start, length = plan.sequences[:, :K_START].long().unbind(1)
    means = values.new_zeros(len(start), values.shape[1])
    # One after another: a NaN stays in its sequence, and one in a row that was not chosen is not seen.
    for mean, i, first, n in zip(means, batch.tolist(), start.tolist(), length.tolist(), strict=True):
        own = values[i, :, first : first + n]
        own = own if rows is None else own[:, rows[i, first : first + n]]
        if own.shape[1]:
            mean.copy_(own.double().mean(1))
    return means


_library = torch.library.Library("atman_kernels", "FRAGMENT")
_library.define(
    "attention_statistics(Tensor q, Tensor k, Tensor lse, Tensor? key_bias, Tensor? prefix_k, Tensor? rows, "
    "Tensor sequences, Tensor tiles_q, Tensor tiles_k, float sm_scale, SymInt attention_window, bool covers, "
    "str backend, SymInt window, SymInt low, SymInt high, bool need_distance) "
    "-> (Tensor distance, Tensor windowed_distance, Tensor received, Tensor received_count)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "attention_forward_distance(Tensor q, Tensor k, Tensor v, Tensor? key_bias, Tensor? prefix_k, Tensor? prefix_v, "
    "Tensor sequences, Tensor tiles_q, Tensor tiles_k, float sm_scale, SymInt window, bool covers) "
    "-> (Tensor o, Tensor lse, Tensor distance)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _statistics(*operands: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operands of the schema, in its order."""
    *tensors_and_tables, sm_scale, attention_window, covers, backend, window, low, high, need_distance = operands
    x = StatisticsProblem._make((*tensors_and_tables, sm_scale, attention_window, window, (low, high)))
    kernels = ops.kernels_for(backend, x.q, trust.STATISTICS)
    if kernels is None:
        with ops.without_autocast(x.q):
            return reference.attention_statistics(x, need_distance)
    x = x._replace(
        q=ops.unit_stride(x.q),
        k=ops.unit_stride(x.k),
        key_bias=None if x.key_bias is None else ops.unit_stride(x.key_bias),
        prefix_k=None if x.prefix_k is None else ops.unit_stride(x.prefix_k),
        lse=x.lse.contiguous(),
        rows=None if x.rows is None else x.rows.contiguous().view(torch.uint8),
    )
    outputs = _outputs(x.q, x.k, x.sequences, need_distance)
    if not covers:
        for output in outputs[1:]:
            output.zero_()
    kernels.attention_statistics(Statistics(outputs[0] if need_distance else None, *outputs[1:]), x)
    return outputs


def _outputs(q: Tensor, k: Tensor, sequences: Tensor, need_distance: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads_q = q.shape[0], q.shape[2]
    return (
        q.new_empty((sequences.shape[0] if need_distance else 0, heads_q), dtype=dtype),
        q.new_empty((batch, heads_q, q.shape[1]), dtype=dtype),
        q.new_empty((batch, heads_q, k.shape[1]), dtype=dtype),
        q.new_empty((batch, k.shape[1]), dtype=torch.int32),
    )


def _statistics_fake(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(q, k, sequences=rest[4], need_distance=rest[-1])


def _forward_distance(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The operands of the schema, in its order."""
    *tensors, sequences, tiles_q, tiles_k, sm_scale, window, covers = operands
    tensors = [None if tensor is None else ops.unit_stride(tensor) for tensor in tensors]
    x = AttentionProblem._make((*tensors, sequences, tiles_q, tiles_k, sm_scale, True, window))
    o, lse, distance = outputs = _forward_distance_fake(x.q)
    if not covers:
        o.zero_()
        lse.fill_(-torch.inf)
        distance.zero_()
    _cpu.attention_forward(o, lse, x, distance=distance)
    return outputs


def _forward_distance_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = (q.shape[0], q.shape[2], q.shape[1])
    return (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        q.new_empty(rows, dtype=torch.float32),
        q.new_empty(rows, dtype=torch.float32),
    )


_library.impl("attention_statistics", _statistics, "CompositeExplicitAutograd")
_library.impl("attention_forward_distance", _forward_distance, "CPU")
torch.library.register_fake("atman_kernels::attention_forward_distance", _forward_distance_fake, lib=_library)
torch.library.register_fake("atman_kernels::attention_statistics", _statistics_fake, lib=_library)
