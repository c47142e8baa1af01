"""From tensors to kernel launches: block sizes, arguments that kernels share, and launches kept for equal calls."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from atman_kernels._triton.tiles import Flags, Rows
from atman_kernels.problem import NO_WINDOW, AttentionProblem

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
    """A launch without its tensors: the others say which tensor of a call each argument takes."""

    launch: Launch
    slots: tuple[tuple[str, int], ...]
    rows: tuple[tuple[str, int], ...]
    descriptors: tuple[tuple[str, int], ...]

    def fill(self, tensors: tuple[Tensor | None, ...]) -> Launch:
        """The launch of a call with other tensors of the same layout."""
        arguments = self.launch.arguments.copy()
        for name, slot in self.slots:
            arguments[name] = tensors[slot]
        for name, slot in self.rows:
            arguments[name] = arguments[name]._replace(ptr=tensors[slot])
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
    slots, rows, descriptors, arguments = [], [], [], dict(launch.arguments)
    for name, value in launch.arguments.items():
        if isinstance(value, Tensor):
            slots.append((name, slot_of[id(value)]))
            # Kept, it would keep a call's memory.
            arguments[name] = None
        elif isinstance(value, Rows):
            rows.append((name, slot_of[id(value.ptr)]))
            arguments[name] = value._replace(ptr=None)
        elif isinstance(value, TensorDescriptor):
            descriptors.append((name, slot_of[id(value.base)]))
            arguments[name] = TensorDescriptor.__new__(TensorDescriptor)
            arguments[name].__dict__ = {**value.__dict__, "base": None}
    return _Template(launch._replace(arguments=arguments), tuple(slots), tuple(rows), tuple(descriptors))


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


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products stay fp32; the setting has no effect on 16-bit inputs."""
    return "ieee" if dtype == torch.float32 else "tf32"


# Families with a bulk copy engine; the interpreter takes the same path as they do.
BULK_COPY_FAMILIES = ("sm_90", "sm_100", "interpreter")
_ALIGNMENT_BYTES = 16


def tile_descriptor(family: str, x: Tensor, block: list[int]) -> TensorDescriptor | None:
    """A descriptor of (B, T, H, D) rows, or (T, H, D), in tiles of ``block``; None where the device or layout has none.

    A layout has one if, as cuTensorMapEncodeTiled documents, it begins at a multiple of 16 bytes, its strides are such
    multiples and each is a multiple of, and at least the extent of, the axis inside it. Where (B, T, H, D) is not such
    a layout and (B, H, T, D) is, as Hugging Face holds keys, the descriptor has its axes in that order.
    """
    if family not in BULK_COPY_FAMILIES or not x.numel() or x.data_ptr() % _ALIGNMENT_BYTES:
        return None
    sizes, steps = [1, *x.shape][-4:], [0, *x.stride()][-4:]
    for order in ((0, 1, 2, 3), (0, 2, 1, 3)):
        shape = [sizes[axis] for axis in order]
        strides = _growing_strides(shape, [steps[axis] for axis in order], x.element_size())
        if strides is not None:
            return TensorDescriptor(x, shape, strides, [block[axis] for axis in order])
    return None


def _growing_strides(shape: list[int], strides: list[int], element_size: int) -> list[int] | None:
    """The strides as a descriptor states them; None where the bulk copy engine does not take them."""
    found = [1]
    extent = shape[-1]
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        # The stride of an axis of length 1 is never used, and torch leaves anything there.
        used = stride if size > 1 else extent
        if used < extent or used % found[0] or used * element_size % _ALIGNMENT_BYTES:
            return None
        found.insert(0, used)
        extent = used * size
    return found


def rows_of(x: Tensor | None, absent: Tensor | None = None) -> Rows:
    """A (B, T, H, D) or (T, H, D) tensor for a kernel; without it ``absent``, never read, stands in with strides 0."""
    return Rows(absent, 0, 0, 0) if x is None else Rows(x, *(0, *x.stride())[-4:-1])


