"""Where sequences and their prefixes lie in the packed tensors, and in which tiles the kernels visit them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# Rows (or keys) per entry of a tile schedule. Kernels whose block is smaller run TILE / BLOCK programs per entry.
TILE = 128

_MAX_INT32 = torch.iinfo(torch.int32).max

# Columns of the sequence table: one int32 row per sequence.
SEQUENCE_COLUMNS = 7
BATCH, Q_START, Q_LENGTH, K_START, K_LENGTH, PREFIX_START, PREFIX_LENGTH = range(SEQUENCE_COLUMNS)


class SharedPrefix(NamedTuple):
    """Keys and values outside the packed batch that sequences see before their own, unbiased and without gradient.

    Sequence ``i`` sees the keys ``start[i] .. start[i] + length[i] - 1``, directly before its own first key. Ranges of
    different sequences may coincide (one prompt, several rollouts) or nest (growing parts of one run).

    Attributes:
        k: keys, (P, Hkv, D), same dtype and device as the packed keys; must not require a gradient.
        v: values, (P, Hkv, D).
        start: first prefix key of each sequence, (n_seq,) integers; may be omitted where an
            :class:`AttentionPlan` already states the ranges.
        length: number of prefix keys of each sequence, (n_seq,) integers; 0 means none.
    """

    k: Tensor
    v: Tensor
    start: Tensor | Sequence[int] | None = None
    length: Tensor | Sequence[int] | None = None


class AttentionPlan:
    """The layout of a packed batch, built and validated once and used for every layer and step.

    Args:
        lengths_q: query rows of each sequence, ``n_seq`` integers >= 0 (a list or a CPU tensor).
        lengths_k: keys of each sequence; default: ``lengths_q``.
        prefix_start: first key of each sequence's range in a :class:`SharedPrefix`; default: no prefix.
        prefix_length: number of keys in that range; given together with ``prefix_start``.
        device: where the tensors that use the plan live.

    Attributes:
        sequences: (n_seq, 7) int32 table: batch row, q start, q length, k start, k length, prefix start, prefix length.
        tiles_q: (n, 2) int32 schedule of query tiles: sequence index (-1: idle), first row. Sequences with the most
            visible keys come first, and of a sequence the tiles with the most.
        tiles_k: (m, 2) int32 the same of key tiles, by visible rows: sequence index (-1: idle), first key.
        batch: batch rows of the tensors; 1 for a packed batch.
        total_q: rows of the tensors, per batch row.
        total_k: keys of the tensors, per batch row.
        prefix_end: one past the last prefix key in use; None where it is known on the device only.
        covers: whether every row and key of the tensors belongs to a sequence.

    Raises:
        ValueError: if the lists differ in length, a length or start is negative, they end beyond 32 bits, or only half
            a prefix is given.
    """

    sequences: Tensor
    tiles_q: Tensor
    tiles_k: Tensor
    batch: int
    total_q: int
    total_k: int
    prefix_end: int | None
    covers: bool

    # Tensors made in inference mode could not be saved for a later backward.
    @torch.inference_mode(False)
    def __init__(
        self,
        lengths_q: Sequence[int] | Tensor,
        lengths_k: Sequence[int] | Tensor | None = None,
        prefix_start: Sequence[int] | Tensor | None = None,
        prefix_length: Sequence[int] | Tensor | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        if (prefix_start is None) != (prefix_length is None):
            raise ValueError("prefix_start and prefix_length are given together, or neither")
        host_q = _host_lengths("lengths_q", lengths_q, None)
        n_seq = host_q.numel()
        host_k = host_q if lengths_k is None else _host_lengths("lengths_k", lengths_k, n_seq)
        zeros = torch.zeros_like(host_q)
        start = zeros if prefix_start is None else _host_lengths("prefix_start", prefix_start, n_seq)
        length = zeros if prefix_length is None else _host_lengths("prefix_length", prefix_length, n_seq)
        self.batch = 1
        self.total_q = int(host_q.sum())
        self.total_k = int(host_k.sum())
        self.prefix_end = int(torch.where(length > 0, start + length, 0).max()) if n_seq else 0
        self.covers = True
        for what, end in (("queries", self.total_q), ("keys", self.total_k), ("prefix ranges", self.prefix_end)):
            if end > _MAX_INT32:
                raise ValueError(f"positions are 32-bit numbers, but the {what} end at {end}")
        table = torch.stack(
            [zeros, host_q.cumsum(0) - host_q, host_q, host_k.cumsum(0) - host_k, host_k, start, length], dim=1
        )
        self._fill(
            table,
            n_tiles_q=int(tiles_of(host_q).sum()),
            n_tiles_k=int(tiles_of(host_k).sum()),
            device=torch.device(device),
        )

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        prefix_start: Tensor | None,
        prefix_length: Tensor | None,
        *,
        total_q: int,
        total_k: int,
        device: torch.device,
    ) -> AttentionPlan:
        """A plan computed with tensor operations only: no synchronisation, traceable by torch.compile, not validated.

        Args:
            cu_seqlens_q, cu_seqlens_k: (n_seq + 1,) integers, cumulative lengths starting at 0.
            prefix_start, prefix_length: (n_seq,) integers or None.
            total_q, total_k: rows of the packed tensors; they bound the number of tiles.
            device: where the plan is used.
        """
        cu_q = cu_seqlens_q.to(device, torch.int64)
        cu_k = cu_seqlens_k.to(device, torch.int64)
        lengths_q, lengths_k = cu_q.diff(), cu_k.diff()
        n_seq = lengths_q.shape[0]
        zeros = torch.zeros_like(lengths_q)
        start = zeros if prefix_start is None else prefix_start.to(device, torch.int64)
        length = zeros if prefix_length is None else prefix_length.to(device, torch.int64)
        plan = cls.__new__(cls)
        plan._fill(
            torch.stack([zeros, cu_q[:-1], lengths_q, cu_k[:-1], lengths_k, start, length], dim=1),
            n_tiles_q=total_q // TILE + n_seq,
            n_tiles_k=total_k // TILE + n_seq,
            device=device,
        )
        plan.batch, plan.total_q, plan.total_k = 1, total_q, total_k
        plan.prefix_end = 0 if prefix_length is None else None
        plan.covers = True
        return plan

    @classmethod
    def from_rows(
        cls,
        q_start: Tensor,
        q_length: Tensor,
        k_start: Tensor,
        k_length: Tensor,
        *,
        max_q: int,
        max_k: int,
        covers: bool,
    ) -> AttentionPlan:
        """A plan for padded batches and cache slots: one sequence per batch row, anywhere inside that row.

        Args:
            q_start, q_length, k_start, k_length: (B,) integers on the device of the tensors, positions inside each row.
            max_q, max_k: rows and keys of the (B, T, H, D) tensors.
            covers: False if some rows or keys belong to no sequence (their outputs and gradients are then zero).
        """
        batch = q_start.shape[0]
        zeros = torch.zeros_like(q_start)
        index = torch.arange(batch, device=q_start.device)
        plan = cls.__new__(cls)
        plan._fill(
            torch.stack([index, q_start, q_length, k_start, k_length, zeros, zeros], dim=1),
            n_tiles_q=batch * -(-max_q // TILE),
            n_tiles_k=batch * -(-max_k // TILE),
            device=q_start.device,
        )
        plan.batch, plan.total_q, plan.total_k = batch, max_q, max_k
        plan.prefix_end = 0
        plan.covers = covers
        return plan

    @property
    def n_seq(self) -> int:
        """Number of sequences."""
        return int(self.sequences.shape[0])

    @property
    def device(self) -> torch.device:
        """Where the tables lie."""
        return self.sequences.device

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> AttentionPlan:
        """The same plan on another device; this one if it already lies there."""
        if torch.device(device) == self.device:
            return self
        plan = copy.copy(self)
        for name in ("sequences", "tiles_q", "tiles_k"):
            setattr(plan, name, getattr(self, name).to(device, non_blocking=non_blocking))
        return plan

    def _fill(self, table: Tensor, *, n_tiles_q: int, n_tiles_k: int, device: torch.device) -> None:
        q_length, k_length, prefix = table[:, Q_LENGTH], table[:, K_LENGTH], table[:, PREFIX_LENGTH]
        # Under a causal mask, rows near the end see the most keys and keys near the start are seen by the most rows.
        keys_before_first_row = prefix + k_length - q_length
        tiles_q = _schedule(
            q_length, n_tiles_q, cost=prefix + k_length, work_at_start=keys_before_first_row, work_per_row=1
        )
        tiles_k = _schedule(k_length, n_tiles_k, cost=q_length, work_at_start=q_length, work_per_row=-1)
        self.sequences = table.to(torch.int32).to(device)
        self.tiles_q = tiles_q.to(device)
        self.tiles_k = tiles_k.to(device)


def dense_plan(batch: int, length_q: int, length_k: int, device: torch.device) -> AttentionPlan:
    """The plan of a (B, T, H, D) batch in which every row is one full sequence; kept for the next call where it can be.

    Tensors made while torch.compile traces, by fake-tensor modes or inside a CUDA graph capture are of use there only.
    """
    if torch.compiler.is_compiling():
        return _build_dense_plan(batch, length_q, length_k, device)
    ordinary = type(torch.empty(0, device=device)) is Tensor
    if not ordinary or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return _build_dense_plan(batch, length_q, length_k, device)
    return _kept_dense_plan(batch, length_q, length_k, device, _current_stream(device))


def _current_stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


# One per stream: on another one the tables may not be written yet, and their memory be reused too early.
@lru_cache(maxsize=64)
def _kept_dense_plan(batch: int, length_q: int, length_k: int, device: torch.device, stream: int) -> AttentionPlan:
    with torch.inference_mode(False):
        return _build_dense_plan(batch, length_q, length_k, device)


def _build_dense_plan(batch: int, length_q: int, length_k: int, device: torch.device) -> AttentionPlan:
    start = torch.zeros(batch, dtype=torch.int64, device=device)
    return AttentionPlan.from_rows(
        start,
        start + length_q,
        start,
        start + length_k,
        max_q=length_q,
        max_k=length_k,
        covers=True,
    )


def tiles_of(lengths: Tensor) -> Tensor:
    """Schedule entries that each length needs."""
    return (lengths + (TILE - 1)) // TILE


def _schedule(lengths: Tensor, n_tiles: int, *, cost: Tensor, work_at_start: Tensor, work_per_row: int) -> Tensor:
    """(n_tiles, 2) int32 (sequence, first row): costliest sequence first, and in it the costliest tile first.

    Tiles of one sequence stay together, so that those running at the same time share its keys in the cache. Entries
    beyond the needed ones are (-1, 0) and stand last.
    """
    n_seq = lengths.shape[0]
    if n_seq == 0:
        return lengths.new_empty((0, 2), dtype=torch.int32)
    counts = tiles_of(lengths)
    ends = counts.cumsum(0)
    tile = torch.arange(n_tiles, device=lengths.device)
    sequence = torch.searchsorted(ends, tile, right=True)
    idle = sequence >= n_seq
    sequence = sequence.clamp(max=n_seq - 1)
    first = (tile - (ends - counts)[sequence]) * TILE
    rank = torch.argsort(torch.argsort(cost, descending=True, stable=True))
    # Lexicographic: the second stable sort keeps the order of the first among tiles of one sequence.
    by_work = torch.argsort(work_at_start[sequence] + work_per_row * first, descending=True, stable=True)
    by_rank = torch.argsort(torch.where(idle, n_seq, rank[sequence])[by_work], stable=True)
    table = torch.stack([torch.where(idle, -1, sequence), torch.where(idle, 0, first)], dim=1)
    return table[by_work[by_rank]].to(torch.int32)


def _host_lengths(name: str, values: Sequence[int] | Tensor, expected: int | None) -> Tensor:
    tensor = torch.as_tensor(values, device="cpu")
    if tensor.dim() != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {tuple(tensor.shape)}")
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise ValueError(f"{name} must be integers, got {tensor.dtype}")
    if expected is not None and tensor.numel() != expected:
        raise ValueError(f"{name} has {tensor.numel()} entries for {expected} sequences")
    if tensor.numel() and int(tensor.min()) < 0:
        where = int(tensor.argmin())
        raise ValueError(f"{name} must not be negative, got {int(tensor[where])} for sequence {where}")
    return tensor.to(torch.int64)
