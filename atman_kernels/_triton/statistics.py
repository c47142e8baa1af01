"""Attention statistics: weighted row sums and banded column sums of p, recomputed tile by tile from q, k and lse.

The distance of a row needs all its keys. Its windowed distance is W - sum p max(W - d, 0), because the p of a row sum
to 1, and so needs the W nearest keys only; what a key receives needs the rows of its horizon. Each output is owned by
one program: no atomics, and the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atman_kernels._triton.blocks import block_sizes
from atman_kernels._triton.column_statistics import column_statistics_kernel, count_rows_kernel
from atman_kernels._triton.launch import Launch, strides_of
from atman_kernels._triton.operands import attention_operands, streamed_operands
from atman_kernels._triton.row_statistics import mean_distance_kernel, row_statistics_kernel
from atman_kernels.plan import TILE
from atman_kernels.problem import AttentionProblem, Statistics, StatisticsProblem


def statistics_launches(family: str, out: Statistics, x: StatisticsProblem) -> list[Launch]:
    """The launches, in order, that fill the contiguous outputs for a device family.

    ``rows`` is uint8, ``lse`` contiguous. Scratch memory: one fp32 number per row and head if the distance is wanted.
    The tiles are those of the forward and of the key-owned backward kernel, which hold more.
    """
    heads_q = x.q.shape[2]
    blocks = block_sizes(family, "forward", x.q.shape[3], x.q.dtype)
    attention = AttentionProblem(
        x.q, x.k, x.k, x.key_bias, x.prefix_k, x.prefix_k, x.sequences, x.tiles_q, x.tiles_k,
        x.sm_scale, True, x.attention_window,
    )  # fmt: skip
    common = {
        **attention_operands(attention),
        **streamed_operands(family, blocks, attention),
        "lse_ptr": x.lse,
        "rows_ptr": x.lse if x.rows is None else x.rows,
        "HAS_ROWS": x.rows is not None,
        **strides_of("l", x.lse, "bh"),
        **strides_of("r", x.rows, "b"),
        "BLOCK_M": blocks.block_m,
        "BLOCK_N": blocks.block_n,
    }

    def row_launch(out: Tensor, bound: int | None, near: bool) -> Launch:
        arguments = {
            **common,
            **attention_operands(attention._replace(window=bound)),
            "out_ptr": out,
            "tiles_ptr": x.tiles_q,
            "NEAR": near,
        }
        programs = x.tiles_q.shape[0] * (TILE // blocks.block_m) * heads_q
        return _launch(row_statistics_kernel, programs, arguments, blocks.num_warps, blocks.num_stages)

    launches = []
    if out.distance is not None:
        row_distance = torch.empty_like(x.lse)
        launches.append(row_launch(row_distance, x.attention_window, near=False))
        arguments = {**common, "distance_ptr": out.distance, "row_distance_ptr": row_distance, "BLOCK": TILE}
        launches.append(_launch(mean_distance_kernel, x.sequences.shape[0] * heads_q, arguments, 4, 1))
    near = x.window if x.attention_window is None else min(x.window, x.attention_window)
    launches.append(row_launch(out.windowed_distance, near, near=True))
    common |= {
        "count_ptr": out.received_count,
        "tiles_ptr": x.tiles_k,
        **strides_of("c", out.received_count, "b"),
        "low": x.horizon[0],
        "high": x.horizon[1],
    }
    launches.append(_launch(count_rows_kernel, x.tiles_k.shape[0], {**common, "BLOCK": TILE}, 4, 1))
    blocks = block_sizes(family, "backward_keys", x.q.shape[3], x.q.dtype)
    arguments = {
        **common,
        "received_ptr": out.received,
        **strides_of("e", out.received, "bh"),
        "BLOCK_M": blocks.block_m,
        "BLOCK_N": blocks.block_n,
    }
    programs = x.tiles_k.shape[0] * (TILE // blocks.block_n) * heads_q
    launches.append(_launch(column_statistics_kernel, programs, arguments, blocks.num_warps, blocks.num_stages))
    return launches


def _launch(kernel: object, programs: int, arguments: dict[str, object], num_warps: int, num_stages: int) -> Launch:
    """A launch with those of the arguments that the kernel has: these kernels take no values and no output o."""
    return Launch(kernel, programs, {name: arguments[name] for name in kernel.arg_names}, num_warps, num_stages)
