"""Tile shapes per device family, kernel, bytes per element and padded head_dim: data only, chosen, not computed.

Each entry is (BLOCK_M query rows, BLOCK_N keys, num_warps, num_stages). "sm_86" stands for devices with 99 KiB of
shared memory per block. The numbers were chosen from registers, spills and shared memory of ahead-of-time compilation.
"""

from __future__ import annotations

_Shapes = dict[int, tuple[int, int, int, int]]


def _up_to(*steps: tuple[int, tuple[int, int, int, int]]) -> _Shapes:
    """{head_dim: shape} for the padded head_dims 16 .. 256 from (largest head_dim, shape) steps."""
    return {d: next(shape for limit, shape in steps if d <= limit) for d in (16, 32, 64, 128, 256)}


# (kernel) -> (bytes per element) -> (padded head_dim) -> (BLOCK_M, BLOCK_N, num_warps, num_stages)
BLOCK_SIZES: dict[str, dict[str, dict[int, _Shapes]]] = {
    "sm_80": {
        "forward": {
            2: _up_to((64, (128, 64, 4, 3)), (128, (128, 64, 8, 2)), (256, (64, 64, 8, 2))),
            4: _up_to((64, (64, 32, 4, 2)), (128, (32, 32, 4, 2)), (256, (16, 32, 4, 1))),
        },
        "backward_queries": {
            2: _up_to((64, (128, 64, 8, 3)), (128, (128, 32, 8, 2)), (256, (64, 32, 8, 1))),
            4: _up_to((64, (32, 32, 4, 2)), (128, (32, 32, 4, 1)), (256, (16, 16, 4, 1))),
        },
        "backward_keys": {
            2: _up_to((64, (64, 128, 8, 2)), (128, (64, 64, 8, 2)), (256, (32, 64, 8, 1))),
            4: _up_to((64, (32, 32, 4, 2)), (128, (16, 32, 4, 1)), (256, (16, 16, 4, 1))),
        },
    },
    "sm_90": {
        "forward": {
            2: _up_to((64, (128, 128, 8, 3)), (128, (128, 128, 8, 2)), (256, (128, 32, 8, 3))),
            4: _up_to((64, (64, 32, 4, 2)), (128, (32, 32, 4, 2)), (256, (16, 32, 4, 1))),
        },
        "backward_queries": {
            2: _up_to((64, (128, 64, 8, 3)), (128, (128, 64, 8, 2)), (256, (64, 32, 8, 2))),
            4: _up_to((64, (32, 32, 4, 2)), (128, (32, 32, 4, 1)), (256, (16, 16, 4, 1))),
        },
        "backward_keys": {
            2: _up_to((64, (64, 128, 8, 2)), (128, (64, 128, 8, 2)), (256, (32, 64, 8, 2))),
            4: _up_to((64, (32, 32, 4, 2)), (128, (16, 32, 4, 1)), (256, (16, 16, 4, 1))),
        },
    },
}
BLOCK_SIZES["sm_100"] = BLOCK_SIZES["sm_90"]
BLOCK_SIZES["sm_86"] = BLOCK_SIZES["sm_80"]
BLOCK_SIZES["gfx942"] = BLOCK_SIZES["sm_80"]
# The interpreter's cost is per tile; unequal shapes below TILE exercise every branch of the schedules.
BLOCK_SIZES["interpreter"] = {
    "forward": {size: _up_to((256, (64, 64, 4, 1))) for size in (2, 4)},
    "backward_queries": {size: _up_to((256, (128, 32, 4, 1))) for size in (2, 4)},
    "backward_keys": {size: _up_to((256, (32, 128, 4, 1))) for size in (2, 4)},
}
