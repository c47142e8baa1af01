"""Backward, key-owned: dk, dv and a kv head's part of dkey_bias of one tile of keys; then the heads are summed.

Fused, it also adds its part of dq, in fp32, to a scratch that all programs share (see ``backward``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from atman_kernels._triton.tiles import (
    aligned_rows,
    count_tiles,
    is_visible,
    load_own_bias,
    load_row_numbers,
    load_rows,
    locate_tile,
    query_bounds,
    store_rows,
    tile_start,
    transposed_weights,
)


@triton.jit
def _add_rows(
    desc, base_ptr, x, batch, start, head, row, n_rows, stride_t, HEAD_DIM: tl.constexpr, INTERPRETED: tl.constexpr
):
    """Add a (BLOCK_M, BLOCK_D) tile to rows of a shared fp32 tensor, through the bulk copy engine.

    Rows past the end of the sequence are those of the next one; what is added to them is zero. The interpreter knows no
    descriptor reductions and runs one program at a time, so it may load, add and store.
    """
    BLOCK_M: tl.constexpr = x.shape[0]
    BLOCK_D: tl.constexpr = x.shape[1]
    if INTERPRETED:
        rows = load_rows(base_ptr, row, n_rows, stride_t, True, BLOCK_M, HEAD_DIM, BLOCK_D)
        store_rows(base_ptr, rows + x, row, n_rows, stride_t, BLOCK_M, HEAD_DIM, BLOCK_D)
    else:
        tile = x.reshape(1, BLOCK_M, 1, BLOCK_D)
        desc.atomic_add([batch.to(tl.int32), (start + row).to(tl.int32), head.to(tl.int32), 0], tile)


@triton.jit(do_not_specialize=["stride_rb", "stride_rh", "stride_bb", "stride_gh", "stride_gb", "window"])
def backward_keys_kernel(
    dq_sum_desc,
    dq_sum_ptr,
    dk_ptr,
    dv_ptr,
    dkey_bias_ptr,
    do_ptr,
    row_term_ptr,
    lse_log2_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    key_bias_ptr,
    prefix_k_ptr,
    prefix_v_ptr,
    sequences_ptr,
    tiles_ptr,
    stride_dqb,
    stride_dqt,
    stride_dqh,
    stride_dob,
    stride_dot,
    stride_doh,
    stride_dkb,
    stride_dkt,
    stride_dkh,
    stride_gh,
    stride_gb,
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
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    FUSE_DQ: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROW_COPIES: tl.constexpr,
    NEED_DK: tl.constexpr,
    NEED_DV: tl.constexpr,
    NEED_DKEY_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk, dv (laid out alike) and the dkey_bias of one kv head for a tile of own keys, over all rows of its group."""
    head_kv, sequence, first, batch, q_start, n_rows, k_start, n_keys = locate_tile(
        tiles_ptr, sequences_ptr, HEADS_Q // GROUP, BLOCK_N
    )
    if first >= n_keys:
        return

    k_base = k_ptr + batch * stride_kb + k_start * stride_kt + head_kv * stride_kh
    v_base = v_ptr + batch * stride_vb + k_start * stride_vt + head_kv * stride_vh
    k = load_rows(k_base, first, n_keys, stride_kt, True, BLOCK_N, HEAD_DIM, BLOCK_D)
    v = load_rows(v_base, first, n_keys, stride_vt, True, BLOCK_N, HEAD_DIM, BLOCK_D)
    keys = first + tl.arange(0, BLOCK_N)
    bias_log2 = load_own_bias(key_bias_ptr, batch, k_start, first, n_keys, stride_bb, HAS_KEY_BIAS, BLOCK_N)

    # Every program of the group starts from the group's first query head.
    head = head_kv * GROUP
    q_base = q_ptr + batch * stride_qb + q_start * stride_qt + head * stride_qh
    do_base = do_ptr + batch * stride_dob + q_start * stride_dot + head * stride_doh
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dkey_bias = tl.zeros([BLOCK_N], tl.float32)
    offs_m = tl.arange(0, BLOCK_M)
    shift = n_keys - n_rows
    last_key = tl.minimum(first + BLOCK_N, n_keys) - 1
    begin, full_begin, full_end, end = query_bounds(
        first, last_key, shift, n_rows, window, IS_CAUSAL, HAS_WINDOW, BLOCK_M
    )
    if FUSE_DQ:
        # dq sums over keys: those past the end, whose exp(0 - lse) may overflow, must be masked and not only zero.
        full_end = tl.where(first + BLOCK_N > n_keys, full_begin, full_end)
    for MASKED in tl.static_range(2):
        n_tiles = count_tiles(begin, full_begin, full_end, end, MASKED, BLOCK_M)
        for tile in range(GROUP * n_tiles):
            member = tile // n_tiles
            start = tile_start(tile - member * n_tiles, begin, full_begin, full_end, MASKED, BLOCK_M)
            # With heads outside rows in memory, a group's heads may lie further apart than 32 bits count.
            member = member.to(tl.int64)
            rows = start + offs_m
            q = load_rows(q_base + member * stride_qh, start, n_rows, stride_qt, MASKED, BLOCK_M, HEAD_DIM, BLOCK_D)
            row_offsets = aligned_rows(batch, head + member, q_start, sequence, stride_rb, stride_rh) + rows
            inside = rows < n_rows
            lse_log2 = load_row_numbers(
                lse_log2_ptr, row_offsets, inside, float("inf"), MASKED, ROW_COPIES, BLOCK_M, BLOCK_N
            )
            row_term = load_row_numbers(row_term_ptr, row_offsets, inside, 0.0, MASKED, ROW_COPIES, BLOCK_M, BLOCK_N)
            # Transposed, (BLOCK_N, BLOCK_M), p and ds are the left operands of the products below.
            p = transposed_weights(k, q, bias_log2, lse_log2, sm_scale, HAS_KEY_BIAS, PRECISION)
            if MASKED:
                seen = is_visible(rows[None, :] + shift, keys[:, None], n_keys, window, IS_CAUSAL, HAS_WINDOW)
                p = tl.where(seen, p, 0.0)
            do = load_rows(do_base + member * stride_doh, start, n_rows, stride_dot, MASKED, BLOCK_M, HEAD_DIM, BLOCK_D)
            if NEED_DV:
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            if FUSE_DQ or NEED_DK or NEED_DKEY_BIAS:
                dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
                ds = p * (dp - row_term)
                if NEED_DKEY_BIAS:
                    dkey_bias += tl.sum(ds, 1)
                if NEED_DK:
                    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
                if FUSE_DQ:
                    dq = tl.trans(tl.dot(tl.trans(k), ds.to(k.dtype), input_precision=PRECISION))
                    head_q = head + member
                    dq_base = dq_sum_ptr + batch * stride_dqb + q_start * stride_dqt + head_q * stride_dqh
                    _add_rows(
                        dq_sum_desc, dq_base, dq, batch, q_start, head_q, start, n_rows, stride_dqt, HEAD_DIM,
                        INTERPRETED,
                    )  # fmt: skip

    grad_offset = batch * stride_dkb + k_start * stride_dkt + head_kv * stride_dkh
    if NEED_DK:
        store_rows(dk_ptr + grad_offset, dk * sm_scale, first, n_keys, stride_dkt, BLOCK_N, HEAD_DIM, BLOCK_D)
    if NEED_DV:
        store_rows(dv_ptr + grad_offset, dv, first, n_keys, stride_dkt, BLOCK_N, HEAD_DIM, BLOCK_D)
    if NEED_DKEY_BIAS:
        partial_ptrs = dkey_bias_ptr + head_kv * stride_gh + batch * stride_gb + k_start + keys
        tl.store(partial_ptrs, dkey_bias, mask=keys < n_keys)


