"""The order in which kernels visit tiles: each once, costly work first, the tiles of a sequence side by side."""

from __future__ import annotations

import itertools

import pytest
import torch

from atman_kernels import AttentionPlan
from atman_kernels.plan import TILE

LENGTHS = [TILE + 2, 0, 3 * TILE, 17, 3 * TILE, TILE]


def _on_device(lengths: list[int]) -> AttentionPlan:
    """The same plan from tensor operations alone, which only bound the number of tiles."""
    cu = torch.tensor([0, *itertools.accumulate(lengths)])
    total = sum(lengths)
    return AttentionPlan.from_cu_seqlens(cu, cu, None, None, total_q=total, total_k=total, device=torch.device("cpu"))


@pytest.mark.parametrize("build", [AttentionPlan, _on_device])
@pytest.mark.parametrize("table", ["tiles_q", "tiles_k"])
def test_every_tile_is_scheduled_once_and_idle_entries_stand_last(build: type, table: str) -> None:
    tiles = [tuple(tile) for tile in getattr(build(LENGTHS), table).tolist()]
    needed = {(i, first) for i, length in enumerate(LENGTHS) for first in range(0, length, TILE)}
    assert set(tiles[: len(needed)]) == needed
    assert all(sequence == -1 for sequence, _ in tiles[len(needed) :])


def test_costlier_sequences_and_within_them_costlier_tiles_come_first() -> None:
    plan = AttentionPlan(LENGTHS)
    # Rows near the end see the most keys; keys near the start are seen by the most rows.
    for tiles, descending in ((plan.tiles_q.tolist(), True), (plan.tiles_k.tolist(), False)):
        runs = [(sequence, [first for _, first in run]) for sequence, run in itertools.groupby(tiles, lambda t: t[0])]
        assert [sequence for sequence, _ in runs] == [2, 4, 0, 5, 3]
        assert all(firsts == sorted(firsts, reverse=descending) for _, firsts in runs)


def test_sequences_of_prefix_and_cached_keys_count_as_costly() -> None:
    plan = AttentionPlan([TILE, TILE, TILE], [TILE, 3 * TILE, TILE], [0, 0, 0], [0, 0, TILE])
    assert [sequence for sequence, _ in plan.tiles_q.tolist()] == [1, 2, 0]
