"""Backward, deterministic and without atomics: query-owned, then key-owned programs, then a sum over heads.

With s the scores, p = exp(s - lse), dp = do v^T and r = delta - dlse::

    ds = p (dp - r);  dq = sm_scale ds k;  dk = sm_scale ds^T q;  dv = p^T do;  dkey_bias = sum over heads, rows of ds

The query kernel starts from delta = sum_d do o, whose rounding of o a long sum of ds would expose in ``dkey_bias``. It
therefore also sums its ds over each row: that sum is the error of delta, and the key kernel gets the corrected value.
"""

from __future__ import annotations

from torch import Tensor

from atman_kernels._triton.backward_keys import backward_keys_kernel, sum_heads_kernel
from atman_kernels._triton.backward_queries import backward_queries_kernel
from atman_kernels._triton.forward import attention_operands
from atman_kernels._triton.launch import Launch, strides_of
from atman_kernels._triton.tiles import (
    ROW_ALIGNMENT,
    block_sizes,
)
from atman_kernels.plan import TILE


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
