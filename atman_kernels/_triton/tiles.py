"""What all kernels share: block sizes, where a program stands, which tiles it visits and the tile of scores."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from atman_kernels import plan

# Values of plan.py as Triton constants.
TILE = tl.constexpr(plan.TILE)
BATCH = tl.constexpr(plan.BATCH)
Q_START = tl.constexpr(plan.Q_START)
Q_LENGTH = tl.constexpr(plan.Q_LENGTH)
K_START = tl.constexpr(plan.K_START)
K_LENGTH = tl.constexpr(plan.K_LENGTH)
PREFIX_START = tl.constexpr(plan.PREFIX_START)
PREFIX_LENGTH = tl.constexpr(plan.PREFIX_LENGTH)
SEQUENCE_COLUMNS = tl.constexpr(7)

# fp32 numbers per 16 bytes, where vectors and descriptors may begin.
ROW_ALIGNMENT = tl.constexpr(4)

# {device family: {kernel: {bytes per element: {padded head_dim: [BLOCK_M, BLOCK_N, num_warps, num_stages]}}}}, chosen
# from the registers, spills and shared memory of ahead-of-time compilation, or by benchmarks/tune.py on a GPU. "sm_86"
# stands for devices with 99 KiB of shared memory per block. The interpreter's cost is per tile; its unequal shapes
# below TILE exercise every branch of the schedules.
BLOCK_SIZES_FILE = Path(__file__).with_name("block_sizes.json")

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class BlockSizes(NamedTuple):
    """Tile shape and launch options of one kernel: BLOCK_M query rows, BLOCK_N keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def padded_head_dim(head_dim: int) -> int:
    """The power of two, at least 16, in which the matrix units hold a row of ``head_dim`` numbers."""
    return max(16, triton.next_power_of_2(head_dim))


def block_sizes(family: str, kernel: str, head_dim: int, dtype: torch.dtype) -> BlockSizes:
    """The committed tile shape for a device family ("sm_90", ...), kernel, head_dim and dtype."""
    return BlockSizes(*block_size_table()[family][kernel][str(dtype.itemsize)][str(padded_head_dim(head_dim))])


@lru_cache(maxsize=1)
def block_size_table() -> dict[str, dict[str, dict[str, dict[str, list[int]]]]]:
    """The committed table, read once; the tuner tries other shapes by writing into it."""
    return json.loads(BLOCK_SIZES_FILE.read_text())


