"""Which keys and values have a tensor descriptor, and what the aligned copy of the bias holds."""

from __future__ import annotations

import pytest
import torch

from atman_kernels import AttentionPlan
from atman_kernels._triton.operands import align_key_bias, streamed_operands, tile_descriptor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = [1, 32, 1, 16]


def _keys(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


WITH_DESCRIPTOR = {
    "contiguous": _keys(2, 40, 3, 16),
    "part of a joint projection": _keys(2, 40, 8 * 16).unflatten(-1, (8, 16))[:, :, 5:],
    "one batch row with an arbitrary stride": _keys(1, 40, 3, 16).as_strided((1, 40, 3, 16), (7, 48, 16, 1)),
    "head_dim that is no power of two": _keys(1, 40, 3, 24),
}
WITHOUT_DESCRIPTOR = {
    "heads outside rows": _keys(2, 3, 40, 16).transpose(1, 2),
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
    used = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
    assert [s for size, s in zip(x.shape, descriptor.strides, strict=True) if size > 1] == used


@pytest.mark.parametrize("layout", WITHOUT_DESCRIPTOR)
def test_layouts_that_the_bulk_engine_does_not_take_stay_with_pointers(layout: str) -> None:
    assert tile_descriptor("sm_90", WITHOUT_DESCRIPTOR[layout], BLOCK) is None


def test_devices_without_a_bulk_engine_get_no_descriptor() -> None:
    assert tile_descriptor("sm_80", _keys(2, 40, 3, 16), BLOCK) is None


def test_the_aligned_bias_is_divided_and_every_sequence_starts_at_16_bytes() -> None:
    plan = AttentionPlan([3, 0, 130, 5], device=DEVICE)
    bias = torch.randn(1, 138, device=DEVICE)
    aligned, launch = align_key_bias(bias, plan.sequences, plan.tiles_k, 0.25)
    launch.run()
    for sequence, (start, length) in enumerate([(0, 3), (3, 0), (3, 130), (133, 5)]):
        first = 4 * (start // 4 + sequence)
        assert torch.equal(aligned[0, first : first + length], bias[0, start : start + length] / 0.25)


@pytest.mark.parametrize(
    ("family", "dtype", "sm_scale", "starts_product"),
    [
        ("sm_90", torch.float16, 0.25, True),
        ("sm_90", torch.float32, 0.25, False),
        ("sm_80", torch.float16, 0.25, False),
        ("sm_90", torch.float16, -0.25, False),
        ("sm_90", torch.float16, 1e-30, False),
    ],
)
def test_the_bias_starts_the_product_where_that_is_exact_enough(
    family: str, dtype: torch.dtype, sm_scale: float, starts_product: bool
) -> None:
    plan, k = AttentionPlan([40]), _keys(1, 40, 1, 16, dtype=dtype)
    tables = (plan.sequences, plan.tiles_k)
    operands, launches = streamed_operands(family, 32, k, k, torch.zeros(1, 40), None, None, *tables, sm_scale)
    assert operands["SCALE_FIRST"] is not starts_product
    assert (operands["bias_desc"] is not None) is starts_product
    assert len(launches) == starts_product
