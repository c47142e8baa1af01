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
    block_sizes,
    descriptors_of,
    flags_of,
    kept_launches,
    operands_of,
    rows_of,
    varying_of,
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
    rows_from,
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
    acc, row_sum, max_log2, q, keys, k_desc, v_desc, first, last, sm_scale, window, flags, HAS_KEY_BIAS: tl.constexpr
):
    """Online softmax of the rows ``first`` .. ``last`` over one run of keys."""
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
            scores, to_log2 = attention_scores(
                q, k, keys, start, row_position, sm_scale, window, HAS_KEY_BIAS, flags.BIAS_ROWS, flags.SCALE_FIRST,
                flags.IS_CAUSAL, flags.HAS_WINDOW, MASKED, flags.BLOCK_M, BLOCK_N, flags.PRECISION,
            )  # fmt: skip
            new_max = tl.maximum(max_log2, tl.max(scores, 1) * to_log2)
            p = tl.exp2(scores * to_log2 - new_max[:, None])
            rescale = tl.exp2(max_log2 - new_max)
            row_sum = row_sum * rescale[:, None] + partial_sums(p, flags.SUM_COLUMNS)
            v = load_keys(
                v_desc, keys.v_ptr, keys.stride_vt, keys, start, MASKED, BLOCK_N, flags.HEAD_DIM, flags.BLOCK_D
            )
            acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=flags.PRECISION)
            max_log2 = new_max
    return acc, row_sum, max_log2


@triton.jit(do_not_specialize=["window", "bias_batch", "lse_batch", "lse_head"])
def forward_kernel(
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
    sm_scale,
    flags,
):
    """o and lse of a tile of rows of one head."""
    BLOCK_M: tl.constexpr = flags.BLOCK_M
    HEAD_DIM: tl.constexpr = flags.HEAD_DIM
    BLOCK_D: tl.constexpr = flags.BLOCK_D
    head, sequence, first, batch, q_start, n_rows, k_start, n_keys = locate_tile(
        tiles_ptr, sequences_ptr, flags.HEADS_Q, BLOCK_M
    )
    if first >= n_rows:
        return
    last = tl.minimum(first + BLOCK_M, n_rows) - 1
    q_tile = load_rows(rows_from(q, batch, q_start, head), first, n_rows, q.time, True, BLOCK_M, HEAD_DIM, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M, flags.SUM_COLUMNS], tl.float32)
    max_log2 = tl.full([BLOCK_M], LOWEST, tl.float32)
    for OWN in tl.static_range(1 - flags.HAS_PREFIX, 2):
        keys = locate_keys(
            OWN, k, v, key_bias_ptr, prefix_k, prefix_v,
            sequences_ptr, sequence, batch, k_start, n_keys, n_rows, head // flags.GROUP, bias_batch,
        )  # fmt: skip
        acc, row_sum, max_log2 = _attend(
            acc, row_sum, max_log2, q_tile, keys, k_desc if OWN else prefix_k_desc, v_desc if OWN else prefix_v_desc,
            first, last, sm_scale, window, flags, flags.HAS_KEY_BIAS and OWN,
        )  # fmt: skip

    row_sum = tl.sum(row_sum, 1)
    without_key = row_sum == 0.0
    row_sum = tl.where(without_key, 1.0, row_sum)
    lse = tl.where(without_key, float("-inf"), (max_log2 + tl.log2(row_sum)) * LN_2)
    rows = first + tl.arange(0, BLOCK_M)
    lse_base = lse_ptr + batch * lse_batch + head * lse_head + q_start
    tl.store(lse_base + rows, lse, mask=rows < n_rows)
    o_base = rows_from(o, batch, q_start, head)
    store_rows(o_base, acc / row_sum[:, None], first, n_rows, o.time, BLOCK_M, HEAD_DIM, BLOCK_D)


def forward_launches(family: str, o: Tensor, lse: Tensor, x: AttentionProblem) -> list[Launch]:
    """The launches that fill ``o`` (B, Tq, Hq, D) and ``lse`` (B, Hq, Tq) for a device family."""
    blocks = block_sizes(family, "forward", x.q.shape[3], x.q.dtype)
    settings = ("forward", family, blocks, x.sm_scale, x.causal, x.window)
    return kept_launches(settings, (o, lse, *x.tensors), lambda: _build(family, blocks, o, lse, x))


def _build(family: str, blocks: BlockSizes, o: Tensor, lse: Tensor, x: AttentionProblem) -> list[Launch]:
    arguments = {
        "o": rows_of(o),
        "lse_ptr": lse,
        "tiles_ptr": x.tiles_q,
        **operands_of(x),
        **descriptors_of(family, blocks, x),
        **varying_of(x),
        "lse_batch": lse.stride(0),
        "lse_head": lse.stride(1),
        "flags": flags_of(family, blocks, x),
    }
    programs = x.tiles_q.shape[0] * (TILE // blocks.block_m) * x.q.shape[2]
    return [Launch(forward_kernel, programs, arguments, blocks.num_warps, blocks.num_stages)]
