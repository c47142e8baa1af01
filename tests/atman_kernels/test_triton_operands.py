"""Which keys and values have a tensor descriptor, and how a kernel gets its bias and scales its scores."""

from __future__ import annotations

import pytest
import torch

from atman_kernels import AttentionPlan
from atman_kernels._triton.launch import BlockSizes, block_sizes, flags_of, tile_descriptor, vector_shapes
from atman_kernels.problem import NO_WINDOW, AttentionProblem

BLOCK = [1, 32, 1, 16]


def _keys(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


WITH_DESCRIPTOR = {
    "contiguous": _keys(2, 40, 3, 16),
    "part of a joint projection": _keys(2, 40, 8 * 16).unflatten(-1, (8, 16))[:, :, 5:],
    "one batch row with an arbitrary stride": _keys(1, 40, 3, 16).as_strided((1, 40, 3, 16), (7, 48, 16, 1)),
    "head_dim that is no power of two": _keys(1, 40, 3, 24),
    "heads outside rows": _keys(2, 3, 40, 16).transpose(1, 2),
    "part of a cache with heads outside rows": _keys(2, 3, 64, 16)[:, :, 8:48].transpose(1, 2),
}
WITHOUT_DESCRIPTOR = {
    "batch inside rows": _keys(40, 2, 3, 16).transpose(0, 1),
    "no 16 bytes in a row": _keys(1, 40, 3, 9),
    "begins between 16 bytes": _keys(1 * 40 * 3 * 16 + 1)[1:].view(1, 40, 3, 16),
    "expanded heads": _keys(1, 40, 1, 16).expand(1, 40, 3, 16),
    "empty": _keys(1, 0, 3, 16),
}


@pytest.mark.parametrize("layout", WITH_DESCRIPTOR)
def test_layouts_whose_strides_grow_have_a_descriptor(layout: str) -> None:
    x = WITH_DESCRIPTOR[layout]
    descriptor = tile_descriptor("sm_90", x, BLOCK)
    assert descriptor is not None
    outside = layout.endswith("heads outside rows")
    assert descriptor.block_shape == ([1, 1, 32, 16] if outside else BLOCK)
    # The same numbers at the same places, axis by axis.
    view = x.transpose(1, 2) if outside else x
    assert list(view.shape) == descriptor.shape
    used = [stride for size, stride in zip(view.shape, view.stride(), strict=True) if size > 1]
    assert [s for size, s in zip(descriptor.shape, descriptor.strides, strict=True) if size > 1] == used


@pytest.mark.parametrize("layout", WITHOUT_DESCRIPTOR)
def test_layouts_that_the_bulk_engine_does_not_take_stay_with_pointers(layout: str) -> None:
    assert tile_descriptor("sm_90", WITHOUT_DESCRIPTOR[layout], BLOCK) is None


def test_devices_without_a_bulk_engine_get_no_descriptor() -> None:
    assert tile_descriptor("sm_80", _keys(2, 40, 3, 16), BLOCK) is None


@pytest.mark.parametrize(("sm_scale", "scales_first"), [(0.25, False), (-0.25, True), (1e-30, True)])
def test_scores_are_scaled_before_the_maximum_where_it_would_be_another(sm_scale: float, scales_first: bool) -> None:
    plan, k = AttentionPlan([40]), _keys(1, 40, 1, 16)
    tables = (plan.sequences, plan.tiles_q, plan.tiles_k)
    problem = AttentionProblem(k, k, k, None, None, None, *tables, sm_scale, True, NO_WINDOW)
    assert flags_of("sm_90", BlockSizes(64, 32, 4, 1), problem).SCALE_FIRST.value is scales_first


@pytest.mark.parametrize("family", ["sm_80", "sm_90", "sm_100", "interpreter"])
@pytest.mark.parametrize("kernel", ["forward", "backward_queries"])
def test_a_bias_tile_that_is_copied_has_as_many_numbers_as_threads(family: str, kernel: str) -> None:
    """With fewer, each thread would load the columns of its scores by itself."""
    for dtype in (torch.float16, torch.float32):
        for head_dim in (16, 64, 128, 256):
            blocks = block_sizes(family, kernel, head_dim, dtype)
            if blocks.num_stages == 1 and family != "interpreter":
                continue
            rows = vector_shapes(family, blocks, dtype)["BIAS_ROWS"]
            assert rows * blocks.block_n >= 32 * blocks.num_warps
            assert blocks.block_m % rows == 0
