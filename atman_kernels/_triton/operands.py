"""The arguments that several kernels share: tensors, strides, flags, and how keys and bias reach a row-owned kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from atman_kernels._triton.blocks import BlockSizes, padded_head_dim
from atman_kernels._triton.launch import dot_precision, strides_of
from atman_kernels.problem import AttentionProblem

# Families with a bulk copy engine; the interpreter takes the same path as they do.
BULK_COPY_FAMILIES = ("sm_90", "sm_100", "interpreter")
_ALIGNMENT_BYTES = 16


def tile_descriptor(family: str, x: Tensor, block: list[int]) -> TensorDescriptor | None:
    """A descriptor of (B, T, H, D) rows, or (T, H, D), in tiles of ``block``; None where the device or layout has none.

    A layout has one if, as cuTensorMapEncodeTiled documents, it begins at a multiple of 16 bytes, its strides are such
    multiples and each is a multiple of, and at least the extent of, the axis inside it. Where (B, T, H, D) is not such
    a layout and (B, H, T, D) is, as Hugging Face holds keys, the descriptor has its axes in that order.
    """
    if family not in BULK_COPY_FAMILIES or not x.numel() or x.data_ptr() % _ALIGNMENT_BYTES:
        return None
    sizes, steps = [1, *x.shape][-4:], [0, *x.stride()][-4:]
    for order in ((0, 1, 2, 3), (0, 2, 1, 3)):
        shape = [sizes[axis] for axis in order]
        strides = _growing_strides(shape, [steps[axis] for axis in order], x.element_size())
        if strides is not None:
            return TensorDescriptor(x, shape, strides, [block[axis] for axis in order])
    return None


def _growing_strides(shape: list[int], strides: list[int], element_size: int) -> list[int] | None:
    """The strides as a descriptor states them; None where the bulk copy engine does not take them."""
    found = [1]
    extent = shape[-1]
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        # The stride of an axis of length 1 is never used, and torch leaves anything there.
        used = stride if size > 1 else extent
        if used < extent or used % found[0] or used * element_size % _ALIGNMENT_BYTES:
            return None
        found.insert(0, used)
        extent = used * size
    return found


def attention_operands(x: AttentionProblem) -> dict[str, object]:
    """The arguments that forward and backward kernels share; absent operands are stood in for by tensors never read."""
    q, k, v, head_dim = x.q, x.k, x.v, x.q.shape[3]
    return {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "key_bias_ptr": q if x.key_bias is None else x.key_bias,
        "prefix_k_ptr": k if x.prefix_k is None else x.prefix_k,
        "prefix_v_ptr": v if x.prefix_v is None else x.prefix_v,
        "sequences_ptr": x.sequences,
        **strides_of("q", q, "bth"),
        **strides_of("k", k, "bth"),
        **strides_of("v", v, "bth"),
        **strides_of("b", x.key_bias, "b"),
        **strides_of("pk", x.prefix_k, "th"),
        **strides_of("pv", x.prefix_v, "th"),
        "sm_scale": x.sm_scale,
        "window": 0 if x.window is None else x.window,
        "HEADS_Q": q.shape[2],
        "GROUP": q.shape[2] // k.shape[2],
        "HEAD_DIM": head_dim,
        "HAS_KEY_BIAS": x.key_bias is not None,
        "HAS_PREFIX": x.prefix_k is not None,
        "IS_CAUSAL": x.causal,
        "HAS_WINDOW": x.causal and x.window is not None,
        "BLOCK_D": padded_head_dim(head_dim),
        "PRECISION": dot_precision(q.dtype),
    }


def streamed_operands(family: str, blocks: BlockSizes, x: AttentionProblem) -> dict[str, object]:
    """How a row-owned kernel gets keys, values and bias, and how it scales scores and sums along its rows."""
    block = [1, blocks.block_n, 1, padded_head_dim(x.k.shape[3])]
    sources = {
        "k_desc": x.k,
        "v_desc": x.v,
        "prefix_k_desc": x.prefix_k,
        "prefix_v_desc": x.prefix_v,
    }
    return {
        **{name: None if t is None else tile_descriptor(family, t, block) for name, t in sources.items()},
        "SCALE_FIRST": not 1e-6 < x.sm_scale < 1e6,
        **vector_shapes(family, blocks, x.q.dtype),
    }


def vector_shapes(family: str, blocks: BlockSizes, dtype: torch.dtype) -> dict[str, int]:
    """BIAS_ROWS and SUM_COLUMNS of a row-owned kernel; see ``tiles.load_bias`` and ``tiles.partial_sums``."""
    # There a thread holds 2 of every 8 neighbouring columns of a row, in all of the row if no two warps share it.
    within_threads = family in ("sm_90", "interpreter") or (
        family in ("sm_80", "sm_86") and blocks.block_m >= 16 * blocks.num_warps
    )
    # Without a pipeline there are no asynchronous copies either.
    copied = family == "interpreter" or (family != "gfx942" and blocks.num_stages > 1)
    return {
        "BIAS_ROWS": max(1, 32 * blocks.num_warps // blocks.block_n) if copied else 1,
        "SUM_COLUMNS": 8 if within_threads and dtype != torch.float32 else 1,
    }


def row_copies(family: str, blocks: BlockSizes) -> int:
    """ROW_COPIES of the key-owned kernel; see ``tiles.load_row_numbers``."""
    copied = family == "interpreter" or (family != "gfx942" and blocks.num_stages > 1)
    return min(max(1, 32 * blocks.num_warps // blocks.block_m), blocks.block_n) if copied else 1
