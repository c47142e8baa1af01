"""Column sums of the attention map: what each key receives from the rows of its horizon, and how many these are."""

from __future__ import annotations

import triton
import triton.language as tl

from atman_kernels._triton.tiles import (
    LOG2_E,
    count_tiles,
    load_own_bias,
    load_rows,
    locate_tile,
    tile_bounds,
    tile_start,
    transposed_weights,
)


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
    _, _, first, batch, q_start, n_rows, k_start, n_keys = locate_tile(tiles_ptr, sequences_ptr, 1, BLOCK)
    keys = first + tl.arange(0, BLOCK)
    # The first row of each key's horizon, and one past the last.
    begin = keys + low - (n_keys - n_rows)
    end = keys + high - (n_keys - n_rows) + 1
    count = tl.maximum(tl.minimum(end, n_rows) - tl.maximum(begin, 0), 0)
    if HAS_ROWS:
        count = tl.zeros([BLOCK], tl.int32)
        rows_base = rows_ptr + batch * stride_rb + q_start
        for start in range(tl.maximum(tl.min(begin, 0), 0), tl.minimum(tl.max(end, 0), n_rows), BLOCK):
            rows = start + tl.arange(0, BLOCK)
            chosen = tl.load(rows_base + rows, mask=rows < n_rows, other=0) != 0
            counted = chosen[None, :] & (rows[None, :] >= begin[:, None]) & (rows[None, :] < end[:, None])
            count += tl.sum(counted.to(tl.int32), 1)
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
    head, _, first, batch, q_start, n_rows, k_start, n_keys = locate_tile(tiles_ptr, sequences_ptr, HEADS_Q, BLOCK_N)
    if first >= n_keys:
        return
    head_kv = head // GROUP

    k_base = k_ptr + batch * stride_kb + k_start * stride_kt + head_kv * stride_kh
    k = load_rows(k_base, first, n_keys, stride_kt, True, BLOCK_N, HEAD_DIM, BLOCK_D)
    keys = first + tl.arange(0, BLOCK_N)
    bias_log2 = load_own_bias(key_bias_ptr, batch, k_start, first, n_keys, stride_bb, HAS_KEY_BIAS, BLOCK_N)
    q_base = q_ptr + batch * stride_qb + q_start * stride_qt + head * stride_qh
    lse_base = lse_ptr + batch * stride_lb + head * stride_lh + q_start
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
            # Transposed, (BLOCK_N, BLOCK_M): the sums then stay inside a warp.
            p = transposed_weights(k, q, bias_log2, lse_log2[None, :], sm_scale, HAS_KEY_BIAS, PRECISION)
            if MASKED:
                distance = (rows + shift)[None, :] - keys[:, None]
                p = tl.where((distance >= low) & (distance <= last), p, 0.0)
            total += tl.sum(p, 1)

    inside = keys < n_keys
    count = tl.load(count_ptr + batch * stride_cb + k_start + keys, mask=inside, other=1)
    received_base = received_ptr + batch * stride_eb + head * stride_eh + k_start
    tl.store(received_base + keys, total / tl.maximum(count, 1).to(tl.float32), mask=inside)
