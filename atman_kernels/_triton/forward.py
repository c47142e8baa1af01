"""Forward: one program owns a tile of query rows of one head and streams the keys it sees.

The running maximum is that of q k^T + key_bias / sm_scale, the bias being where the product's accumulator starts (see
``operands``), and sm_scale log2(e) is applied together with the subtraction of the maximum, in one fused multiply-add
per score; that needs sm_scale > 0. Elsewhere (SCALE_FIRST) a score is sm_scale q k^T + key_bias, one more multiply-add,
and log2(e) is applied with the maximum.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from atman_kernels._triton.launch import Launch, strides_of
from atman_kernels._triton.operands import attention_operands, streamed_operands
from atman_kernels._triton.tiles import (
    BATCH,
    K_LENGTH,
    K_START,
    LN_2,
    LOG2_E,
    PREFIX_LENGTH,
    PREFIX_START,
    Q_LENGTH,
    Q_START,
    SEQUENCE_COLUMNS,
    aligned_rows,
    attention_scores,
    block_sizes,
    count_tiles,
    is_visible,
    key_bounds,
    load_keys,
    load_rows,
    locate_tile,
    store_rows,
    tile_start,
)
from atman_kernels.plan import TILE

# Start of the running maximum: finite, so that rows without a key need no special case in the loop, and far enough from
# the end of fp32 that its scaled value is finite too. Scores below it count as -inf.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def _attend(
    acc,
    row_sum,
    row_max,
    q,
    first_position,
    last_position,
    k_base,
    v_base,
    bias_base,
    k_desc,
    v_desc,
    bias_desc,
    batch,
    k_start,
    head_kv,
    bias_start,
    stride_kt,
    stride_vt,
    stride_bt,
    n_keys,
    sm_scale,
    to_log2,
    window,
    HAS_KEY_BIAS: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax of one tile of rows over one run of keys; positions count from its first key."""
    offs_n = tl.arange(0, BLOCK_N)
    row_position = first_position + tl.arange(0, BLOCK_M)
    begin, full_begin, full_end, end = key_bounds(
        first_position, last_position, n_keys, window, IS_CAUSAL, HAS_WINDOW, BLOCK_N
    )
    for MASKED in tl.static_range(2):
        for tile in range(count_tiles(begin, full_begin, full_end, end, MASKED, BLOCK_N)):
            start = tile_start(tile, begin, full_begin, full_end, MASKED, BLOCK_N)
            k = load_keys(
                k_desc, k_base, batch, k_start, head_kv, start, n_keys, stride_kt, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D
            )
            scores = attention_scores(
                q, k, bias_desc, bias_base, bias_start, start, n_keys, stride_bt, sm_scale,
                HAS_KEY_BIAS, SCALE_FIRST, MASKED, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
            if MASKED:
                seen = is_visible(
                    row_position[:, None], (start + offs_n)[None, :], n_keys, window, IS_CAUSAL, HAS_WINDOW
                )
                scores = tl.where(seen, scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            p = tl.exp2(scores * to_log2 - (new_max * to_log2)[:, None])
            rescale = tl.exp2((row_max - new_max) * to_log2)
            row_sum = row_sum * rescale + tl.sum(p, 1)
            v = load_keys(
                v_desc, v_base, batch, k_start, head_kv, start, n_keys, stride_vt, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D
            )
            acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
            row_max = new_max
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=["stride_lb", "stride_lh", "stride_ab", "stride_bb", "window"])
def forward_kernel(
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
    bias_desc,
    prefix_k_desc,
    prefix_v_desc,
    sequences_ptr,
    tiles_ptr,
    stride_ab,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_lb,
    stride_lh,
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
    SCALE_FIRST: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
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
    to_log2 = LOG2_E if SCALE_FIRST else sm_scale * LOG2_E

    q_base = q_ptr + batch * stride_qb + q_start * stride_qt + head.to(tl.int64) * stride_qh
    q = load_rows(q_base, first, n_rows, stride_qt, True, BLOCK_M, HEAD_DIM, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    # Positions relative to the sequence's own first key; the prefix lies before it.
    first_position = first + (n_keys - n_rows)
    last_position = tl.minimum(first + BLOCK_M, n_rows) - 1 + (n_keys - n_rows)

    if HAS_PREFIX:
        n_prefix = tl.load(row_ptr + PREFIX_LENGTH)
        prefix_start = tl.load(row_ptr + PREFIX_START).to(tl.int64)
        acc, row_sum, row_max = _attend(
            acc,
            row_sum,
            row_max,
            q,
            first_position + n_prefix,
            last_position + n_prefix,
            prefix_k_ptr + prefix_start * stride_pkt + head_kv * stride_pkh,
            prefix_v_ptr + prefix_start * stride_pvt + head_kv * stride_pvh,
            key_bias_ptr,
            prefix_k_desc,
            prefix_v_desc,
            bias_desc,
            tl.cast(0, tl.int64),
            prefix_start,
            head_kv,
            0,
            stride_pkt,
            stride_pvt,
            stride_bt,
            n_prefix,
            sm_scale,
            to_log2,
            window,
            False,
            SCALE_FIRST,
            IS_CAUSAL,
            HAS_WINDOW,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            PRECISION,
        )
    acc, row_sum, row_max = _attend(
        acc,
        row_sum,
        row_max,
        q,
        first_position,
        last_position,
        k_ptr + batch * stride_kb + k_start * stride_kt + head_kv * stride_kh,
        v_ptr + batch * stride_vb + k_start * stride_vt + head_kv * stride_vh,
        key_bias_ptr + batch * stride_bb + k_start * stride_bt,
        k_desc,
        v_desc,
        bias_desc,
        batch,
        k_start,
        head_kv,
        aligned_rows(batch, 0, k_start, sequence, stride_ab, 0).to(tl.int32),
        stride_kt,
        stride_vt,
        stride_bt,
        n_keys,
        sm_scale,
        to_log2,
        window,
        HAS_KEY_BIAS,
        SCALE_FIRST,
        IS_CAUSAL,
        HAS_WINDOW,
        HEAD_DIM,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        PRECISION,
    )

    without_key = row_sum == 0.0
    row_sum = tl.where(without_key, 1.0, row_sum)
    lse = tl.where(without_key, float("-inf"), (row_max * to_log2 + tl.log2(row_sum)) * LN_2)
    rows = first + tl.arange(0, BLOCK_M)
    lse_base = lse_ptr + batch * stride_lb + head.to(tl.int64) * stride_lh + q_start
    tl.store(lse_base + rows, lse, mask=rows < n_rows)
    o_base = o_ptr + batch * stride_ob + q_start * stride_ot + head.to(tl.int64) * stride_oh
    store_rows(o_base, acc / row_sum[:, None], first, n_rows, stride_ot, BLOCK_M, HEAD_DIM, BLOCK_D)


def forward_launches(
    family: str,
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
    """The launches that fill ``o`` (B, Tq, Hq, D) and ``lse`` (B, Hq, Tq) for a device family.

    Scratch memory: fp32 (B, Tk), for the aligned bias.
    """
    blocks = block_sizes(family, "forward", q.shape[3], q.dtype)
    streamed, launches = streamed_operands(
        family, blocks.block_n, k, v, key_bias, prefix_k, prefix_v, sequences, tiles_k, sm_scale
    )
    arguments = {
        "o_ptr": o,
        "lse_ptr": lse,
        "tiles_ptr": tiles_q,
        **strides_of("o", o, "bth"),
        **strides_of("l", lse, "bh"),
        **attention_operands(q, k, v, key_bias, prefix_k, prefix_v, sequences, sm_scale, causal, window),
        **streamed,
        "BLOCK_M": blocks.block_m,
        "BLOCK_N": blocks.block_n,
    }
    programs = tiles_q.shape[0] * (TILE // blocks.block_m) * q.shape[2]
    return [*launches, Launch(forward_kernel, programs, arguments, blocks.num_warps, blocks.num_stages)]