@triton.jit
def scale_dq_kernel(
    dq_ptr,
    dq_sum_ptr,
    sequences_ptr,
    tiles_ptr,
    stride_dqb,
    stride_dqt,
    stride_dqh,
    sm_scale,
    HEADS_Q: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dq of a tile of rows of one head from the fused kernel's fp32 sum, which is laid out alike."""
    head, _, first, batch, q_start, n_rows, _, _ = locate_tile(tiles_ptr, sequences_ptr, HEADS_Q, BLOCK_M)
    if first >= n_rows:
        return
    offset = batch * stride_dqb + q_start * stride_dqt + head * stride_dqh
    dq = load_rows(dq_sum_ptr + offset, first, n_rows, stride_dqt, True, BLOCK_M, HEAD_DIM, BLOCK_D)
    store_rows(dq_ptr + offset, dq * sm_scale, first, n_rows, stride_dqt, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["stride_gh", "stride_gb"])
def sum_heads_kernel(
    dkey_bias_ptr,
    partial_ptr,
    sequences_ptr,
    tiles_ptr,
    stride_gh,
    stride_gb,
    HEADS_KV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dkey_bias of a tile of keys from the (HEADS_KV, B, Tk) sums of the kv heads, in the order of the heads."""
    _, _, first, batch, _, _, k_start, n_keys = locate_tile(tiles_ptr, sequences_ptr, 1, BLOCK_N)
    keys = first + tl.arange(0, BLOCK_N)
    inside = keys < n_keys
    offsets = batch * stride_gb + k_start + keys
    total = tl.zeros([BLOCK_N], tl.float32)
    for head in range(HEADS_KV):
        total += tl.load(partial_ptr + tl.cast(head, tl.int64) * stride_gh + offsets, mask=inside, other=0.0)
    tl.store(dkey_bias_ptr + offsets, total, mask=inside)
