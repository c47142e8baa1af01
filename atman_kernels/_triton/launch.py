"""From tensors to kernel launches: which device family compiles what, and the arguments common to all kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor


class Launch(NamedTuple):
    """One kernel with its grid, its arguments by name and its launch options."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        """Launch on the current device; nothing happens where there is no program."""
        if self.programs:
            self.kernel[(self.programs,)](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)


@lru_cache(maxsize=16)
def device_family(device: torch.device) -> str:
    """The key of the block-size table for a device.

    Raises:
        RuntimeError: for NVIDIA devices before compute capability 8.0, which Triton does not compile these kernels for,
            and for AMD devices other than gfx942 (MI300), for which no kernel was ever compiled.
    """
    if triton.knobs.runtime.interpret:
        return "interpreter"
    if torch.version.hip is not None:
        architecture = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        if architecture != "gfx942":
            raise RuntimeError(
                f"the Triton kernels have block sizes for the AMD architecture gfx942, {device} is {architecture};"
                ' backend("reference") computes on every device'
            )
        return architecture
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise RuntimeError(
            f"the Triton kernels need compute capability 8.0 or higher, {device} has {major}.{minor};"
            ' backend("reference") computes on every device'
        )
    if major == 9:
        return "sm_90"
    if major == 10:
        return "sm_100"
    return "sm_80" if (major, minor) == (8, 0) else "sm_86"


def strides_of(name: str, x: Tensor | None, axes: str) -> dict[str, int]:
    """{"stride_qb": ..., "stride_qt": ...} for the leading axes of a tensor; zeros where it is absent."""
    strides = (0,) * len(axes) if x is None else x.stride()
    return {f"stride_{name}{axis}": stride for axis, stride in zip(axes, strides, strict=False)}


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products stay fp32; the setting has no effect on 16-bit inputs."""
    return "ieee" if dtype == torch.float32 else "tf32"
