"""The arguments that several kernels share: tensors, strides, flags, and how keys and bias reach a row-owned kernel.

A row-owned kernel streams keys, values and bias. Where the device has a bulk copy engine they come through tensor
descriptors, fewer instructions than pointers, and the bias is where the accumulator of q k^T starts: q k^T + key_bias /
sm_scale costs one copy into the accumulator where a bias added afterwards costs a multiply-add per score.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from atman_kernels._triton.launch import Launch, dot_precision, strides_of
from atman_kernels._triton.tiles import (
    BATCH,
    K_LENGTH,
    K_START,
    ROW_ALIGNMENT,
    SEQUENCE_COLUMNS,
    aligned_rows,
    aligned_size,
    locate_tile,
    padded_head_dim,
)
from atman_kernels.plan import TILE

# Families with a bulk copy engine; the interpreter takes the same path as they do.
BULK_COPY_FAMILIES = ("sm_90", "sm_100", "interpreter")
_ALIGNMENT_BYTES = 16


def tile_descriptor(family: str, x: Tensor, block: list[int]) -> TensorDescriptor | None:
    """A descriptor of (B, T, H, D) rows in tiles of ``block``; None where the device or the layout has none.

    A layout has one if, as cuTensorMapEncodeTiled documents, it begins at a multiple of 16 bytes, its strides are such
    multiples and each is a multiple of, and at least the extent of, the axis inside it. (B, H, T, D) in memory is not.
    """
    if family not in BULK_COPY_FAMILIES or not x.numel() or x.data_ptr() % _ALIGNMENT_BYTES:
        return None
    strides = [1]
    extent = x.shape[-1]
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        # The stride of an axis of length 1 is never used, and torch leaves anything there.
        used = stride if size > 1 else extent
        if used < extent or used % strides[0] or used * x.element_size() % _ALIGNMENT_BYTES:
            return None
        strides.insert(0, used)
        extent = used * size
    return TensorDescriptor(x, list(x.shape), strides, block)


def attention_operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    sequences: Tensor,
    sm_scale: float,
    causal: bool,
    window: int | None,
) -> dict[str, object]:
    """The arguments that forward and backward kernels share; absent operands are stood in for by tensors never read."""
    head_dim = q.shape[3]
    return {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "key_bias_ptr": q if key_bias is None else key_bias,
        "prefix_k_ptr": k if prefix_k is None else prefix_k,
        "prefix_v_ptr": v if prefix_v is None else prefix_v,
        "sequences_ptr": sequences,
        **strides_of("q", q, "bth"),
        **strides_of("k", k, "bth"),
        **strides_of("v", v, "bth"),
        **strides_of("b", key_bias, "bt"),
        **strides_of("pk", prefix_k, "th"),
        **strides_of("pv", prefix_v, "th"),
        "sm_scale": sm_scale,
        "window": 0 if window is None else window,
        "HEADS_Q": q.shape[2],
        "GROUP": q.shape[2] // k.shape[2],
        "HEAD_DIM": head_dim,
        "HAS_KEY_BIAS": key_bias is not None,
        "HAS_PREFIX": prefix_k is not None,
        "IS_CAUSAL": causal,
        "HAS_WINDOW": causal and window is not None,
        "BLOCK_D": padded_head_dim(head_dim),
        "PRECISION": dot_precision(q.dtype),
    }


@triton.jit(do_not_specialize=["stride_ab", "stride_bb"])
def align_key_bias_kernel(
    aligned_ptr,
    key_bias_ptr,
    sequences_ptr,
    tiles_ptr,
    stride_ab,
    stride_bb,
    stride_bt,
    sm_scale,
    BLOCK_N: tl.constexpr,
):
    """key_bias / sm_scale of a tile of keys, in the aligned layout."""
    _, sequence, first = locate_tile(tiles_ptr, sequences_ptr, 1, BLOCK_N)
    if sequence < 0:
        return
    row_ptr = sequences_ptr + sequence * SEQUENCE_COLUMNS
    batch = tl.load(row_ptr + BATCH).to(tl.int64)
    k_start = tl.load(row_ptr + K_START).to(tl.int64)
    keys = first + tl.arange(0, BLOCK_N)
    inside = keys < tl.load(row_ptr + K_LENGTH)
    bias = tl.load(key_bias_ptr + batch * stride_bb + (k_start + keys) * stride_bt, mask=inside)
    tl.store(aligned_ptr + aligned_rows(batch, 0, k_start, sequence, stride_ab, 0) + keys, bias / sm_scale, mask=inside)


def align_key_bias(key_bias: Tensor, sequences: Tensor, tiles_k: Tensor, sm_scale: float) -> tuple[Tensor, Launch]:
    """fp32 (B, T') scratch for key_bias (B, Tk) / sm_scale at aligned starts, and the launch that fills it."""
    batch, n_keys = key_bias.shape
    aligned = key_bias.new_empty((batch, aligned_size(n_keys, sequences.shape[0])))
    arguments = {
        "aligned_ptr": aligned,
        "key_bias_ptr": key_bias,
        "sequences_ptr": sequences,
        "tiles_ptr": tiles_k,
        "stride_ab": aligned.stride(0) // ROW_ALIGNMENT.value,
        **strides_of("b", key_bias, "bt"),
        "sm_scale": sm_scale,
        "BLOCK_N": TILE,
    }
    return aligned, Launch(align_key_bias_kernel, tiles_k.shape[0], arguments, 4, 1)


def streamed_operands(
    family: str,
    block_n: int,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    sequences: Tensor,
    tiles_k: Tensor,
    sm_scale: float,
) -> tuple[dict[str, object], list[Launch]]:
    """How a row-owned kernel gets keys, values and bias, and the launches that must come before it."""
    block = [1, block_n, 1, padded_head_dim(k.shape[3])]
    sources = {
        "k_desc": k,
        "v_desc": v,
        "prefix_k_desc": None if prefix_k is None else prefix_k[None],
        "prefix_v_desc": None if prefix_v is None else prefix_v[None],
    }
    operands: dict[str, object] = {
        name: None if x is None else tile_descriptor(family, x, block) for name, x in sources.items()
    }
    operands |= {"bias_desc": None, "stride_ab": 0}
    # Far from 1, products or quotients by the scale leave the range of fp32.
    moderate = 1e-6 < sm_scale < 1e6
    if key_bias is None or not key_bias.numel():
        return operands | {"SCALE_FIRST": not moderate}, []
    # In fp32 a product that starts at the bias would be rounded at the bias' magnitude head_dim times, not once.
    if family not in BULK_COPY_FAMILIES or k.dtype == torch.float32 or not moderate:
        return operands | {"SCALE_FIRST": True}, []
    aligned, launch = align_key_bias(key_bias, sequences, tiles_k, sm_scale)
    operands["bias_desc"] = TensorDescriptor(aligned, [aligned.numel()], [1], [block_n])
    operands["stride_ab"] = aligned.stride(0) // ROW_ALIGNMENT.value
    return operands | {"SCALE_FIRST": False}, [launch]
