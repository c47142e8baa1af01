"""What all kernels share on the device: where a program stands, which tiles it visits, and the tile of scores."""

from __future__ import annotations

from typing import Any, NamedTuple

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
SEQUENCE_COLUMNS = tl.constexpr(plan.SEQUENCE_COLUMNS)

# fp32 numbers per 16 bytes, where vectors may begin.
ROW_ALIGNMENT = tl.constexpr(4)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Rows(NamedTuple):
    """A tensor (B, T, H, D), or (T, H, D) with batch stride 0: where it begins and its strides; that of D is 1."""

    ptr: Any
    batch: Any
    time: Any
    head: Any


class Flags(NamedTuple):
    """What a kernel is compiled for; each member is a ``tl.constexpr``.

    Attributes:
        HEADS_Q, GROUP: query heads, and how many of them share a kv head.
        HEAD_DIM, BLOCK_D: numbers of a row, and its padded length.
        BLOCK_M, BLOCK_N: query rows and keys of a tile.
        PRECISION: of the products.
        SCALE_FIRST, BIAS_ROWS, SUM_COLUMNS: see :func:`attention_scores`, :func:`load_bias` and :func:`partial_sums`.
    """

    HEADS_Q: Any
    GROUP: Any
    HEAD_DIM: Any
    HAS_KEY_BIAS: Any
    HAS_PREFIX: Any
    IS_CAUSAL: Any
    HAS_WINDOW: Any
    BLOCK_M: Any
    BLOCK_N: Any
    BLOCK_D: Any
    PRECISION: Any
    SCALE_FIRST: Any
    BIAS_ROWS: Any
    SUM_COLUMNS: Any


class Keys(NamedTuple):
    """A run of keys that the rows of a program see: the sequence's own, or its range of the shared prefix.

    Attributes:
        k_ptr, v_ptr, bias_ptr: the run's first key and value of this head, and its first bias (the prefix has none).
        batch, start, head: where the run begins in the tensors of all keys and values.
        length: keys of the run.
        shift: position of the sequence's first row, counted from the run's first key.
        stride_kt, stride_vt: from one key to the next.
    """

    k_ptr: Any
    v_ptr: Any
    bias_ptr: Any
    batch: Any
    start: Any
    head: Any
    length: Any
    shift: Any
    stride_kt: Any
    stride_vt: Any


