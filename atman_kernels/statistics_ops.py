"""The operators behind :func:`atman_kernels.attention_statistics`: schemas, fakes and choice of kernel.

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

from typing import Any

import torch
from torch import Tensor

from atman_kernels import _cpu, ops, reference, trust
from atman_kernels.problem import AttentionProblem, Statistics, StatisticsProblem

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

attention_forward_distance = torch.ops.atman_kernels.attention_forward_distance.default
attention_statistics = torch.ops.atman_kernels.attention_statistics.default


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


def fuses_distance(backend: str, q: Tensor) -> bool:
    """Whether the kernel for this device and forced backend computes distances along with the attention."""
    return q.device.type == "cpu" and ops.kernels_for(backend, q) is _cpu


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
