"""Attention statistics: weighted row sums and banded column sums of p, recomputed tile by tile from q, k and lse.

The distance of a row needs all its keys. Its windowed distance is W - sum p max(W - d, 0), because the p of a row sum
to 1, and so needs the W nearest keys only; what a key receives needs the rows of its horizon. Each output is owned by
one program: no atomics, and the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from atman_kernels._triton.launch import Launch, block_sizes, flags_of, operands_of
from atman_kernels._triton.tiles import (
    BATCH,
    LOG2_E,
    Q_LENGTH,
    Q_START,
    SEQUENCE_COLUMNS,
    attention_scores,
    count_tiles,
    key_bounds,
    load_keys,
    load_own_bias,
    load_rows,
    locate_keys,
    locate_prefix,
    locate_tile,
    rows_from,
    tile_bounds,
    tile_start,
    transposed_weights,
)
from atman_kernels.plan import TILE
from atman_kernels.problem import AttentionProblem, Statistics, StatisticsProblem


@triton.jit
def _weighted_sum(
    total, q, lse_log2, keys, first, last, sm_scale, window, flags, HAS_KEY_BIAS: tl.constexpr, NEAR: tl.constexpr
):
    """Add sum_v p d (NEAR: p (window - d)) of the rows ``first`` .. ``last`` over one run of keys."""
    BLOCK_N: tl.constexpr = flags.BLOCK_N
    row_position = keys.shift + first + tl.arange(0, flags.BLOCK_M)
    begin, full_begin, full_end, end = key_bounds(
        keys.shift + first, keys.shift + last, keys.length, window, True, flags.HAS_WINDOW, BLOCK_N
    )
    for MASKED in tl.static_range(2):
        for tile in range(count_tiles(begin, full_begin, full_end, end, MASKED, BLOCK_N)):
            start = tile_start(tile, begin, full_begin, full_end, MASKED, BLOCK_N)
            k = load_keys(None, keys.k_ptr, keys.stride_kt, keys, start, MASKED, BLOCK_N, flags.HEAD_DIM, flags.BLOCK_D)
            scores, to_log2 = attention_scores(
                q, k, keys, start, row_position, sm_scale, window, HAS_KEY_BIAS, flags.BIAS_ROWS, flags.SCALE_FIRST,
                True, flags.HAS_WINDOW, MASKED, flags.BLOCK_M, BLOCK_N, flags.PRECISION,
            )  # fmt: skip
            p = tl.exp2(scores * to_log2 - lse_log2[:, None])
            distance = row_position[:, None] - (start + tl.arange(0, BLOCK_N))[None, :]
            weight = window - distance if NEAR else distance
            total += tl.sum(p * weight.to(tl.float32), 1)
    return total


@triton.jit(do_not_specialize=["window", "bias_batch", "lse_batch", "lse_head", "chosen_batch"])
def row_statistics_kernel(
    out_ptr,
    lse_ptr,
    rows_ptr,
    q,
    k,
    key_bias_ptr,
    prefix_k,
    sequences_ptr,
    tiles_ptr,
    window,
    bias_batch,
    lse_batch,
    lse_head,
    chosen_batch,
    sm_scale,
    flags,
    HAS_ROWS: tl.constexpr,
    NEAR: tl.constexpr,
):
    """The distance (NEAR: min(distance, window)) of a tile of rows of one head; ``out`` is laid out as ``lse``.

    Distances of rows that are not chosen are 0, and tiles without a chosen row cost nothing.
    """
    BLOCK_M: tl.constexpr = flags.BLOCK_M
    head, sequence, first, batch, q_start, n_rows, k_start, n_keys = locate_tile(
        tiles_ptr, sequences_ptr, flags.HEADS_Q, BLOCK_M
    )
    if first >= n_rows:
        return
    last = tl.minimum(first + BLOCK_M, n_rows) - 1
    rows = first + tl.arange(0, BLOCK_M)
    row_offset = batch * lse_batch + head * lse_head + q_start
    inside = rows < n_rows
    lse_log2 = tl.load(lse_ptr + row_offset + rows, mask=inside, other=float("-inf")) * LOG2_E
    without_key = lse_log2 == float("-inf")
    lse_log2 = tl.where(without_key, float("inf"), lse_log2)
    if HAS_ROWS and not NEAR:
        chosen = tl.load(rows_ptr + batch * chosen_batch + q_start + rows, mask=inside, other=0) != 0
        lse_log2 = tl.where(chosen, lse_log2, float("inf"))
        if tl.max(chosen.to(tl.int32), 0) == 0:
            tl.store(out_ptr + row_offset + rows, tl.zeros([BLOCK_M], tl.float32), mask=inside)
            return

    q_base = rows_from(q, batch, q_start, head)
    q_tile = load_rows(q_base, first, n_rows, q.time, True, BLOCK_M, flags.HEAD_DIM, flags.BLOCK_D)
    total = tl.zeros([BLOCK_M], tl.float32)
    if NEAR:
        # The sum is subtracted from the window, whose rounding must not exceed that of distances in the sequence.
        n_prefix = locate_prefix(sequences_ptr, sequence)[1] if flags.HAS_PREFIX else 0
        window = tl.minimum(window, n_prefix + n_keys)
    for OWN in tl.static_range(1 - flags.HAS_PREFIX, 2):
        keys = locate_keys(
            OWN, k, k, key_bias_ptr, prefix_k, prefix_k,
            sequences_ptr, sequence, batch, k_start, n_keys, n_rows, head // flags.GROUP, bias_batch,
        )  # fmt: skip
        total = _weighted_sum(
            total, q_tile, lse_log2, keys, first, last, sm_scale, window, flags, flags.HAS_KEY_BIAS and OWN, NEAR
        )
    if NEAR:
        total = tl.where(without_key, 0.0, window - total)
    tl.store(out_ptr + row_offset + rows, total, mask=inside)


@triton.jit(do_not_specialize=["lse_batch", "lse_head", "chosen_batch"])
def mean_distance_kernel(
    distance_ptr,
    row_distance_ptr,
    rows_ptr,
    sequences_ptr,
    lse_batch,
    lse_head,
    chosen_batch,
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
        offset = batch * lse_batch + head.to(tl.int64) * lse_head + q_start
        total += tl.load(row_distance_ptr + offset + rows, mask=inside, other=0.0)
        if HAS_ROWS:
            chosen = tl.load(rows_ptr + batch * chosen_batch + q_start + rows, mask=inside, other=0) != 0
            count += chosen.to(tl.int32)
        else:
            count += inside.to(tl.int32)
    mean = tl.sum(total, 0) / tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    tl.store(distance_ptr + program, mean)


@triton.jit(do_not_specialize=["low", "high", "chosen_batch", "count_batch"])
def count_rows_kernel(
    count_ptr,
    rows_ptr,
    sequences_ptr,
    tiles_ptr,
    low,
    high,
    chosen_batch,
    count_batch,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many chosen rows stand ``low`` to ``high`` positions after each of a tile of own keys."""
    _, _, first, batch, q_start, n_rows, k_start, n_keys = locate_tile(tiles_ptr, sequences_ptr, 1, BLOCK)
    keys = first + tl.arange(0, BLOCK)
    # The first row of each key's horizon, and one past the last.
    begin = keys + low - (n_keys - n_rows)
    end = keys + high - (n_keys - n_rows) + 1
    count = tl.maximum(tl.minimum(end, n_rows) - tl.maximum(begin, 0), 0)
    if HAS_ROWS:
        count = tl.zeros([BLOCK], tl.int32)
        rows_base = rows_ptr + batch * chosen_batch + q_start
        for start in range(tl.maximum(tl.min(begin, 0), 0), tl.minimum(tl.max(end, 0), n_rows), BLOCK):
            rows = start + tl.arange(0, BLOCK)
            chosen = tl.load(rows_base + rows, mask=rows < n_rows, other=0) != 0
            counted = chosen[None, :] & (rows[None, :] >= begin[:, None]) & (rows[None, :] < end[:, None])
            count += tl.sum(counted.to(tl.int32), 1)
    tl.store(count_ptr + batch * count_batch + k_start + keys, count, mask=keys < n_keys)


