"""Row sums of the attention map: the distance of each row, over all its keys or the nearest ones, and its means."""

from __future__ import annotations

import triton
import triton.language as tl

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
    load_rows,
    locate_keys,
    locate_prefix,
    locate_tile,
    tile_start,
)


@triton.jit
def _weighted_sum(
    total,
    q,
    lse_log2,
    keys,
    first,
    last,
    sm_scale,
    window,
    HAS_KEY_BIAS: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    NEAR: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add sum_v p d (NEAR: p (window - d)) of the rows ``first`` .. ``last`` over one run of keys."""
    row_position = keys.shift + first + tl.arange(0, BLOCK_M)
    begin, full_begin, full_end, end = key_bounds(
        keys.shift + first, keys.shift + last, keys.length, window, True, HAS_WINDOW, BLOCK_N
    )
    for MASKED in tl.static_range(2):
        for tile in range(count_tiles(begin, full_begin, full_end, end, MASKED, BLOCK_N)):
            start = tile_start(tile, begin, full_begin, full_end, MASKED, BLOCK_N)
            k = load_keys(None, keys.k_ptr, keys.stride_kt, keys, start, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D)
            scores, to_log2 = attention_scores(
                q, k, keys, start, row_position, sm_scale, window, HAS_KEY_BIAS, BIAS_ROWS, SCALE_FIRST,
                True, HAS_WINDOW, MASKED, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
            p = tl.exp2(scores * to_log2 - lse_log2[:, None])
            distance = row_position[:, None] - (start + tl.arange(0, BLOCK_N))[None, :]
            weight = window - distance if NEAR else distance
            total += tl.sum(p * weight.to(tl.float32), 1)
    return total


@triton.jit(do_not_specialize=["stride_lb", "stride_lh", "stride_rb", "stride_bb", "window"])
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
    stride_pkt,
    stride_pkh,
    sm_scale,
    window,
    HEADS_Q: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    NEAR: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The distance (NEAR: min(distance, window)) of a tile of rows of one head; ``out`` is laid out as ``lse``.

    Distances of rows that are not chosen are 0, and tiles without a chosen row cost nothing.
    """
    head, sequence, first, batch, q_start, n_rows, k_start, n_keys = locate_tile(
        tiles_ptr, sequences_ptr, HEADS_Q, BLOCK_M
    )
    if first >= n_rows:
        return
    last = tl.minimum(first + BLOCK_M, n_rows) - 1
    rows = first + tl.arange(0, BLOCK_M)
    row_offset = batch * stride_lb + head * stride_lh + q_start
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

    q_base = q_ptr + batch * stride_qb + q_start * stride_qt + head * stride_qh
    q = load_rows(q_base, first, n_rows, stride_qt, True, BLOCK_M, HEAD_DIM, BLOCK_D)
    total = tl.zeros([BLOCK_M], tl.float32)
    if NEAR:
        # The sum is subtracted from the window, whose rounding must not exceed that of distances in the sequence.
        n_prefix = locate_prefix(sequences_ptr, sequence)[1] if HAS_PREFIX else 0
        window = tl.minimum(window, n_prefix + n_keys)
    for OWN in tl.static_range(1 - HAS_PREFIX, 2):
        keys = locate_keys(
            OWN, k_ptr, k_ptr, key_bias_ptr, prefix_k_ptr, prefix_k_ptr,
            sequences_ptr, sequence, batch, k_start, n_keys, n_rows, head // GROUP,
            stride_kb, stride_kt, stride_kh, stride_kb, stride_kt, stride_kh, stride_bb,
            stride_pkt, stride_pkh, stride_pkt, stride_pkh,
        )  # fmt: skip
        total = _weighted_sum(
            total, q, lse_log2, keys, first, last, sm_scale, window, HAS_KEY_BIAS and OWN, BIAS_ROWS,
            SCALE_FIRST, HAS_WINDOW, NEAR, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
    if NEAR:
        total = tl.where(without_key, 0.0, window - total)
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