@triton.jit
def locate_tile(tiles_ptr, sequences_ptr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's (head, sequence, first row or key) and (batch, q_start, n_rows, k_start, n_keys) of the sequence.

    Idle entries of the schedule have no rows and no keys. Heads vary fastest, so that neighbouring programs share keys
    and values, and work decreases with the program index.
    """
    PER_ENTRY: tl.constexpr = TILE // BLOCK
    program = tl.program_id(0)
    head = (program % HEADS).to(tl.int64)
    entry = program // HEADS // PER_ENTRY
    part = program // HEADS % PER_ENTRY
    sequence = tl.load(tiles_ptr + 2 * entry)
    first = tl.load(tiles_ptr + 2 * entry + 1) + part * BLOCK
    idle = sequence < 0
    sequence = tl.maximum(sequence, 0)
    row_ptr = sequences_ptr + sequence * SEQUENCE_COLUMNS
    batch = tl.load(row_ptr + BATCH).to(tl.int64)
    q_start = tl.load(row_ptr + Q_START).to(tl.int64)
    k_start = tl.load(row_ptr + K_START).to(tl.int64)
    n_rows = tl.where(idle, 0, tl.load(row_ptr + Q_LENGTH))
    n_keys = tl.where(idle, 0, tl.load(row_ptr + K_LENGTH))
    return head, sequence, first, batch, q_start, n_rows, k_start, n_keys


@triton.jit
def locate_prefix(sequences_ptr, sequence):
    """(first key, number of keys) of a sequence's range of the shared prefix."""
    row_ptr = sequences_ptr + sequence * SEQUENCE_COLUMNS
    return tl.load(row_ptr + PREFIX_START).to(tl.int64), tl.load(row_ptr + PREFIX_LENGTH)


@triton.jit
def rows_from(x, batch, start, head):
    """Where row ``start`` of a batch row and head begins in :class:`Rows`."""
    return x.ptr + batch * x.batch + start * x.time + head * x.head


@triton.jit
def locate_keys(
    OWN: tl.constexpr,
    k,
    v,
    key_bias_ptr,
    prefix_k,
    prefix_v,
    sequences_ptr,
    sequence,
    batch,
    k_start,
    n_keys,
    n_rows,
    head,
    bias_batch,
):
    """The :class:`Keys` of a sequence and kv head: its own (OWN), or its range of the shared prefix before them."""
    if OWN:
        return Keys(
            rows_from(k, batch, k_start, head),
            rows_from(v, batch, k_start, head),
            key_bias_ptr + batch * bias_batch + k_start,
            batch, k_start, head, n_keys, n_keys - n_rows, k.time, v.time,
        )  # fmt: skip
    prefix_start, n_prefix = locate_prefix(sequences_ptr, sequence)
    return Keys(
        prefix_k.ptr + prefix_start * prefix_k.time + head * prefix_k.head,
        prefix_v.ptr + prefix_start * prefix_v.time + head * prefix_v.head,
        key_bias_ptr,
        tl.cast(0, tl.int64), prefix_start, head, n_prefix, n_prefix + n_keys - n_rows, prefix_k.time, prefix_v.time,
    )  # fmt: skip


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
def is_visible(row_position, key, n_keys, window, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Broadcast test whether a row sees a key, both counted from the first key of the run."""
    seen = key < n_keys
    if IS_CAUSAL:
        seen = seen & (key <= row_position)
    if HAS_WINDOW:
        seen = seen & (row_position - key < window)
    return seen


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
def load_keys(
    desc,
    base_ptr,
    stride_t,
    keys,
    start,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(BLOCK_N, BLOCK_D) keys or values from key ``start`` of a run.

    A tile that needs no mask goes through the descriptor where there is one. Tiles that do need one may reach into the
    next sequence, whose numbers a descriptor would bring in: 0 times NaN is NaN.
    """
    if desc is not None and not MASKED:
        batch, head, key = keys.batch.to(tl.int32), keys.head.to(tl.int32), (keys.start + start).to(tl.int32)
        # Rows are the second axis, or heads where these lie outside rows in memory.
        at = [batch, key, head, 0] if desc.block_shape[1] == BLOCK_N else [batch, head, key, 0]
        return desc.load(at).reshape(BLOCK_N, BLOCK_D)
    return load_rows(base_ptr, start, keys.length, stride_t, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D)


@triton.jit
def load_bias(keys, start, MASKED: tl.constexpr, BIAS_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N) bias of the keys from ``start``, the same in all rows.

    Triton lets each thread load a vector of fewer numbers than there are threads for its own columns of the scores.
    BIAS_ROWS equal rows are as many numbers as threads: one asynchronous copy per thread into shared memory.
    """
    offs = start + tl.arange(0, BLOCK_N)[None, :] + tl.zeros([BIAS_ROWS, 1], tl.int32)
    ptrs = keys.bias_ptr + offs
    bias = tl.load(ptrs, mask=offs < keys.length, other=0.0) if MASKED else tl.load(ptrs)
    return tl.reshape(tl.broadcast_to(bias[None], (BLOCK_M // BIAS_ROWS, BIAS_ROWS, BLOCK_N)), (BLOCK_M, BLOCK_N))


@triton.jit
def attention_scores(
    q,
    k,
    keys,
    start,
    row_position,
    sm_scale,
    window,
    HAS_KEY_BIAS: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) scores, -inf where a row does not see a key, and what turns them into log2 units.

    That is sm_scale q k^T + key_bias with a bias, one multiply-add per score, and q k^T without one. Unscaled scores
    have their maximum elsewhere if the scale is negative, and may leave fp32 if it is far from 1: SCALE_FIRST.
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    to_log2 = sm_scale * LOG2_E
    if HAS_KEY_BIAS or SCALE_FIRST:
        scores *= sm_scale
        to_log2 = tl.cast(LOG2_E, tl.float32)
    if HAS_KEY_BIAS:
        scores += load_bias(keys, start, MASKED, BIAS_ROWS, BLOCK_M, BLOCK_N)
    if MASKED:
        key = (start + tl.arange(0, BLOCK_N))[None, :]
        seen = is_visible(row_position[:, None], key, keys.length, window, IS_CAUSAL, HAS_WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    return scores, to_log2


@triton.jit
def load_own_bias(
    key_bias_ptr, batch, k_start, first, n_keys, stride_bb, HAS_KEY_BIAS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(BLOCK_N) bias in log2 units of a key-owned program's keys; zeros without one."""
    keys = first + tl.arange(0, BLOCK_N)
    bias_log2 = tl.zeros([BLOCK_N], tl.float32)
    if HAS_KEY_BIAS:
        bias_ptrs = key_bias_ptr + batch * stride_bb + k_start + keys
        bias_log2 = tl.load(bias_ptrs, mask=keys < n_keys, other=0.0) * LOG2_E
    return bias_log2


@triton.jit
def load_row_numbers(
    ptr,
    offsets,
    inside,
    outside,
    MASKED: tl.constexpr,
    ROW_COPIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One number per row for a key-owned program's scores: (BLOCK_N, BLOCK_M), or (1, BLOCK_M) without copies.

    ROW_COPIES equal rows are as many numbers as threads: one asynchronous copy per thread, as in :func:`load_bias`.
    """
    offs = offsets[None, :] + tl.zeros([ROW_COPIES, 1], tl.int32)
    x = tl.load(ptr + offs, mask=inside[None, :], other=outside) if MASKED else tl.load(ptr + offs)
    if ROW_COPIES > 1:
        x = tl.reshape(tl.broadcast_to(x[None], (BLOCK_N // ROW_COPIES, ROW_COPIES, BLOCK_M)), (BLOCK_N, BLOCK_M))
    return x


@triton.jit
def transposed_weights(k, q, bias_log2, lse_log2, sm_scale, HAS_KEY_BIAS: tl.constexpr, PRECISION: tl.constexpr):
    """p^T = exp(sm_scale k q^T + key_bias - lse), (BLOCK_N, BLOCK_M), of a key-owned program; lse_log2 broadcasts."""
    scores_log2 = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (sm_scale * LOG2_E)
    if HAS_KEY_BIAS:
        scores_log2 += bias_log2[:, None]
    return tl.exp2(scores_log2 - lse_log2)


@triton.jit
def partial_sums(x, COLUMNS: tl.constexpr):
    """(M, COLUMNS) from (M, N): sums over every COLUMNS-th number, which may stay inside a thread."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // COLUMNS, COLUMNS)), 1)


@triton.jit
def aligned_rows(batch, head, start, sequence, stride_b, stride_h):
    """Where a sequence's rows start in a scratch of numbers per row: at a multiple of ROW_ALIGNMENT."""
    return (batch * stride_b + head * stride_h + start // ROW_ALIGNMENT + sequence) * ROW_ALIGNMENT


def aligned_size(n_rows: int, n_seq: int) -> int:
    """Numbers per head of a scratch in which every sequence starts at a multiple of ROW_ALIGNMENT."""
    return (-(-n_rows // ROW_ALIGNMENT.value) + n_seq) * ROW_ALIGNMENT.value
