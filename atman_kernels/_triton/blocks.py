"""Block sizes: the tile shape and launch options of each kernel, per device family, head_dim and dtype."""

from __future__ import annotations

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton

# {device family: {kernel: {bytes per element: {padded head_dim: [BLOCK_M, BLOCK_N, num_warps, num_stages]}}}}, chosen
# from the registers, spills and shared memory of ahead-of-time compilation, or by benchmarks/tune.py on a GPU. "sm_86"
# stands for devices with 99 KiB of shared memory per block. The interpreter's cost is per tile; its unequal shapes
# below TILE exercise every branch of the schedules.
BLOCK_SIZES_FILE = Path(__file__).with_name("block_sizes.json")
# An environment variable that names another table, as benchmarks/tune.py writes one.
BLOCK_SIZES_VARIABLE = "ATMAN_BLOCK_SIZES"


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
    """The tile shape for a device family ("sm_90", ...), kernel, head_dim and dtype."""
    return BlockSizes(*block_size_table()[family][kernel][str(dtype.itemsize)][str(padded_head_dim(head_dim))])


@lru_cache(maxsize=1)
def block_size_table() -> dict[str, dict[str, dict[str, dict[str, list[int]]]]]:
    """The table in use, read once; the tuner tries other shapes by writing into it."""
    return json.loads(block_sizes_in_use().read_text())


def block_sizes_in_use() -> Path:
    """The table that the kernels of this process take their block sizes from."""
    return Path(os.environ.get(BLOCK_SIZES_VARIABLE) or BLOCK_SIZES_FILE)


def kernels_label(block_sizes: Path) -> str:
    """Eight hexadecimal digits that stand for the kernels' sources and a table of block sizes."""
    content = hashlib.sha256()
    package = BLOCK_SIZES_FILE.parent
    for path in (*sorted(package.glob("*.py")), package.parent / "plan.py"):
        content.update(path.read_bytes())
    content.update(json.dumps(json.loads(block_sizes.read_text()), sort_keys=True).encode())
    return content.hexdigest()[:8]
