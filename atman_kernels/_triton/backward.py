"""Backward: query-owned, then key-owned programs, then a sum over heads; deterministic and without atomics by default.

With s the scores, p = exp(s - lse), dp = do v^T and r = delta - dlse::

    ds = p (dp - r);  dq = sm_scale ds k;  dk = sm_scale ds^T q;  dv = p^T do;  dkey_bias = sum over heads, rows of ds

The query kernel starts from delta = sum_d do o, whose rounding of o a long sum of ds would expose in ``dkey_bias``. It
therefore also sums its ds over each row: that sum is the error of delta, and the key kernel gets the corrected value.

The split costs seven matrix products. ``fused`` computes five: the key kernel also multiplies ds by k and adds the tile
to an fp32 sum of dq in the memory system. The order of these additions varies from run to run, and delta keeps the
rounding of o, for which same-dtype PyTorch has the same error.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from atman_kernels._triton.backward_keys import KeyNeeds, backward_keys_kernel, scale_dq_kernel, sum_heads_kernel
from atman_kernels._triton.backward_queries import RowNeeds, backward_queries_kernel
from atman_kernels._triton.launch import (
    BlockSizes,
    Launch,
    block_sizes,
    descriptors_of,
    flags_of,
    kept_launches,
    operands_of,
    padded_head_dim,
    row_copies,
    rows_of,
    tile_descriptor,
    varying_of,
)
from atman_kernels._triton.tiles import ROW_ALIGNMENT, aligned_size
from atman_kernels.plan import TILE
from atman_kernels.problem import AttentionProblem, Gradients


class _Scratch(NamedTuple):
    """fp32 memory of one backward; None where there is none."""

    row_term: Tensor
    lse_log2: Tensor
    dq_sum: Tensor | None
    partial: Tensor | None


class _Blocks(NamedTuple):
    """Block sizes of the query-owned and the key-owned kernel."""

    queries: BlockSizes
    keys: BlockSizes


def _row_scratch(lse: Tensor, n_seq: int) -> tuple[Tensor, Tensor]:
    """Two fp32 (B, Hq, T') with room for every sequence to start at a multiple of ROW_ALIGNMENT."""
    batch, heads, n_rows = lse.shape
    first, second = lse.new_empty((2, batch, heads, aligned_size(n_rows, n_seq))).unbind(0)
    return first, second


def _require_reductions(family: str, dq_sum: Tensor) -> None:
    if tile_descriptor(family, dq_sum, [1, 1, 1, padded_head_dim(dq_sum.shape[3])]) is None:
        raise RuntimeError(
            "the fused backward adds to dq through a tensor descriptor, which needs compute capability 9 or higher and"
            f" rows of a multiple of 16 bytes; got {family} and head_dim {dq_sum.shape[3]} in {dq_sum.dtype}"
        )


def _scale_dq_launch(dq: Tensor, dq_sum: Tensor, sequences: Tensor, tiles_q: Tensor, sm_scale: float) -> Launch:
    heads_q, head_dim = dq.shape[2:]
    arguments = {
        "dq": rows_of(dq),
        "dq_sum_ptr": dq_sum,
        "sequences_ptr": sequences,
        "tiles_ptr": tiles_q,
        "sm_scale": sm_scale,
        "HEADS_Q": heads_q,
        "HEAD_DIM": head_dim,
        "BLOCK_M": TILE,
        "BLOCK_D": padded_head_dim(head_dim),
    }
    return Launch(scale_dq_kernel, tiles_q.shape[0] * heads_q, arguments, 8, 1)


def _sum_heads_launch(dkey_bias: Tensor, partial: Tensor, sequences: Tensor, tiles_k: Tensor) -> Launch:
    arguments = {
        "dkey_bias_ptr": dkey_bias,
        "partial_ptr": partial,
        "sequences_ptr": sequences,
        "tiles_ptr": tiles_k,
        "partial_head": partial.stride(0),
        "partial_batch": partial.stride(1),
        "HEADS_KV": partial.shape[0],
        "BLOCK_N": TILE,
    }
    return Launch(sum_heads_kernel, tiles_k.shape[0], arguments, 4, 1)


def backward_launches(
    family: str,
    gradients: Gradients,
    do: Tensor,
    dlse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    x: AttentionProblem,
    *,
    fused: bool = False,
) -> list[Launch]:
    """The launches, in order, that fill those of the contiguous gradients that are not None.

    Scratch memory is fp32 and linear in the sequence: (B, Hq, Tq) for r and for lse, (Hkv, B, Tk) for
    dkey_bias; fused, for 16-bit inputs, the sum of dq as well.

    Args:
        family: device family, a key of the block-size table.
        fused: five products and reduce-adds instead of seven products, where dq and another gradient are asked for.

    Raises:
        RuntimeError: if ``fused`` and the device has no bulk copy engine, or head_dim is not a multiple of 8 (16-bit).
    """
    dq, dk, dv, dkey_bias = gradients
    heads_kv, head_dim = x.k.shape[2], x.q.shape[3]
    only_dq = dk is None and dv is None and dkey_bias is None
    fused = fused and dq is not None and not only_dq
    row_term, lse_log2 = _row_scratch(lse, x.sequences.shape[0])
    dq_sum = torch.empty_like(dq, dtype=torch.float32) if fused and dq.dtype != torch.float32 else dq
    if fused:
        _require_reductions(family, dq_sum)
    heads_sum = dkey_bias
    if dkey_bias is not None and heads_kv > 1:
        heads_sum = dkey_bias.new_empty((heads_kv, *dkey_bias.shape))
    partial = None if heads_sum is None else heads_sum.view(heads_kv, *x.k.shape[:2])
    scratch = _Scratch(row_term, lse_log2, dq_sum, partial)
    o, lse, dlse = o.contiguous(), lse.contiguous(), None if dlse is None else dlse.contiguous()
    blocks = _Blocks(
        block_sizes(family, "backward_queries", head_dim, x.q.dtype),
        block_sizes(family, "backward_fused" if fused else "backward_keys", head_dim, x.q.dtype),
    )
    settings = ("backward", family, blocks, fused, x.sm_scale, x.causal, x.window)
    return kept_launches(
        settings,
        (*gradients, do, dlse, o, lse, *scratch, *x.tensors),
        lambda: _build(family, blocks, gradients, do, dlse, o, lse, x, scratch, fused),
    )


def _build(
    family: str,
    blocks: _Blocks,
    gradients: Gradients,
    do: Tensor,
    dlse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    x: AttentionProblem,
    scratch: _Scratch,
    fused: bool,
) -> list[Launch]:
    dq, dk, dv, dkey_bias = gradients
    row_term, lse_log2, dq_sum, partial = scratch
    heads_q, heads_kv, head_dim = x.q.shape[2], x.k.shape[2], x.q.shape[3]
    scratch_batch, scratch_head, _ = (stride // ROW_ALIGNMENT.value for stride in row_term.stride())
    shared = {
        **operands_of(x),
        "do": rows_of(do),
        "row_term_ptr": row_term,
        "lse_log2_ptr": lse_log2,
        **varying_of(x),
        "scratch_batch": scratch_batch,
        "scratch_head": scratch_head,
    }
    # Without dq and dkey_bias it computes the terms of its rows and visits no keys; fused, it visits the prefix's.
    own = blocks.queries
    needs = RowNeeds(
        DLSE=dlse is not None,
        DQ=dq is not None,
        EXACT_DELTA=dkey_bias is not None and not fused,
        PREFIX_ONLY=fused,
    )
    arguments = {
        **shared,
        **descriptors_of(family, own, x),
        "dq_ptr": o if dq is None else dq_sum,
        "dlse_ptr": lse if dlse is None else dlse,
        "o": rows_of(o),
        "lse_ptr": lse,
        "lse_batch": lse.stride(0),
        "lse_head": lse.stride(1),
        "tiles_ptr": x.tiles_q,
        "flags": flags_of(family, own, x),
        "needs": RowNeeds(*map(tl.constexpr, needs)),
    }
    programs = x.tiles_q.shape[0] * (TILE // own.block_m) * heads_q
    launches = [Launch(backward_queries_kernel, programs, arguments, own.num_warps, own.num_stages)]
    if dk is None and dv is None and dkey_bias is None:
        return launches

    own, dq_desc = blocks.keys, None
    if fused:
        dq_desc = tile_descriptor(family, dq_sum, [1, own.block_m, 1, padded_head_dim(head_dim)])
    needs = KeyNeeds(
        DK=dk is not None,
        DV=dv is not None,
        DKEY_BIAS=dkey_bias is not None,
        FUSED_DQ=fused,
        INTERPRETED=family == "interpreter",
        ROW_COPIES=row_copies(family, own, head_dim, biased=x.key_bias is not None, fused=fused),
    )
    shared = {name: value for name, value in shared.items() if not name.startswith("prefix_")}
    arguments = {
        **shared,
        "dq_sum_desc": dq_desc,
        "dq_sum": rows_of(dq_sum if fused else None, x.q),
        "dk": rows_of(dv if dk is None else dk, x.k),
        "dv_ptr": x.k if dv is None else dv,
        "dkey_bias_ptr": lse if partial is None else partial,
        "partial_batch": 0 if partial is None else partial.stride(1),
        "partial_head": 0 if partial is None else partial.stride(0),
        "tiles_ptr": x.tiles_k,
        "flags": flags_of(family, own, x),
        "needs": KeyNeeds(*map(tl.constexpr, needs)),
    }
    programs = x.tiles_k.shape[0] * (TILE // own.block_n) * heads_kv
    launches.append(Launch(backward_keys_kernel, programs, arguments, own.num_warps, own.num_stages))

    if fused:
        launches.append(_scale_dq_launch(dq, dq_sum, x.sequences, x.tiles_q, x.sm_scale))
    if dkey_bias is not None and heads_kv > 1:
        launches.append(_sum_heads_launch(dkey_bias, partial, x.sequences, x.tiles_k))
    return launches
