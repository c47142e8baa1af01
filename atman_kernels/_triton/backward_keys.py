"""Backward, key-owned: dk, dv and a kv head's part of dkey_bias of one tile of keys; then the heads are summed.

Fused, it also adds its part of dq, in fp32, to a scratch that all programs share (see ``backward``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
    rows_from,
    store_rows,
    tile_start,
    transposed_weights,
)


class KeyNeeds(NamedTuple):
    """What the key-owned kernel computes; each member is a ``tl.constexpr``.

    Attributes:
        DK, DV, DKEY_BIAS: the gradient is written.
        FUSED_DQ: its part of dq is added to the shared sum.
        INTERPRETED: Triton's interpreter runs it.
        ROW_COPIES: see :func:`load_row_numbers`.
    """

    DK: Any
    DV: Any
    DKEY_BIAS: Any
    FUSED_DQ: Any
    INTERPRETED: Any
    ROW_COPIES: Any


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


@triton.jit(
    do_not_specialize=["window", "bias_batch", "scratch_batch", "scratch_head", "partial_batch", "partial_head"]
)
def backward_keys_kernel(
    dq_sum_desc,
    dq_sum,
    dk,
    dv_ptr,
    dkey_bias_ptr,
    do,
    row_term_ptr,
    lse_log2_ptr,
    q,
    k,
    v,
    key_bias_ptr,
    sequences_ptr,
    tiles_ptr,
    window,
    bias_batch,
    scratch_batch,
    scratch_head,
    partial_batch,
    partial_head,
    sm_scale,
    flags,
    needs,
):
    """dk, dv (laid out alike) and the dkey_bias of one kv head for a tile of own keys, over all rows of its group."""
    HAS_KEY_BIAS: tl.constexpr = flags.HAS_KEY_BIAS
    IS_CAUSAL: tl.constexpr = flags.IS_CAUSAL
    HAS_WINDOW: tl.constexpr = flags.HAS_WINDOW
    ROW_COPIES: tl.constexpr = needs.ROW_COPIES
    HEAD_DIM: tl.constexpr = flags.HEAD_DIM
    BLOCK_M: tl.constexpr = flags.BLOCK_M
    BLOCK_N: tl.constexpr = flags.BLOCK_N
    BLOCK_D: tl.constexpr = flags.BLOCK_D
    PRECISION: tl.constexpr = flags.PRECISION
    head_kv, sequence, first, batch, q_start, n_rows, k_start, n_keys = locate_tile(
        tiles_ptr, sequences_ptr, flags.HEADS_Q // flags.GROUP, BLOCK_N
    )
    if first >= n_keys:
        return

    k_base, v_base = rows_from(k, batch, k_start, head_kv), rows_from(v, batch, k_start, head_kv)
    k_tile = load_rows(k_base, first, n_keys, k.time, True, BLOCK_N, HEAD_DIM, BLOCK_D)
    v_tile = load_rows(v_base, first, n_keys, v.time, True, BLOCK_N, HEAD_DIM, BLOCK_D)
    keys = first + tl.arange(0, BLOCK_N)
    bias_log2 = load_own_bias(key_bias_ptr, batch, k_start, first, n_keys, bias_batch, HAS_KEY_BIAS, BLOCK_N)

    # Every program of the group starts from the group's first query head.
    head = head_kv * flags.GROUP
    q_base, do_base = rows_from(q, batch, q_start, head), rows_from(do, batch, q_start, head)
    dk_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dkey_bias = tl.zeros([BLOCK_N], tl.float32)
    offs_m = tl.arange(0, BLOCK_M)
    shift = n_keys - n_rows
    last_key = tl.minimum(first + BLOCK_N, n_keys) - 1
    begin, full_begin, full_end, end = query_bounds(
        first, last_key, shift, n_rows, window, IS_CAUSAL, HAS_WINDOW, BLOCK_M
    )
    if needs.FUSED_DQ:
        # dq sums over keys: those past the end, whose exp(0 - lse) may overflow, must be masked and not only zero.
        full_end = tl.where(first + BLOCK_N > n_keys, full_begin, full_end)
    for MASKED in tl.static_range(2):
        n_tiles = count_tiles(begin, full_begin, full_end, end, MASKED, BLOCK_M)
        for tile in range(n_tiles * flags.GROUP):
            member = tile // n_tiles
            start = tile_start(tile - member * n_tiles, begin, full_begin, full_end, MASKED, BLOCK_M)
            # With heads outside rows in memory, a group's heads may lie further apart than 32 bits count.
            member = member.to(tl.int64)
            rows = start + offs_m
            q_tile = load_rows(q_base + member * q.head, start, n_rows, q.time, MASKED, BLOCK_M, HEAD_DIM, BLOCK_D)
            row_offsets = rows + aligned_rows(batch, head + member, q_start, sequence, scratch_batch, scratch_head)
            inside = rows < n_rows
            lse_log2 = load_row_numbers(
                lse_log2_ptr, row_offsets, inside, float("inf"), MASKED, ROW_COPIES, BLOCK_M, BLOCK_N
            )
            row_term = load_row_numbers(row_term_ptr, row_offsets, inside, 0.0, MASKED, ROW_COPIES, BLOCK_M, BLOCK_N)
            # Transposed, (BLOCK_N, BLOCK_M), p and ds are the left operands of the products below.
            p = transposed_weights(k_tile, q_tile, bias_log2, lse_log2, sm_scale, HAS_KEY_BIAS, PRECISION)
            if MASKED:
                seen = is_visible(rows[None, :] + shift, keys[:, None], n_keys, window, IS_CAUSAL, HAS_WINDOW)
                p = tl.where(seen, p, 0.0)
            do_tile = load_rows(do_base + member * do.head, start, n_rows, do.time, MASKED, BLOCK_M, HEAD_DIM, BLOCK_D)
            if needs.DV:
                dv_sum = tl.dot(p.to(do_tile.dtype), do_tile, dv_sum, input_precision=PRECISION)
            if needs.FUSED_DQ or needs.DK or needs.DKEY_BIAS:
                dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
                ds = p * (dp - row_term)
                if needs.DKEY_BIAS:
                    dkey_bias += tl.sum(ds, 1)
                if needs.DK:
                    dk_sum = tl.dot(ds.to(q_tile.dtype), q_tile, dk_sum, input_precision=PRECISION)
                if needs.FUSED_DQ:
                    dq = tl.trans(tl.dot(tl.trans(k_tile), ds.to(k_tile.dtype), input_precision=PRECISION))
                    head_q = head + member
                    _add_rows(
                        dq_sum_desc, rows_from(dq_sum, batch, q_start, head_q), dq, batch, q_start, head_q, start,
                        n_rows, dq_sum.time, HEAD_DIM, needs.INTERPRETED,
                    )  # fmt: skip

    dk_base = rows_from(dk, batch, k_start, head_kv)
    if needs.DK:
        store_rows(dk_base, dk_sum * sm_scale, first, n_keys, dk.time, BLOCK_N, HEAD_DIM, BLOCK_D)
    if needs.DV:
        dv_base = dv_ptr + batch * dk.batch + k_start * dk.time + head_kv * dk.head
        store_rows(dv_base, dv_sum, first, n_keys, dk.time, BLOCK_N, HEAD_DIM, BLOCK_D)
    if needs.DKEY_BIAS:
        partial_ptrs = dkey_bias_ptr + head_kv * partial_head + batch * partial_batch + k_start + keys
        tl.store(partial_ptrs, dkey_bias, mask=keys < n_keys)


@triton.jit
def scale_dq_kernel(
    dq,
    dq_sum_ptr,
    sequences_ptr,
    tiles_ptr,
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
    sum_base = dq_sum_ptr + batch * dq.batch + q_start * dq.time + head * dq.head
    total = load_rows(sum_base, first, n_rows, dq.time, True, BLOCK_M, HEAD_DIM, BLOCK_D)
    dq_base = rows_from(dq, batch, q_start, head)
    store_rows(dq_base, total * sm_scale, first, n_rows, dq.time, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["partial_head", "partial_batch"])
def sum_heads_kernel(
    dkey_bias_ptr,
    partial_ptr,
    sequences_ptr,
    tiles_ptr,
    partial_head,
    partial_batch,
    HEADS_KV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dkey_bias of a tile of keys from the (HEADS_KV, B, Tk) sums of the kv heads, in the order of the heads."""
    _, _, first, batch, _, _, k_start, n_keys = locate_tile(tiles_ptr, sequences_ptr, 1, BLOCK_N)
    keys = first + tl.arange(0, BLOCK_N)
    inside = keys < n_keys
    offsets = batch * partial_batch + k_start + keys
    total = tl.zeros([BLOCK_N], tl.float32)
    for head in range(HEADS_KV):
        total += tl.load(partial_ptr + tl.cast(head, tl.int64) * partial_head + offsets, mask=inside, other=0.0)
    tl.store(dkey_bias_ptr + offsets, total, mask=inside)