@triton.jit
def locate_tile(tiles_ptr, sequences_ptr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's (head, sequence, first row or key); sequence -1 marks an idle entry of the schedule.

    Heads vary fastest, so that neighbouring programs share keys and values, and work decreases with the program index.
    """
    PER_ENTRY: tl.constexpr = TILE // BLOCK
    program = tl.program_id(0)
    head = program % HEADS
    entry = program // HEADS // PER_ENTRY
    part = program // HEADS % PER_ENTRY
    sequence = tl.load(tiles_ptr + 2 * entry)
    first = tl.load(tiles_ptr + 2 * entry + 1) + part * BLOCK
    return head, sequence, first


@triton.jit
def tile_bounds(any_begin, all_begin, all_end, any_end, length, BLOCK: tl.constexpr):
    """Split 0 .. length - 1 into tiles that need a mask and tiles that need none.

    Args:
        any_begin, any_end: range of positions visible to at least one row (or key) of this program.
        all_begin, all_end: range of positions visible to all of them.

    Returns:
        (begin, full_begin, full_end, end), multiples of BLOCK but for ``end``: tiles in [full_begin, full_end) need
        no mask, those in [begin, full_begin) and [full_end, end) do, no other is visited.
    """
    end = tl.minimum(tl.maximum(any_end, 0), length)
    end_up = tl.cdiv(end, BLOCK) * BLOCK
    begin = tl.minimum(tl.maximum(any_begin, 0) // BLOCK * BLOCK, end_up)
    full_begin = tl.minimum(tl.cdiv(tl.maximum(all_begin, 0), BLOCK) * BLOCK, end_up)
    full_end = tl.minimum(tl.maximum(all_end, 0), length) // BLOCK * BLOCK
    full_end = tl.maximum(full_end, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def count_tiles(begin, full_begin, full_end, end, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """How many tiles of :func:`tile_bounds` need a mask (MASKED) or none."""
    if MASKED:
        return (full_begin - begin) // BLOCK + tl.cdiv(tl.maximum(end - full_end, 0), BLOCK)
    return (full_end - full_begin) // BLOCK


@triton.jit
def tile_start(tile, begin, full_begin, full_end, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """First position of the ``tile``-th tile counted by :func:`count_tiles`."""
    if MASKED:
        n_left = (full_begin - begin) // BLOCK
        return tl.multiple_of(tl.where(tile < n_left, begin + tile * BLOCK, full_end + (tile - n_left) * BLOCK), BLOCK)
    return tl.multiple_of(full_begin + tile * BLOCK, BLOCK)


@triton.jit
def load_rows(
    base_ptr,
    start,
    length,
    stride_t,
    CHECK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(BLOCK, BLOCK_D) tile from row ``start``; rows past ``length`` and columns past HEAD_DIM are zero."""
    offs = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = base_ptr + tl.cast(start, tl.int64) * stride_t + offs[:, None] * stride_t + offs_d[None, :]
    if CHECK_ROWS and BLOCK_D != HEAD_DIM:
        return tl.load(ptrs, mask=((start + offs) < length)[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
    if CHECK_ROWS:
        return tl.load(ptrs, mask=((start + offs) < length)[:, None], other=0.0)
    if BLOCK_D != HEAD_DIM:
        return tl.load(ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def load_keys(
    keys_desc,
    keys_base,
    batch,
    k_start,
    head_kv,
    start,
    n_keys,
    stride_t,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(BLOCK_N, BLOCK_D) keys or values from key ``start`` of a sequence.

    A tile that needs no mask goes through the descriptor where there is one. Tiles that do need one may reach into the
    next sequence, whose numbers a descriptor would bring in: 0 times NaN is NaN.
    """
    if keys_desc is not None and not MASKED:
        tile = keys_desc.load([batch.to(tl.int32), (k_start + start).to(tl.int32), head_kv.to(tl.int32), 0])
        return tile.reshape(BLOCK_N, BLOCK_D)
    return load_rows(keys_base, start, n_keys, stride_t, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D)


@triton.jit
def store_rows(
    base_ptr,
    x,
    start,
    length,
    stride_t,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write a (BLOCK, BLOCK_D) tile in the dtype of the pointer, leaving out rows past ``length``."""
    offs = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = base_ptr + tl.cast(start, tl.int64) * stride_t + offs[:, None] * stride_t + offs_d[None, :]
    inside = ((start + offs) < length)[:, None]
    if BLOCK_D != HEAD_DIM:
        inside = inside & (offs_d < HEAD_DIM)[None, :]
    tl.store(ptrs, x.to(base_ptr.dtype.element_ty), mask=inside)


@triton.jit
def attention_scores(
    q,
    k,
    bias_desc,
    bias_base,
    bias_start,
    start,
    n_keys,
    stride_bt,
    sm_scale,
    HAS_KEY_BIAS: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) scores: sm_scale q k^T + key_bias if SCALE_FIRST, else that divided by sm_scale.

    The second form starts the product at the aligned copy of the bias (``operands.align_key_bias``). What it holds past
    the end of a sequence is anything; masked tiles drop it.
    """
    if HAS_KEY_BIAS and not SCALE_FIRST:
        bias = bias_desc.load([bias_start + start])
        scores = tl.broadcast_to(bias[None, :], (BLOCK_M, BLOCK_N))
        return tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if SCALE_FIRST:
        scores *= sm_scale
    if HAS_KEY_BIAS:
        keys = start + tl.arange(0, BLOCK_N)
        bias_ptrs = bias_base + keys * stride_bt
        bias = tl.load(bias_ptrs, mask=keys < n_keys, other=0.0) if MASKED else tl.load(bias_ptrs)
        scores += bias[None, :]
    return scores


@triton.jit
def is_visible(row_position, key, n_keys, window, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Broadcast test whether a row sees a key, both counted from the first key of the segment."""
    seen = key < n_keys
    if IS_CAUSAL:
        seen = seen & (key <= row_position)
    if HAS_WINDOW:
        seen = seen & (row_position - key < window)
    return seen


@triton.jit
def key_bounds(
    first_position,
    last_position,
    n_keys,
    window,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """:func:`tile_bounds` over the keys that rows at these positions (counted from the first key) see."""
    if HAS_WINDOW:
        return tile_bounds(
            first_position - window + 1,
            last_position - window + 1,
            first_position + 1,
            last_position + 1,
            n_keys,
            BLOCK_N,
        )
    if IS_CAUSAL:
        return tile_bounds(0, 0, first_position + 1, last_position + 1, n_keys, BLOCK_N)
    return tile_bounds(0, 0, n_keys, n_keys, n_keys, BLOCK_N)


@triton.jit
def query_bounds(
    first_key,
    last_key,
    shift,
    n_rows,
    window,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """:func:`tile_bounds` over the rows that see these keys; row i stands at position i + shift."""
    if HAS_WINDOW:
        return tile_bounds(
            first_key - shift,
            last_key - shift,
            first_key - shift + window,
            last_key - shift + window,
            n_rows,
            BLOCK_M,
        )
    if IS_CAUSAL:
        return tile_bounds(first_key - shift, last_key - shift, n_rows, n_rows, n_rows, BLOCK_M)
    return tile_bounds(0, 0, n_rows, n_rows, n_rows, BLOCK_M)


@triton.jit
def aligned_rows(batch, head, start, sequence, stride_b, stride_h):
    """Where a sequence's rows (or keys) start in a scratch of numbers per row: at a multiple of ROW_ALIGNMENT."""
    return (batch * stride_b + head * stride_h + start // ROW_ALIGNMENT + sequence) * ROW_ALIGNMENT


def aligned_size(n_rows: int, n_seq: int) -> int:
    """Numbers per head of a scratch in which every sequence starts at a multiple of ROW_ALIGNMENT."""
    return (-(-n_rows // ROW_ALIGNMENT.value) + n_seq) * ROW_ALIGNMENT.value