@triton.jit(
    do_not_specialize=[
        "window",
        "low",
        "high",
        "bias_batch",
        "lse_batch",
        "lse_head",
        "chosen_batch",
        "received_batch",
        "received_head",
        "count_batch",
    ]
)
def column_statistics_kernel(
    received_ptr,
    count_ptr,
    lse_ptr,
    rows_ptr,
    q,
    k,
    key_bias_ptr,
    sequences_ptr,
    tiles_ptr,
    window,
    low,
    high,
    bias_batch,
    lse_batch,
    lse_head,
    chosen_batch,
    received_batch,
    received_head,
    count_batch,
    sm_scale,
    flags,
    HAS_ROWS: tl.constexpr,
):
    """The mean p that a tile of own keys receives from the chosen rows ``low`` to ``high`` positions later."""
    HAS_KEY_BIAS: tl.constexpr = flags.HAS_KEY_BIAS
    HEAD_DIM: tl.constexpr = flags.HEAD_DIM
    BLOCK_M: tl.constexpr = flags.BLOCK_M
    BLOCK_N: tl.constexpr = flags.BLOCK_N
    BLOCK_D: tl.constexpr = flags.BLOCK_D
    head, _, first, batch, q_start, n_rows, k_start, n_keys = locate_tile(
        tiles_ptr, sequences_ptr, flags.HEADS_Q, BLOCK_N
    )
    if first >= n_keys:
        return

    k_base = rows_from(k, batch, k_start, head // flags.GROUP)
    k_tile = load_rows(k_base, first, n_keys, k.time, True, BLOCK_N, HEAD_DIM, BLOCK_D)
    keys = first + tl.arange(0, BLOCK_N)
    bias_log2 = load_own_bias(key_bias_ptr, batch, k_start, first, n_keys, bias_batch, HAS_KEY_BIAS, BLOCK_N)
    q_base = rows_from(q, batch, q_start, head)
    lse_base = lse_ptr + batch * lse_batch + head * lse_head + q_start
    rows_base = rows_ptr + batch * chosen_batch + q_start
    total = tl.zeros([BLOCK_N], tl.float32)
    offs_m = tl.arange(0, BLOCK_M)
    shift = n_keys - n_rows
    last_key = tl.minimum(first + BLOCK_N, n_keys) - 1
    # With a window in the attention, rows beyond it have p = 0.
    last = tl.minimum(high, window - 1) if flags.HAS_WINDOW else high
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
            q_tile = load_rows(q_base, start, n_rows, q.time, MASKED, BLOCK_M, HEAD_DIM, BLOCK_D)
            lse_log2 = tl.load(lse_base + rows, mask=rows < n_rows, other=float("-inf")) * LOG2_E
            absent = lse_log2 == float("-inf")
            if HAS_ROWS:
                absent |= tl.load(rows_base + rows, mask=rows < n_rows, other=0) == 0
            # p is 0 in rows that are not chosen or see no key.
            lse_log2 = tl.where(absent, float("inf"), lse_log2)
            # Transposed, (BLOCK_N, BLOCK_M): the sums then stay inside a warp.
            p = transposed_weights(
                k_tile, q_tile, bias_log2, lse_log2[None, :], sm_scale, HAS_KEY_BIAS, flags.PRECISION
            )
            if MASKED:
                distance = (rows + shift)[None, :] - keys[:, None]
                p = tl.where((distance >= low) & (distance <= last), p, 0.0)
            total += tl.sum(p, 1)

    inside = keys < n_keys
    count = tl.load(count_ptr + batch * count_batch + k_start + keys, mask=inside, other=1)
    received_base = received_ptr + batch * received_batch + head * received_head + k_start
    tl.store(received_base + keys, total / tl.maximum(count, 1).to(tl.float32), mask=inside)


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
        **operands_of(attention),
        "lse_ptr": x.lse,
        "rows_ptr": x.lse if x.rows is None else x.rows,
        "HAS_ROWS": x.rows is not None,
        "window": x.attention_window,
        "low": x.horizon[0],
        "high": x.horizon[1],
        "bias_batch": 0 if x.key_bias is None else x.key_bias.stride(0),
        "lse_batch": x.lse.stride(0),
        "lse_head": x.lse.stride(1),
        "chosen_batch": 0 if x.rows is None else x.rows.stride(0),
        "received_batch": out.received.stride(0),
        "received_head": out.received.stride(1),
        "count_batch": out.received_count.stride(0),
        "HEADS_Q": heads_q,
    }

    def row_launch(out: Tensor, window: int, near: bool) -> Launch:
        arguments = {
            **common,
            "window": window,
            "flags": flags_of(family, blocks, attention._replace(window=window)),
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
    launches.append(row_launch(out.windowed_distance, min(x.window, x.attention_window), near=True))
    common |= {"count_ptr": out.received_count, "tiles_ptr": x.tiles_k}
    launches.append(_launch(count_rows_kernel, x.tiles_k.shape[0], {**common, "BLOCK": TILE}, 4, 1))
    own = block_sizes(family, "backward_keys", x.q.shape[3], x.q.dtype)
    arguments = {**common, "received_ptr": out.received, "flags": flags_of(family, own, attention)}
    programs = x.tiles_k.shape[0] * (TILE // own.block_n) * heads_q
    launches.append(_launch(column_statistics_kernel, programs, arguments, own.num_warps, own.num_stages))
    return launches


def _launch(kernel: object, programs: int, arguments: dict[str, object], num_warps: int, num_stages: int) -> Launch:
    """A launch with those of the arguments that the kernel has: these kernels take no values and no output o."""
    return Launch(kernel, programs, {name: arguments[name] for name in kernel.arg_names}, num_warps, num_stages)
