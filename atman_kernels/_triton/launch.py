"""From tensors to kernel launches: which device family compiles what, and launches kept for the next equal call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


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


class _Template(NamedTuple):
    """A launch without its tensors: ``slots`` and ``descriptors`` say which tensor of a call each argument takes."""

    launch: Launch
    slots: tuple[tuple[str, int], ...]
    descriptors: tuple[tuple[str, int], ...]

    def fill(self, tensors: tuple[Tensor | None, ...]) -> Launch:
        """The launch of a call with other tensors of the same layout."""
        arguments = self.launch.arguments.copy()
        for name, slot in self.slots:
            arguments[name] = tensors[slot]
        for name, slot in self.descriptors:
            # Its checks were passed by another tensor of this layout.
            moved = TensorDescriptor.__new__(TensorDescriptor)
            moved.__dict__ = {**arguments[name].__dict__, "base": tensors[slot]}
            arguments[name] = moved
        return self.launch._replace(arguments=arguments)


_KEPT = 512
_templates: OrderedDict[Hashable, tuple[_Template, ...]] = OrderedDict()


def kept_launches(
    settings: Hashable, tensors: tuple[Tensor | None, ...], build: Callable[[], list[Launch]]
) -> list[Launch]:
    """What ``build`` returns, built once for all calls with equal settings and tensors of equal layout.

    A model calls with the same layouts in every layer and step, and building takes longer than launching.

    Args:
        settings: whatever else the launches depend on.
        tensors: all that may stand in an argument or a descriptor.
        build: makes the launches from these tensors.
    """
    # The same tensor in two places is one argument's stand-in for another only as long as it stands in both.
    first = {id(x): slot for slot, x in reversed([*enumerate(tensors)]) if x is not None}
    layouts = tuple(
        None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16, first[id(x)]) for x in tensors
    )
    key = (settings, layouts)
    if (kept := _templates.get(key)) is None:
        kept = tuple(_template(launch, first) for launch in build())
        _templates[key] = kept
        if len(_templates) > _KEPT:
            _templates.popitem(last=False)
    return [template.fill(tensors) for template in kept]


def _template(launch: Launch, slot_of: dict[int, int]) -> _Template:
    slots, descriptors, arguments = [], [], dict(launch.arguments)
    for name, value in launch.arguments.items():
        if isinstance(value, Tensor):
            slots.append((name, slot_of[id(value)]))
            # Kept, it would keep a call's memory.
            arguments[name] = None
        elif isinstance(value, TensorDescriptor):
            descriptors.append((name, slot_of[id(value.base)]))
            arguments[name] = TensorDescriptor.__new__(TensorDescriptor)
            arguments[name].__dict__ = {**value.__dict__, "base": None}
    return _Template(launch._replace(arguments=arguments), tuple(slots), tuple(descriptors))


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
