"""Attention statistics: weighted row sums and banded column sums of p, recomputed tile by tile from q, k and lse.

The distance of a row needs all its keys. Its windowed distance is W - sum p max(W - d, 0), because the p of a row sum
to 1, and so needs the W nearest keys only; what a key receives needs the rows of its horizon. Each output is owned by
one program: no atomics, and the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from atman_kernels._triton.forward import attention_operands
from atman_kernels._triton.launch import Launch, strides_of
from atman_kernels._triton.tiles import (
    BATCH,
    K_LENGTH,
    K_START,
    LOG2_E,
    PREFIX_LENGTH,
    PREFIX_START,
    Q_LENGTH,
    Q_START,
    SEQUENCE_COLUMNS,
    block_sizes,
    count_tiles,
    is_visible,
    key_bounds,
    load_rows,
    locate_tile,
    tile_bounds,
    tile_start,
)
from atman_kernels.plan import TILE


@triton.jit
def _weighted_sum(
    total,
    q,
    lse_log2,
    first_position,
    last_position,
    k_base,
    bias_base,
    stride_kt,
    stride_bt,
    n_keys,
    sm_scale,
    window,
    reach,
    HAS_KEY_BIAS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    NEAR: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add sum_v p d (NEAR: p max(reach - d, 0)) over one run of keys; positions count from its first key."""
    offs_n = tl.arange(0, BLOCK_N)
    row_position = first_position + tl.arange(0, BLOCK_M)
    begin, full_begin, full_end, end = key_bounds(
        first_position, last_position, n_keys, window, True, HAS_WINDOW, BLOCK_N
    )
    for MASKED in tl.static_range(2):
        for tile in range(count_tiles(begin, full_begin, full_end, end, MASKED, BLOCK_N)):
            start = tile_start(tile, begin, full_begin, full_end, MASKED, BLOCK_N)
            k = load_rows(k_base, start, n_keys, stride_kt, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D)
            scores_log2 = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (sm_scale * LOG2_E)
            if HAS_KEY_BIAS:
                bias_ptrs = bias_base + (start + offs_n) * stride_bt
                bias = tl.load(bias_ptrs, mask=start + offs_n < n_keys, other=0.0) if MASKED else tl.load(bias_ptrs)
                scores_log2 += (bias * LOG2_E)[None, :]
            p = tl.exp2(scores_log2 - lse_log2[:, None])
            distance = row_position[:, None] - (start + offs_n)[None, :]
            if MASKED:
                seen = is_visible(row_position[:, None], (start + offs_n)[None, :], n_keys, window, True, HAS_WINDOW)
                p = tl.where(seen, p, 0.0)
            weight = tl.maximum(reach - distance, 0) if NEAR else distance
            total += tl.sum(p * weight.to(tl.float32), 1)
    return total