def operands_of(x: AttentionProblem) -> dict[str, object]:
    """The tensors that forward and backward kernels share; absent ones are stood in for by tensors never read."""
    return {
        "q": rows_of(x.q),
        "k": rows_of(x.k),
        "v": rows_of(x.v),
        "key_bias_ptr": x.q if x.key_bias is None else x.key_bias,
        "prefix_k": rows_of(x.prefix_k, x.k),
        "prefix_v": rows_of(x.prefix_v, x.v),
        "sequences_ptr": x.sequences,
        "sm_scale": x.sm_scale,
    }


def varying_of(x: AttentionProblem) -> dict[str, int]:
    """The integers of a problem that no kernel specialises: Triton 3.6 specialises every integer inside a tuple."""
    return {"window": x.window, "bias_batch": 0 if x.key_bias is None else x.key_bias.stride(0)}


def flags_of(family: str, blocks: BlockSizes, x: AttentionProblem) -> Flags:
    """What a kernel is compiled for in a problem."""
    head_dim = x.q.shape[3]
    values = Flags(
        HEADS_Q=x.q.shape[2],
        GROUP=x.q.shape[2] // x.k.shape[2],
        HEAD_DIM=head_dim,
        HAS_KEY_BIAS=x.key_bias is not None,
        HAS_PREFIX=x.prefix_k is not None,
        IS_CAUSAL=x.causal,
        HAS_WINDOW=x.causal and x.window < NO_WINDOW,
        BLOCK_M=blocks.block_m,
        BLOCK_N=blocks.block_n,
        BLOCK_D=padded_head_dim(head_dim),
        PRECISION=dot_precision(x.q.dtype),
        SCALE_FIRST=not 1e-6 < x.sm_scale < 1e6,
        **vector_shapes(family, blocks, x.q.dtype),
    )
    return Flags(*map(tl.constexpr, values))


def descriptors_of(family: str, blocks: BlockSizes, x: AttentionProblem) -> dict[str, TensorDescriptor | None]:
    """How a row-owned kernel gets tiles of keys and values; None: through pointers."""
    block = [1, blocks.block_n, 1, padded_head_dim(x.k.shape[3])]
    sources = {"k_desc": x.k, "v_desc": x.v, "prefix_k_desc": x.prefix_k, "prefix_v_desc": x.prefix_v}
    return {name: None if t is None else tile_descriptor(family, t, block) for name, t in sources.items()}


def vector_shapes(family: str, blocks: BlockSizes, dtype: torch.dtype) -> dict[str, int]:
    """BIAS_ROWS and SUM_COLUMNS of a row-owned kernel; see ``tiles.load_bias`` and ``tiles.partial_sums``."""
    # There a thread holds 2 of every 8 neighbouring columns of a row, in all of the row if no two warps share it.
    within_threads = family in ("sm_90", "interpreter") or (
        family in ("sm_80", "sm_86") and blocks.block_m >= 16 * blocks.num_warps
    )
    # Without a pipeline there are no asynchronous copies either.
    copied = family == "interpreter" or (family != "gfx942" and blocks.num_stages > 1)
    return {
        "BIAS_ROWS": max(1, 32 * blocks.num_warps // blocks.block_n) if copied else 1,
        "SUM_COLUMNS": 8 if within_threads and dtype != torch.float32 else 1,
    }


def row_copies(family: str, blocks: BlockSizes, head_dim: int, *, biased: bool, fused: bool) -> int:
    """ROW_COPIES of the key-owned kernel; see ``tiles.load_row_numbers``."""
    # Elsewhere the copies' registers are spilled, as the table of compiled kernels says.
    gains = family in ("sm_90", "interpreter") and biased and not fused and padded_head_dim(head_dim) <= 128
    return min(max(1, 32 * blocks.num_warps // blocks.block_m), blocks.block_n) if gains else 1
