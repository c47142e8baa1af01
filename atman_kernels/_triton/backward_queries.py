"""Backward, query-owned: dq of one tile of rows, and the corrected delta that the key-owned kernel reads."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from atman_kernels._triton.tiles import (
    LOG2_E,
    aligned_rows,
    attention_scores,
    count_tiles,
    key_bounds,
    load_keys,
    load_rows,
    locate_keys,
    locate_tile,
    partial_sums,
    rows_from,
    store_rows,
    tile_start,
)


class RowNeeds(NamedTuple):
    """What the query-owned kernel computes; each member is a ``tl.constexpr``.

    Attributes:
        DLSE: there is a gradient of lse.
        DQ: dq is written.
        EXACT_DELTA: delta is corrected by the row sums of ds.
        PREFIX_ONLY: own keys are left to the fused key-owned kernel, which adds to this dq; it is without sm_scale.
    """

    DLSE: Any
    DQ: Any
    EXACT_DELTA: Any
    PREFIX_ONLY: Any


@triton.jit
def _accumulate_dq(
    dq,
    ds_sum,
    q,
    do,
    lse_log2,
    row_term,
    keys,
    k_desc,
    v_desc,
    first,
    last,
    sm_scale,
    window,
    flags,
    needs,
    HAS_KEY_BIAS: tl.constexpr,
):
    """Add one run of keys to dq (without sm_scale) and to the row sums of ds of the rows ``first`` .. ``last``."""
    BLOCK_N: tl.constexpr = flags.BLOCK_N
    row_position = keys.shift + first + tl.arange(0, flags.BLOCK_M)
    begin, full_begin, full_end, end = key_bounds(
        keys.shift + first, keys.shift + last, keys.length, window, flags.IS_CAUSAL, flags.HAS_WINDOW, BLOCK_N
    )
    for MASKED in tl.static_range(2):
        for tile in range(count_tiles(begin, full_begin, full_end, end, MASKED, BLOCK_N)):
            start = tile_start(tile, begin, full_begin, full_end, MASKED, BLOCK_N)
            k = load_keys(
                k_desc, keys.k_ptr, keys.stride_kt, keys, start, MASKED, BLOCK_N, flags.HEAD_DIM, flags.BLOCK_D
            )
            v = load_keys(
                v_desc, keys.v_ptr, keys.stride_vt, keys, start, MASKED, BLOCK_N, flags.HEAD_DIM, flags.BLOCK_D
            )
            scores, to_log2 = attention_scores(
                q, k, keys, start, row_position, sm_scale, window, HAS_KEY_BIAS, flags.BIAS_ROWS, flags.SCALE_FIRST,
                flags.IS_CAUSAL, flags.HAS_WINDOW, MASKED, flags.BLOCK_M, BLOCK_N, flags.PRECISION,
            )  # fmt: skip
            p = tl.exp2(scores * to_log2 - lse_log2[:, None])
            dp = tl.dot(do, tl.trans(v), input_precision=flags.PRECISION)
            ds = p * (dp - row_term[:, None])
            if needs.EXACT_DELTA:
                ds_sum += partial_sums(ds, flags.SUM_COLUMNS)
            if needs.DQ:
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=flags.PRECISION)
    return dq, ds_sum


@triton.jit(do_not_specialize=["window", "bias_batch", "lse_batch", "lse_head", "scratch_batch", "scratch_head"])
def backward_queries_kernel(
    dq_ptr,
    row_term_ptr,
    lse_log2_ptr,
    do,
    dlse_ptr,
    o,
    lse_ptr,
    q,
    k,
    v,
    key_bias_ptr,
    prefix_k,
    prefix_v,
    k_desc,
    v_desc,
    prefix_k_desc,
    prefix_v_desc,
    sequences_ptr,
    tiles_ptr,
    window,
    bias_batch,
    lse_batch,
    lse_head,
    scratch_batch,
    scratch_head,
    sm_scale,
    flags,
    needs,
):
    """Write r = delta - dlse and the log2 lse (+inf for none) of a tile of rows and, if needed, their dq (as o)."""
    BLOCK_M: tl.constexpr = flags.BLOCK_M
    HEAD_DIM: tl.constexpr = flags.HEAD_DIM
    BLOCK_D: tl.constexpr = flags.BLOCK_D
    head, sequence, first, batch, q_start, n_rows, k_start, n_keys = locate_tile(
        tiles_ptr, sequences_ptr, flags.HEADS_Q, BLOCK_M
    )
    if first >= n_rows:
        return
    last = tl.minimum(first + BLOCK_M, n_rows) - 1

    rows = first + tl.arange(0, BLOCK_M)
    row_offset = batch * lse_batch + head * lse_head + q_start
    lse = tl.load(lse_ptr + row_offset + rows, mask=rows < n_rows, other=float("-inf"))
    has_key = lse != float("-inf")
    # exp2(s - inf) = 0: rows past the end and rows without a key take no part.
    lse_log2 = tl.where(has_key, lse * LOG2_E, float("inf"))
    do_base, o_base = rows_from(do, batch, q_start, head), rows_from(o, batch, q_start, head)
    do_tile = load_rows(do_base, first, n_rows, do.time, True, BLOCK_M, HEAD_DIM, BLOCK_D)
    o_tile = load_rows(o_base, first, n_rows, o.time, True, BLOCK_M, HEAD_DIM, BLOCK_D)
    row_term = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    if needs.DLSE:
        dlse = tl.load(dlse_ptr + row_offset + rows, mask=rows < n_rows, other=0.0)
        dlse = tl.where(has_key, dlse, 0.0)
        row_term -= dlse

    if needs.DQ or needs.EXACT_DELTA:
        q_base = rows_from(q, batch, q_start, head)
        q_tile = load_rows(q_base, first, n_rows, q.time, True, BLOCK_M, HEAD_DIM, BLOCK_D)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        ds_sum = tl.zeros([BLOCK_M, flags.SUM_COLUMNS], tl.float32)
        for OWN in tl.static_range(1 - flags.HAS_PREFIX, 1 if needs.PREFIX_ONLY else 2):
            keys = locate_keys(
                OWN, k, v, key_bias_ptr, prefix_k, prefix_v,
                sequences_ptr, sequence, batch, k_start, n_keys, n_rows, head // flags.GROUP, bias_batch,
            )  # fmt: skip
            dq, ds_sum = _accumulate_dq(
                dq, ds_sum, q_tile, do_tile, lse_log2, row_term, keys, k_desc if OWN else prefix_k_desc,
                v_desc if OWN else prefix_v_desc, first, last, sm_scale, window, flags, needs,
                flags.HAS_KEY_BIAS and OWN,
            )  # fmt: skip
        if needs.DQ:
            dq = dq if needs.PREFIX_ONLY else dq * sm_scale
            dq_base = dq_ptr + batch * o.batch + q_start * o.time + head * o.head
            store_rows(dq_base, dq, first, n_rows, o.time, BLOCK_M, HEAD_DIM, BLOCK_D)
        if needs.EXACT_DELTA:
            # sum_v p (dp - r) = (delta_exact - r), of which dlse is meant and the rest is the error of delta.
            row_term += tl.sum(ds_sum, 1)
            if needs.DLSE:
                row_term -= dlse
    aligned_offset = aligned_rows(batch, head, q_start, sequence, scratch_batch, scratch_head)
    tl.store(row_term_ptr + aligned_offset + rows, row_term, mask=rows < n_rows)
    tl.store(lse_log2_ptr + aligned_offset + rows, lse_log2, mask=rows < n_rows)
