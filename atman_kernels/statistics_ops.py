"""The operator behind :func:`atman_kernels.attention_statistics`: schema, fake and choice of kernel.

``atman_kernels::attention_statistics`` takes the operands of ``atman_kernels.ops`` as far as scores need them, and

    lse (B, Hq, Tq)   of the attention whose statistics are wanted
    rows (B, Tq) bool or None   the chosen query rows; None: all
    attention_window   keys that a row of the attention sees, -1 for all
    window, low, high, need_distance   see :func:`atman_kernels.attention_statistics`

and returns distance (n_seq, Hq), (0, Hq) unless needed; windowed_distance (B, Hq, Tq); received (B, Hq, Tk);
received_count (B, Tk) int32. It has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atman_kernels import ops, reference
from atman_kernels.problem import Statistics, StatisticsProblem

_library = torch.library.Library("atman_kernels", "FRAGMENT")
_library.define(
    "attention_statistics(Tensor q, Tensor k, Tensor lse, Tensor? key_bias, Tensor? prefix_k, Tensor? rows, "
    "Tensor sequences, Tensor tiles_q, Tensor tiles_k, float sm_scale, SymInt attention_window, bool covers, "
    "str backend, SymInt window, SymInt low, SymInt high, bool need_distance) "
    "-> (Tensor distance, Tensor windowed_distance, Tensor received, Tensor received_count)"
)

attention_statistics = torch.ops.atman_kernels.attention_statistics.default


def _statistics(*operands: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operands of the schema, in its order."""
    *tensors_and_tables, sm_scale, attention_window, covers, backend, window, low, high, need_distance = operands
    bounds = (sm_scale, None if attention_window < 0 else attention_window, window, (low, high))
    x = StatisticsProblem._make((*tensors_and_tables, *bounds))
    kernels = ops.kernels_for(backend, x.q)
    if kernels is None:
        return reference.attention_statistics(x, need_distance)
    x = x._replace(
        q=ops.unit_stride(x.q),
        k=ops.unit_stride(x.k),
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


for _device in ("CPU", "CUDA"):
    _library.impl("attention_statistics", _statistics, _device)
torch.library.register_fake("atman_kernels::attention_statistics", _statistics_fake, lib=_library)
