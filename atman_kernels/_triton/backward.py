"""Backward, deterministic and without atomics: query-owned, then key-owned programs, then a sum over heads.

With s the scores, p = exp(s - lse), dp = do v^T and r = delta - dlse::

    ds = p (dp - r);  dq = sm_scale ds k;  dk = sm_scale ds^T q;  dv = p^T do;  dkey_bias = sum over heads, rows of ds

The query kernel starts from delta = sum_d do o, whose rounding of o a long sum of ds would expose in ``dkey_bias``. It
therefore also sums its ds over each row: that sum is the error of delta, and the key kernel gets the corrected value.
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
    query_bounds,
    store_rows,
    tile_start,
)
from atman_kernels.plan import TILE

# fp32 numbers per 16 bytes: the key kernel reads its per-row numbers in vectors.
ROW_ALIGNMENT = tl.constexpr(4)


@triton.jit
def _accumulate_dq(
    dq,
    ds_sum,
    q,
    do,
    lse_log2,
    row_term,
    first_position,
    last_position,
    k_base,
    v_base,
    bias_base,
    stride_kt,
    stride_vt,
    stride_bt,
    n_keys,
    sm_scale,
    window,
    HAS_KEY_BIAS: tl.constexpr,
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
    """Add one run of keys to dq (without sm_scale) and to the row sums of ds; positions count from its first key."""
    offs_n = tl.arange(0, BLOCK_N)
    row_position = first_position + tl.arange(0, BLOCK_M)
    begin, full_begin, full_end, end = key_bounds(
        first_position, last_position, n_keys, window, IS_CAUSAL, HAS_WINDOW, BLOCK_N
    )
    for MASKED in tl.static_range(2):
        for tile in range(count_tiles(begin, full_begin, full_end, end, MASKED, BLOCK_N)):
            start = tile_start(tile, begin, full_begin, full_end, MASKED, BLOCK_N)
            k = load_rows(k_base, start, n_keys, stride_kt, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D)
            v = load_rows(v_base, start, n_keys, stride_vt, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * sm_scale
            if HAS_KEY_BIAS:
                bias_ptrs = bias_base + (start + offs_n) * stride_bt
                bias = tl.load(bias_ptrs, mask=start + offs_n < n_keys, other=0.0) if MASKED else tl.load(bias_ptrs)
                scores += bias[None, :]
            if MASKED:
                seen = is_visible(
                    row_position[:, None], (start + offs_n)[None, :], n_keys, window, IS_CAUSAL, HAS_WINDOW
                )
                scores = tl.where(seen, scores, float("-inf"))
            # One fused multiply-add per score, whether or not there is a bias.
            p = tl.exp2(scores * LOG2_E - lse_log2[:, None])
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - row_term[:, None])
            if EXACT_DELTA:
                ds_sum += tl.sum(ds, 1)
            if NEED_DQ:
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, ds_sum


@triton.jit
def _aligned_rows(batch, head, q_start, sequence, stride_rb, stride_rh):
    """Where a sequence's rows start in the scratch of :func:`_row_scratch`: at a multiple of ROW_ALIGNMENT numbers."""
    return (batch * stride_rb + head * stride_rh + q_start // ROW_ALIGNMENT + sequence) * ROW_ALIGNMENT


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
    stride_bt,
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
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    NEED_DQ: tl.constexpr,
    EXACT_DELTA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write r = delta - dlse and the log2 lse (+inf for none) of a tile of rows and, if needed, their dq (as o)."""
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
    head = head.to(tl.int64)

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
        ds_sum = tl.zeros([BLOCK_M], tl.float32)
        # Positions relative to the sequence's own first key; the prefix lies before it.
        first_position = first + (n_keys - n_rows)
        last_position = tl.minimum(first + BLOCK_M, n_rows) - 1 + (n_keys - n_rows)
        if HAS_PREFIX:
            n_prefix = tl.load(row_ptr + PREFIX_LENGTH)
            prefix_start = tl.load(row_ptr + PREFIX_START).to(tl.int64)
            dq, ds_sum = _accumulate_dq(
                dq,
                ds_sum,
                q,
                do,
                lse_log2,
                row_term,
                first_position + n_prefix,
                last_position + n_prefix,
                prefix_k_ptr + prefix_start * stride_pkt + head_kv * stride_pkh,
                prefix_v_ptr + prefix_start * stride_pvt + head_kv * stride_pvh,
                key_bias_ptr,
                stride_pkt,
                stride_pvt,
                stride_bt,
                n_prefix,
                sm_scale,
                window,
                False,
                IS_CAUSAL,
                HAS_WINDOW,
                NEED_DQ,
                EXACT_DELTA,
                HEAD_DIM,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                PRECISION,
            )
        dq, ds_sum = _accumulate_dq(
            dq,
            ds_sum,
            q,
            do,
            lse_log2,
            row_term,
            first_position,
            last_position,
            k_ptr + batch * stride_kb + k_start * stride_kt + head_kv * stride_kh,
            v_ptr + batch * stride_vb + k_start * stride_vt + head_kv * stride_vh,
            key_bias_ptr + batch * stride_bb + k_start * stride_bt,
            stride_kt,
            stride_vt,
            stride_bt,
            n_keys,
            sm_scale,
            window,
            HAS_KEY_BIAS,
            IS_CAUSAL,
            HAS_WINDOW,
            NEED_DQ,
            EXACT_DELTA,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            PRECISION,
        )
        if NEED_DQ:
            dq_base = dq_ptr + batch * stride_ob + q_start * stride_ot + head * stride_oh
            store_rows(dq_base, dq * sm_scale, first, n_rows, stride_ot, BLOCK_M, HEAD_DIM, BLOCK_D)
        if EXACT_DELTA:
            # sum_v p (dp - r) = (delta_exact - r), of which dlse is meant and the rest is the error of delta.
            row_term += ds_sum
            if HAS_DLSE:
                row_term -= dlse
    aligned_offset = _aligned_rows(batch, head, q_start, sequence, stride_rb, stride_rh)
    tl.store(row_term_ptr + aligned_offset + rows, row_term, mask=rows < n_rows)
    tl.store(lse_log2_ptr + aligned_offset + rows, lse_log2, mask=rows < n_rows)


@triton.jit(do_not_specialize=["stride_rb", "stride_rh", "stride_bb", "stride_gh", "stride_gb", "window"])
def backward_keys_kernel(
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
    stride_bt,
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
    NEED_DK: tl.constexpr,
    NEED_DV: tl.constexpr,
    NEED_DKEY_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk, dv (laid out alike) and the dkey_bias of one kv head for a tile of own keys, over all rows of its group."""
    head_kv, sequence, first = locate_tile(tiles_ptr, sequences_ptr, HEADS_Q // GROUP, BLOCK_N)
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
    head_kv = head_kv.to(tl.int64)
    scale_log2 = sm_scale * LOG2_E

    k_base = k_ptr + batch * stride_kb + k_start * stride_kt + head_kv * stride_kh
    v_base = v_ptr + batch * stride_vb + k_start * stride_vt + head_kv * stride_vh
    k = load_rows(k_base, first, n_keys, stride_kt, True, BLOCK_N, HEAD_DIM, BLOCK_D)
    v = load_rows(v_base, first, n_keys, stride_vt, True, BLOCK_N, HEAD_DIM, BLOCK_D)
    keys = first + tl.arange(0, BLOCK_N)
    if HAS_KEY_BIAS:
        bias_ptrs = key_bias_ptr + batch * stride_bb + (k_start + keys) * stride_bt
        bias_log2 = tl.load(bias_ptrs, mask=keys < n_keys, other=0.0) * LOG2_E

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
    for MASKED in tl.static_range(2):
        n_tiles = count_tiles(begin, full_begin, full_end, end, MASKED, BLOCK_M)
        for tile in range(GROUP * n_tiles):
            member = tile // n_tiles
            start = tile_start(tile - member * n_tiles, begin, full_begin, full_end, MASKED, BLOCK_M)
            rows = start + offs_m
            q = load_rows(q_base + member * stride_qh, start, n_rows, stride_qt, MASKED, BLOCK_M, HEAD_DIM, BLOCK_D)
            row_offsets = _aligned_rows(batch, head + member, q_start, sequence, stride_rb, stride_rh) + rows
            if MASKED:
                lse_log2 = tl.load(lse_log2_ptr + row_offsets, mask=rows < n_rows, other=float("inf"))
                row_term = tl.load(row_term_ptr + row_offsets, mask=rows < n_rows, other=0.0)
            else:
                lse_log2 = tl.load(lse_log2_ptr + row_offsets)
                row_term = tl.load(row_term_ptr + row_offsets)
            # Scores transposed, (BLOCK_N, BLOCK_M): p and ds are then the left operands of the products below.
            scores_log2 = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2
            if HAS_KEY_BIAS:
                scores_log2 += bias_log2[:, None]
            p = tl.exp2(scores_log2 - lse_log2[None, :])
            if MASKED:
                seen = is_visible(rows[None, :] + shift, keys[:, None], n_keys, window, IS_CAUSAL, HAS_WINDOW)
                p = tl.where(seen, p, 0.0)
            do = load_rows(do_base + member * stride_doh, start, n_rows, stride_dot, MASKED, BLOCK_M, HEAD_DIM, BLOCK_D)
            if NEED_DV:
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            if NEED_DK or NEED_DKEY_BIAS:
                dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
                ds = p * (dp - row_term[None, :])
                if NEED_DKEY_BIAS:
                    dkey_bias += tl.sum(ds, 1)
                if NEED_DK:
                    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    grad_offset = batch * stride_dkb + k_start * stride_dkt + head_kv * stride_dkh
    if NEED_DK:
        store_rows(dk_ptr + grad_offset, dk * sm_scale, first, n_keys, stride_dkt, BLOCK_N, HEAD_DIM, BLOCK_D)
    if NEED_DV:
        store_rows(dv_ptr + grad_offset, dv, first, n_keys, stride_dkt, BLOCK_N, HEAD_DIM, BLOCK_D)
    if NEED_DKEY_BIAS:
        partial_ptrs = dkey_bias_ptr + head_kv * stride_gh + batch * stride_gb + k_start + keys
        tl.store(partial_ptrs, dkey_bias, mask=keys < n_keys)


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
    _, sequence, first = locate_tile(tiles_ptr, sequences_ptr, 1, BLOCK_N)
    if sequence < 0:
        return
    row_ptr = sequences_ptr + sequence * SEQUENCE_COLUMNS
    keys = first + tl.arange(0, BLOCK_N)
    inside = keys < tl.load(row_ptr + K_LENGTH)
    offsets = tl.load(row_ptr + BATCH).to(tl.int64) * stride_gb + tl.load(row_ptr + K_START).to(tl.int64) + keys
    total = tl.zeros([BLOCK_N], tl.float32)
    for head in range(HEADS_KV):
        total += tl.load(partial_ptr + tl.cast(head, tl.int64) * stride_gh + offsets, mask=inside, other=0.0)
    tl.store(dkey_bias_ptr + offsets, total, mask=inside)


def _row_scratch(lse: Tensor, n_seq: int) -> tuple[Tensor, Tensor]:
    """Two fp32 (B, Hq, T') with room for every sequence to start at a multiple of ROW_ALIGNMENT."""
    batch, heads, n_rows = lse.shape
    alignment = ROW_ALIGNMENT.value
    padded = (-(-n_rows // alignment) + n_seq) * alignment
    first, second = lse.new_empty((2, batch, heads, padded)).unbind(0)
    return first, second


def backward_launches(
    family: str,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dkey_bias: Tensor | None,
    do: Tensor,
    dlse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    sequences: Tensor,
    tiles_q: Tensor,
    tiles_k: Tensor,
    sm_scale: float,
    causal: bool,
    window: int | None,
) -> list[Launch]:
    """The launches, in order, that fill those of the contiguous gradients that are not None.

    Scratch memory is fp32 and linear in the sequence: (B, Hq, Tq) for r and for lse, (Hkv, B, Tk) for dkey_bias.
    """
    heads_q, heads_kv, head_dim = q.shape[2], k.shape[2], q.shape[3]
    o, lse = o.contiguous(), lse.contiguous()
    row_term, lse_log2 = _row_scratch(lse, sequences.shape[0])
    operands = attention_operands(q, k, v, key_bias, prefix_k, prefix_v, sequences, sm_scale, causal, window)
    common = {**operands, "do_ptr": do, "row_term_ptr": row_term, "lse_log2_ptr": lse_log2}
    common |= strides_of("do", do, "bth")
    common |= {f"stride_r{axis}": row_term.stride(i) // ROW_ALIGNMENT.value for i, axis in enumerate("bh")}

    blocks = block_sizes(family, "backward_queries", head_dim, q.dtype)
    arguments = {
        **common,
        "dq_ptr": o if dq is None else dq,
        "dlse_ptr": lse if dlse is None else dlse.contiguous(),
        "o_ptr": o,
        "lse_ptr": lse,
        "tiles_ptr": tiles_q,
        **strides_of("o", o, "bth"),
        **strides_of("l", lse, "bh"),
        "HAS_DLSE": dlse is not None,
        "NEED_DQ": dq is not None,
        "EXACT_DELTA": dkey_bias is not None,
        "BLOCK_M": blocks.block_m,
        "BLOCK_N": blocks.block_n,
    }
    programs = tiles_q.shape[0] * (TILE // blocks.block_m) * heads_q
    launches = [Launch(backward_queries_kernel, programs, arguments, blocks.num_warps, blocks.num_stages)]
    if dk is None and dv is None and dkey_bias is None:
        return launches

    heads_sum = dkey_bias
    if dkey_bias is not None and heads_kv > 1:
        heads_sum = dkey_bias.new_empty((heads_kv, *dkey_bias.shape))
    partial = lse if heads_sum is None else heads_sum.view(heads_kv, *k.shape[:2])
    blocks = block_sizes(family, "backward_keys", head_dim, q.dtype)
    arguments = {
        **common,
        "dk_ptr": k if dk is None else dk,
        "dv_ptr": v if dv is None else dv,
        "dkey_bias_ptr": partial,
        "tiles_ptr": tiles_k,
        **strides_of("dk", dv if dk is None else dk, "bth"),
        **strides_of("g", partial, "hb"),
        "NEED_DK": dk is not None,
        "NEED_DV": dv is not None,
        "NEED_DKEY_BIAS": dkey_bias is not None,
        "BLOCK_M": blocks.block_m,
        "BLOCK_N": blocks.block_n,
    }
    programs = tiles_k.shape[0] * (TILE // blocks.block_n) * heads_kv
    launches.append(Launch(backward_keys_kernel, programs, arguments, blocks.num_warps, blocks.num_stages))

    if dkey_bias is not None and heads_kv > 1:
        arguments = {
            "dkey_bias_ptr": dkey_bias,
            "partial_ptr": partial,
            "sequences_ptr": sequences,
            "tiles_ptr": tiles_k,
            **strides_of("g", partial, "hb"),
            "HEADS_KV": heads_kv,
            "BLOCK_N": TILE,
        }
        launches.append(Launch(sum_heads_kernel, tiles_k.shape[0], arguments, 4, 1))
    return launches
