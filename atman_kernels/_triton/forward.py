"""Forward: one program owns a tile of query rows of one head and streams the keys it sees.

The running maximum is in log2 units: one fused multiply-add per score converts and subtracts it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from atman_kernels._triton.launch import (
    BlockSizes,
    Launch,
    attention_operands,
    block_sizes,
    kept_launches,
    streamed_operands,
    strides_of,
)
from atman_kernels._triton.tiles import (
    LN_2,
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
from atman_kernels.plan import TILE
from atman_kernels.problem import AttentionProblem

# Start of the running maximum: finite, so that rows without a key need no special case in the loop. Scores below it
# count as -inf.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def _attend(
    acc,
    row_sum,
    max_log2,
    q,
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
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax of the rows ``first`` .. ``last`` over one run of keys."""
    row_position = keys.shift + first + tl.arange(0, BLOCK_M)
    begin, full_begin, full_end, end = key_bounds(
        keys.shift + first, keys.shift + last, keys.length, window, IS_CAUSAL, HAS_WINDOW, BLOCK_N
    )
    for MASKED in tl.static_range(2):
        for tile in range(count_tiles(begin, full_begin, full_end, end, MASKED, BLOCK_N)):
            start = tile_start(tile, begin, full_begin, full_end, MASKED, BLOCK_N)
            k = load_keys(k_desc, keys.k_ptr, keys.stride_kt, keys, start, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D)
            scores, to_log2 = attention_scores(
                q, k, keys, start, row_position, sm_scale, window, HAS_KEY_BIAS, BIAS_ROWS, SCALE_FIRST,
                IS_CAUSAL, HAS_WINDOW, MASKED, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
            new_max = tl.maximum(max_log2, tl.max(scores, 1) * to_log2)
            p = tl.exp2(scores * to_log2 - new_max[:, None])
            rescale = tl.exp2(max_log2 - new_max)
            row_sum = row_sum * rescale[:, None] + partial_sums(p, SUM_COLUMNS)
            v = load_keys(v_desc, keys.v_ptr, keys.stride_vt, keys, start, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D)
            acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
            max_log2 = new_max
    return acc, row_sum, max_log2


@triton.jit(do_not_specialize=["stride_lb", "stride_lh", "stride_bb", "window"])
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
    prefix_k_desc,
    prefix_v_desc,
    sequences_ptr,
    tiles_ptr,
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
    BIAS_ROWS: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o and lse of a tile of rows of one head."""
    head, sequence, first, batch, q_start, n_rows, k_start, n_keys = locate_tile(
        tiles_ptr, sequences_ptr, HEADS_Q, BLOCK_M
    )
    if first >= n_rows:
        return
    last = tl.minimum(first + BLOCK_M, n_rows) - 1
    q_base = q_ptr + batch * stride_qb + q_start * stride_qt + head * stride_qh
    q = load_rows(q_base, first, n_rows, stride_qt, True, BLOCK_M, HEAD_DIM, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M, SUM_COLUMNS], tl.float32)
    max_log2 = tl.full([BLOCK_M], LOWEST, tl.float32)
    for OWN in tl.static_range(1 - HAS_PREFIX, 2):
        keys = locate_keys(
            OWN, k_ptr, v_ptr, key_bias_ptr, prefix_k_ptr, prefix_v_ptr,
            sequences_ptr, sequence, batch, k_start, n_keys, n_rows, head // GROUP,
            stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_bb,
            stride_pkt, stride_pkh, stride_pvt, stride_pvh,
        )  # fmt: skip
        acc, row_sum, max_log2 = _attend(
            acc, row_sum, max_log2, q, keys, k_desc if OWN else prefix_k_desc, v_desc if OWN else prefix_v_desc,
            first, last, sm_scale, window, HAS_KEY_BIAS and OWN, BIAS_ROWS, SUM_COLUMNS, SCALE_FIRST,
            IS_CAUSAL, HAS_WINDOW, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip

    row_sum = tl.sum(row_sum, 1)
    without_key = row_sum == 0.0
    row_sum = tl.where(without_key, 1.0, row_sum)
    lse = tl.where(without_key, float("-inf"), (max_log2 + tl.log2(row_sum)) * LN_2)
    rows = first + tl.arange(0, BLOCK_M)
    lse_base = lse_ptr + batch * stride_lb + head * stride_lh + q_start
    tl.store(lse_base + rows, lse, mask=rows < n_rows)
    o_base = o_ptr + batch * stride_ob + q_start * stride_ot + head * stride_oh
    store_rows(o_base, acc / row_sum[:, None], first, n_rows, stride_ot, BLOCK_M, HEAD_DIM, BLOCK_D)


def forward_launches(family: str, o: Tensor, lse: Tensor, x: AttentionProblem) -> list[Launch]:
    """The launches that fill ``o`` (B, Tq, Hq, D) and ``lse`` (B, Hq, Tq) for a device family."""
    blocks = block_sizes(family, "forward", x.q.shape[3], x.q.dtype)
    settings = ("forward", family, blocks, x.sm_scale, x.causal, x.window)
    return kept_launches(settings, (o, lse, *x.tensors), lambda: _build(family, blocks, o, lse, x))


def _build(family: str, blocks: BlockSizes, o: Tensor, lse: Tensor, x: AttentionProblem) -> list[Launch]:
    arguments = {
        "o_ptr": o,
        "lse_ptr": lse,
        "tiles_ptr": x.tiles_q,
        **strides_of("o", o, "bth"),
        **strides_of("l", lse, "bh"),
        **attention_operands(x),
        **streamed_operands(family, blocks, x),
        "BLOCK_M": blocks.block_m,
        "BLOCK_N": blocks.block_n,
    }
    programs = x.tiles_q.shape[0] * (TILE // blocks.block_m) * x.q.shape[2]
    return [Launch(forward_kernel, programs, arguments, blocks.num_warps, blocks.num_stages)]
