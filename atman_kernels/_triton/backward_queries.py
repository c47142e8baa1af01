"""Backward, query-owned: dq of one tile of rows, and the corrected delta that the key-owned kernel reads."""

from __future__ import annotations

import triton
import triton.language as tl

from atman_kernels._triton.tiles import (
    LOG2_E,
    Rows,
    aligned_rows,
    attention_scores,
    count_tiles,
    key_bounds,
    load_keys,
    load_rows,
    locate_keys,
    locate_tile,
    partial_sums,
    store_rows,
    tile_start,
)


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
    HAS_KEY_BIAS: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    NEED_DQ: tl.constexpr,
    EXACT_DELTA: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one run of keys to dq (without sm_scale) and to the row sums of ds of the rows ``first`` .. ``last``."""
    row_position = keys.shift + first + tl.arange(0, BLOCK_M)
    begin, full_begin, full_end, end = key_bounds(
        keys.shift + first, keys.shift + last, keys.length, window, IS_CAUSAL, HAS_WINDOW, BLOCK_N
    )
    for MASKED in tl.static_range(2):
        for tile in range(count_tiles(begin, full_begin, full_end, end, MASKED, BLOCK_N)):
            start = tile_start(tile, begin, full_begin, full_end, MASKED, BLOCK_N)
            k = load_keys(k_desc, keys.k_ptr, keys.stride_kt, keys, start, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D)
            v = load_keys(v_desc, keys.v_ptr, keys.stride_vt, keys, start, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D)
            scores, to_log2 = attention_scores(
                q, k, keys, start, row_position, sm_scale, window, HAS_KEY_BIAS, BIAS_ROWS, SCALE_FIRST,
                IS_CAUSAL, HAS_WINDOW, MASKED, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
            p = tl.exp2(scores * to_log2 - lse_log2[:, None])
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - row_term[:, None])
            if EXACT_DELTA:
                ds_sum += partial_sums(ds, SUM_COLUMNS)
            if NEED_DQ:
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, ds_sum


@triton.jit(do_not_specialize=["stride_lb", "stride_lh", "stride_rb", "stride_rh", "stride_bb", "window"])
def backward_queries_kernel(
    dq_ptr,
    row_term_ptr,
    lse_log2_ptr,
    do_ptr,
    dlse_ptr,
    o_ptr,
    lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    key_bias_ptr,
    prefix_k_ptr,
    prefix_v_ptr,
    k_desc,
    v_desc,
    prefix_k_desc,
    prefix_v_desc,
    sequences_ptr,
    tiles_ptr,
    stride_dob,
    stride_dot,
    stride_doh,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_lb,
    stride_lh,
    stride_rb,
    stride_rh,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_bb,
    stride_pkt,
    stride_pkh,
    stride_pvt,
    stride_pvh,
    sm_scale,
    window,
    HEADS_Q: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    NEED_DQ: tl.constexpr,
    EXACT_DELTA: tl.constexpr,
    PREFIX_ONLY: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write r = delta - dlse and the log2 lse (+inf for none) of a tile of rows and, if needed, their dq (as o).

    PREFIX_ONLY leaves own keys to the fused key-owned kernel, which adds to this dq; it is then without sm_scale.
    """
    head, sequence, first, batch, q_start, n_rows, k_start, n_keys = locate_tile(
        tiles_ptr, sequences_ptr, HEADS_Q, BLOCK_M
    )
    if first >= n_rows:
        return
    last = tl.minimum(first + BLOCK_M, n_rows) - 1

    rows = first + tl.arange(0, BLOCK_M)
    row_offset = batch * stride_lb + head * stride_lh + q_start
    lse = tl.load(lse_ptr + row_offset + rows, mask=rows < n_rows, other=float("-inf"))
    has_key = lse != float("-inf")
    # exp2(s - inf) = 0: rows past the end and rows without a key take no part.
    lse_log2 = tl.where(has_key, lse * LOG2_E, float("inf"))
    do_base = do_ptr + batch * stride_dob + q_start * stride_dot + head * stride_doh
    o_base = o_ptr + batch * stride_ob + q_start * stride_ot + head * stride_oh
    q_base = q_ptr + batch * stride_qb + q_start * stride_qt + head * stride_qh
    do = load_rows(do_base, first, n_rows, stride_dot, True, BLOCK_M, HEAD_DIM, BLOCK_D)
    o = load_rows(o_base, first, n_rows, stride_ot, True, BLOCK_M, HEAD_DIM, BLOCK_D)
    row_term = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if HAS_DLSE:
        dlse = tl.load(dlse_ptr + row_offset + rows, mask=rows < n_rows, other=0.0)
        dlse = tl.where(has_key, dlse, 0.0)
        row_term -= dlse

    if NEED_DQ or EXACT_DELTA:
        q = load_rows(q_base, first, n_rows, stride_qt, True, BLOCK_M, HEAD_DIM, BLOCK_D)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        ds_sum = tl.zeros([BLOCK_M, SUM_COLUMNS], tl.float32)
        for OWN in tl.static_range(1 - HAS_PREFIX, 1 if PREFIX_ONLY else 2):
            keys = locate_keys(
                OWN, Rows(k_ptr, stride_kb, stride_kt, stride_kh),
                Rows(v_ptr, stride_vb, stride_vt, stride_vh), key_bias_ptr,
                Rows(prefix_k_ptr, 0, stride_pkt, stride_pkh), Rows(prefix_v_ptr, 0, stride_pvt, stride_pvh),
                sequences_ptr, sequence, batch, k_start, n_keys, n_rows, head // GROUP, stride_bb,
            )  # fmt: skip
            dq, ds_sum = _accumulate_dq(
                dq, ds_sum, q, do, lse_log2, row_term, keys, k_desc if OWN else prefix_k_desc,
                v_desc if OWN else prefix_v_desc, first, last, sm_scale, window, HAS_KEY_BIAS and OWN, BIAS_ROWS,
                SUM_COLUMNS, SCALE_FIRST, IS_CAUSAL, HAS_WINDOW, NEED_DQ, EXACT_DELTA,
                HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
            )  # fmt: skip
        if NEED_DQ:
            dq = dq if PREFIX_ONLY else dq * sm_scale
            dq_base = dq_ptr + batch * stride_ob + q_start * stride_ot + head * stride_oh
            store_rows(dq_base, dq, first, n_rows, stride_ot, BLOCK_M, HEAD_DIM, BLOCK_D)
        if EXACT_DELTA:
            # sum_v p (dp - r) = (delta_exact - r), of which dlse is meant and the rest is the error of delta.
            row_term += tl.sum(ds_sum, 1)
            if HAS_DLSE:
                row_term -= dlse
    aligned_offset = aligned_rows(batch, head, q_start, sequence, stride_rb, stride_rh)
    tl.store(row_term_ptr + aligned_offset + rows, row_term, mask=rows < n_rows)
    tl.store(lse_log2_ptr + aligned_offset + rows, lse_log2, mask=rows < n_rows)