@triton.jit(do_not_specialize=["stride_lb", "stride_lh", "stride_rb", "stride_bb", "window", "reach"])
def row_statistics_kernel(
    out_ptr,
    lse_ptr,
    rows_ptr,
    q_ptr,
    k_ptr,
    key_bias_ptr,
    prefix_k_ptr,
    sequences_ptr,
    tiles_ptr,
    stride_lb,
    stride_lh,
    stride_rb,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_bb,
    stride_bt,
    stride_pkt,
    stride_pkh,
    sm_scale,
    window,
    reach,
    HEADS_Q: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    NEAR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The distance (NEAR: the windowed distance) of a tile of rows of one head; ``out`` is laid out as ``lse``.

    Distances of rows that are not chosen are 0, and tiles without a chosen row cost nothing.
    """
    head, sequence, first = locate_tile(tiles_ptr, sequences_ptr, HEADS_Q, BLOCK_M)
    if sequence < 0:
        return
    row_ptr = sequences_ptr + sequence * SEQUENCE_COLUMNS
    n_rows = tl.load(row_ptr + Q_LENGTH)
    if first >= n_rows:
        return
    batch = tl.load(row_ptr + BATCH).to(tl.int64)
    q_start = tl.load(row_ptr + Q_START).to(tl.int64)
    k_start = tl.load(row_ptr + K_START).to(tl.int64)
    n_keys = tl.load(row_ptr + K_LENGTH)
    head_kv = (head // GROUP).to(tl.int64)
    rows = first + tl.arange(0, BLOCK_M)
    row_offset = batch * stride_lb + head.to(tl.int64) * stride_lh + q_start
    inside = rows < n_rows
    lse_log2 = tl.load(lse_ptr + row_offset + rows, mask=inside, other=float("-inf")) * LOG2_E
    without_key = lse_log2 == float("-inf")
    lse_log2 = tl.where(without_key, float("inf"), lse_log2)
    if HAS_ROWS and not NEAR:
        chosen = tl.load(rows_ptr + batch * stride_rb + q_start + rows, mask=inside, other=0) != 0
        lse_log2 = tl.where(chosen, lse_log2, float("inf"))
        if tl.max(chosen.to(tl.int32), 0) == 0:
            tl.store(out_ptr + row_offset + rows, tl.zeros([BLOCK_M], tl.float32), mask=inside)
            return

    q_base = q_ptr + batch * stride_qb + q_start * stride_qt + head.to(tl.int64) * stride_qh
    q = load_rows(q_base, first, n_rows, stride_qt, True, BLOCK_M, HEAD_DIM, BLOCK_D)
    total = tl.zeros([BLOCK_M], tl.float32)
    # Positions relative to the sequence's own first key; the prefix lies before it.
    first_position = first + (n_keys - n_rows)
    last_position = tl.minimum(first + BLOCK_M, n_rows) - 1 + (n_keys - n_rows)
    if HAS_PREFIX:
        n_prefix = tl.load(row_ptr + PREFIX_LENGTH)
        prefix_start = tl.load(row_ptr + PREFIX_START).to(tl.int64)
        total = _weighted_sum(
            total,
            q,
            lse_log2,
            first_position + n_prefix,
            last_position + n_prefix,
            prefix_k_ptr + prefix_start * stride_pkt + head_kv * stride_pkh,
            key_bias_ptr,
            stride_pkt,
            stride_bt,
            n_prefix,
            sm_scale,
            window,
            reach,
            False,
            HAS_WINDOW,
            NEAR,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            PRECISION,
        )
    total = _weighted_sum(
        total,
        q,
        lse_log2,
        first_position,
        last_position,
        k_ptr + batch * stride_kb + k_start * stride_kt + head_kv * stride_kh,
        key_bias_ptr + batch * stride_bb + k_start * stride_bt,
        stride_kt,
        stride_bt,
        n_keys,
        sm_scale,
        window,
        reach,
        HAS_KEY_BIAS,
        HAS_WINDOW,
        NEAR,
        HEAD_DIM,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        PRECISION,
    )
    if NEAR:
        total = tl.where(without_key, 0.0, reach - total)
    tl.store(out_ptr + row_offset + rows, total, mask=inside)


@triton.jit(do_not_specialize=["stride_lb", "stride_lh", "stride_rb"])
def mean_distance_kernel(
    distance_ptr,
    row_distance_ptr,
    rows_ptr,
    sequences_ptr,
    stride_lb,
    stride_lh,
    stride_rb,
    HEADS_Q: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mean over the chosen rows of one sequence and head; 0 where none is chosen."""
    program = tl.program_id(0)
    head, sequence = program % HEADS_Q, program // HEADS_Q
    row_ptr = sequences_ptr + sequence * SEQUENCE_COLUMNS
    batch = tl.load(row_ptr + BATCH).to(tl.int64)
    q_start = tl.load(row_ptr + Q_START).to(tl.int64)
    n_rows = tl.load(row_ptr + Q_LENGTH)
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = rows < n_rows
        offset = batch * stride_lb + head.to(tl.int64) * stride_lh + q_start
        total += tl.load(row_distance_ptr + offset + rows, mask=inside, other=0.0)
        if HAS_ROWS:
            chosen = tl.load(rows_ptr + batch * stride_rb + q_start + rows, mask=inside, other=0) != 0
            count += chosen.to(tl.int32)
        else:
            count += inside.to(tl.int32)
    mean = tl.sum(total, 0) / tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    tl.store(distance_ptr + program, mean)


@triton.jit(do_not_specialize=["stride_rb", "stride_cb", "low", "high"])
def count_rows_kernel(
    count_ptr,
    rows_ptr,
    sequences_ptr,
    tiles_ptr,
    stride_rb,
    stride_cb,
    low,
    high,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many chosen rows stand ``low`` to ``high`` positions after each of a tile of own keys."""
    _, sequence, first = locate_tile(tiles_ptr, sequences_ptr, 1, BLOCK)
    if sequence < 0:
        return
    row_ptr = sequences_ptr + sequence * SEQUENCE_COLUMNS
    batch = tl.load(row_ptr + BATCH).to(tl.int64)
    n_keys = tl.load(row_ptr + K_LENGTH)
    n_rows = tl.load(row_ptr + Q_LENGTH)
    keys = first + tl.arange(0, BLOCK)
    # The first row of each key's horizon, and one past the last.
    begin = keys + low - (n_keys - n_rows)
    end = keys + high - (n_keys - n_rows) + 1
    count = tl.maximum(tl.minimum(end, n_rows) - tl.maximum(begin, 0), 0)
    if HAS_ROWS:
        count = tl.zeros([BLOCK], tl.int32)
        rows_base = rows_ptr + batch * stride_rb + tl.load(row_ptr + Q_START).to(tl.int64)
        for start in range(tl.maximum(tl.min(begin, 0), 0), tl.minimum(tl.max(end, 0), n_rows), BLOCK):
            rows = start + tl.arange(0, BLOCK)
            chosen = tl.load(rows_base + rows, mask=rows < n_rows, other=0) != 0
            counted = chosen[None, :] & (rows[None, :] >= begin[:, None]) & (rows[None, :] < end[:, None])
            count += tl.sum(counted.to(tl.int32), 1)
    k_start = tl.load(row_ptr + K_START).to(tl.int64)
    tl.store(count_ptr + batch * stride_cb + k_start + keys, count, mask=keys < n_keys)


@triton.jit(
    do_not_specialize=[
        *("stride_lb", "stride_lh", "stride_rb", "stride_eb", "stride_eh", "stride_cb"),
        *("stride_bb", "window", "low", "high"),
    ]
)
def column_statistics_kernel(
    received_ptr,
    count_ptr,
    lse_ptr,
    rows_ptr,
    q_ptr,
    k_ptr,
    key_bias_ptr,
    sequences_ptr,
    tiles_ptr,
    stride_lb,
    stride_lh,
    stride_rb,
    stride_eb,
    stride_eh,
    stride_cb,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_bb,
    stride_bt,
    sm_scale,
    window,
    low,
    high,
    HEADS_Q: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The mean p that a tile of own keys receives from the chosen rows ``low`` to ``high`` positions later."""
    head, sequence, first = locate_tile(tiles_ptr, sequences_ptr, HEADS_Q, BLOCK_N)
    if sequence < 0:
        return
    row_ptr = sequences_ptr + sequence * SEQUENCE_COLUMNS
    n_keys = tl.load(row_ptr + K_LENGTH)
    if first >= n_keys:
        return
    batch = tl.load(row_ptr + BATCH).to(tl.int64)
    q_start = tl.load(row_ptr + Q_START).to(tl.int64)
    k_start = tl.load(row_ptr + K_START).to(tl.int64)
    n_rows = tl.load(row_ptr + Q_LENGTH)
    head_kv = (head // GROUP).to(tl.int64)

    k_base = k_ptr + batch * stride_kb + k_start * stride_kt + head_kv * stride_kh
    k = load_rows(k_base, first, n_keys, stride_kt, True, BLOCK_N, HEAD_DIM, BLOCK_D)
    keys = first + tl.arange(0, BLOCK_N)
    if HAS_KEY_BIAS:
        bias_ptrs = key_bias_ptr + batch * stride_bb + (k_start + keys) * stride_bt
        bias_log2 = tl.load(bias_ptrs, mask=keys < n_keys, other=0.0) * LOG2_E
    q_base = q_ptr + batch * stride_qb + q_start * stride_qt + head.to(tl.int64) * stride_qh
    lse_base = lse_ptr + batch * stride_lb + head.to(tl.int64) * stride_lh + q_start
    rows_base = rows_ptr + batch * stride_rb + q_start
    total = tl.zeros([BLOCK_N], tl.float32)
    offs_m = tl.arange(0, BLOCK_M)
    shift = n_keys - n_rows
    last_key = tl.minimum(first + BLOCK_N, n_keys) - 1
    # With a window in the attention, rows beyond it have p = 0.
    last = tl.minimum(high, window - 1) if HAS_WINDOW else high
    begin, full_begin, full_end, end = tile_bounds(
        first + low - shift,
        last_key + low - shift,
        first + last - shift + 1,
        last_key + last - shift + 1,
        n_rows,
        BLOCK_M,
    )
    for MASKED in tl.static_range(2):
        for tile in range(count_tiles(begin, full_begin, full_end, end, MASKED, BLOCK_M)):
            start = tile_start(tile, begin, full_begin, full_end, MASKED, BLOCK_M)
            rows = start + offs_m
            q = load_rows(q_base, start, n_rows, stride_qt, MASKED, BLOCK_M, HEAD_DIM, BLOCK_D)
            lse_log2 = tl.load(lse_base + rows, mask=rows < n_rows, other=float("-inf")) * LOG2_E
            absent = lse_log2 == float("-inf")
            if HAS_ROWS:
                absent |= tl.load(rows_base + rows, mask=rows < n_rows, other=0) == 0
            # p is 0 in rows that are not chosen or see no key.
            lse_log2 = tl.where(absent, float("inf"), lse_log2)
            # Scores transposed, (BLOCK_N, BLOCK_M): the sums then stay inside a warp.
            scores_log2 = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (sm_scale * LOG2_E)
            if HAS_KEY_BIAS:
                scores_log2 += bias_log2[:, None]
            p = tl.exp2(scores_log2 - lse_log2[None, :])
            if MASKED:
                distance = (rows + shift)[None, :] - keys[:, None]
                p = tl.where((distance >= low) & (distance <= last), p, 0.0)
            total += tl.sum(p, 1)

    inside = keys < n_keys
    count = tl.load(count_ptr + batch * stride_cb + k_start + keys, mask=inside, other=1)
    received_base = received_ptr + batch * stride_eb + head.to(tl.int64) * stride_eh + k_start
    tl.store(received_base + keys, total / tl.maximum(count, 1).to(tl.float32), mask=inside)


def statistics_launches(
    family: str,
    distance: Tensor | None,
    windowed: Tensor,
    received: Tensor,
    received_count: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    key_bias: Tensor | None,
    prefix_k: Tensor | None,
    rows: Tensor | None,
    sequences: Tensor,
    tiles_q: Tensor,
    tiles_k: Tensor,
    sm_scale: float,
    attention_window: int | None,
    window: int,
    horizon: tuple[int, int],
) -> list[Launch]:
    """The launches, in order, that fill the contiguous outputs for a device family.

    ``rows`` is uint8, ``lse`` contiguous. Scratch memory: one fp32 number per row and head if ``distance`` is wanted.
    The tiles are those of the forward and of the key-owned backward kernel, which hold more.
    """
    heads_q = q.shape[2]
    blocks = block_sizes(family, "forward", q.shape[3], q.dtype)
    common = {
        "lse_ptr": lse,
        "rows_ptr": lse if rows is None else rows,
        "HAS_ROWS": rows is not None,
        **strides_of("l", lse, "bh"),
        **strides_of("r", rows, "b"),
        "BLOCK_M": blocks.block_m,
        "BLOCK_N": blocks.block_n,
    }
    tiles_per_entry = TILE // blocks.block_m

    def row_launch(out: Tensor, bound: int | None, near: bool) -> Launch:
        arguments = {
            **attention_operands(q, k, k, key_bias, prefix_k, prefix_k, sequences, sm_scale, True, bound),
            **common,
            "out_ptr": out,
            "tiles_ptr": tiles_q,
            "reach": window,
            "NEAR": near,
        }
        programs = tiles_q.shape[0] * tiles_per_entry * heads_q
        return _launch(row_statistics_kernel, programs, arguments, blocks.num_warps, blocks.num_stages)

    launches = []
    if distance is not None:
        row_distance = lse.new_zeros(lse.shape)
        launches.append(row_launch(row_distance, attention_window, near=False))
        arguments = {
            **common,
            "distance_ptr": distance,
            "row_distance_ptr": row_distance,
            "sequences_ptr": sequences,
            "HEADS_Q": heads_q,
            "BLOCK": TILE,
        }
        launches.append(_launch(mean_distance_kernel, sequences.shape[0] * heads_q, arguments, 4, 1))
    near = window if attention_window is None else min(window, attention_window)
    launches.append(row_launch(windowed, near, near=True))
    counts = {
        "count_ptr": received_count,
        "tiles_ptr": tiles_k,
        "sequences_ptr": sequences,
        **strides_of("c", received_count, "b"),
        "low": horizon[0],
        "high": horizon[1],
    }
    launches.append(_launch(count_rows_kernel, tiles_k.shape[0], {**common, **counts, "BLOCK": TILE}, 4, 1))
    blocks = block_sizes(family, "backward_keys", q.shape[3], q.dtype)
    arguments = {
        **attention_operands(q, k, k, key_bias, None, None, sequences, sm_scale, True, attention_window),
        **common,
        **counts,
        "received_ptr": received,
        **strides_of("e", received, "bh"),
        "BLOCK_M": blocks.block_m,
        "BLOCK_N": blocks.block_n,
    }
    programs = tiles_k.shape[0] * (TILE // blocks.block_n) * heads_q
    launches.append(_launch(column_statistics_kernel, programs, arguments, blocks.num_warps, blocks.num_stages))
    return launches


def _launch(kernel: object, programs: int, arguments: dict[str, object], num_warps: int, num_stages: int) -> Launch:
    """A launch with those of the arguments that the kernel has: these kernels take no values and no output o."""
    return Launch(kernel, programs, {name: arguments[name] for name in kernel.arg_names}, num_warps, num_stages)
