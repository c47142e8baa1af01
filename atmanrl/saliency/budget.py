"""How many packed rows run at once: memory predicted before running, and batches that keep to it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atmanrl.rollout import Rollout
from atmanrl.saliency.cost import DecoderShape, peak_bytes
from atmanrl.saliency.likelihood import ModelLikelihood
from atmanrl.saliency.packing import pack

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

ROWS = 8192
"""Most packed rows of a forward where no budget is given: enough to fill a device, few enough that a bar moves."""

# Of the free memory, what the allocator loses to fragments and other processes may take meanwhile.
_HEADROOM = 0.9
# Autograd's gradients and temporaries come on top of what it keeps; on a CPU malloc also holds what was freed, up to
# about as much again. `test_saliency_budget` holds both to what is measured.
_PEAK_PER_KEPT, _RESIDENT_PER_KEPT = 1.15, 2.0


def rows_of(rollout: Rollout) -> int:
    """Packed rows of one rollout: its completion without the last token."""
    return len(rollout.completion_ids) - 1


def split(rollouts: Sequence[Rollout], order: Sequence[int], budget: int) -> list[list[int]]:
    """Successive groups of ``order`` (indices into ``rollouts``) with at most ``budget`` rows, prompts included.

    Neighbours with one prompt share its rows. A rollout that needs more than the budget forms a group of its own.
    """
    groups: list[list[int]] = []
    used = 0
    prompts: set[tuple[int, ...]] = set()
    for index in order:
        rollout = rollouts[index]
        needed = rows_of(rollout) + (0 if rollout.prompt_ids in prompts else len(rollout.prompt_ids))
        if not groups or used + needed > budget:
            groups.append([])
            used, prompts = 0, set()
            needed = rows_of(rollout) + len(rollout.prompt_ids)
        groups[-1].append(index)
        used += needed
        prompts.add(rollout.prompt_ids)
    return groups


def within(budget: int, items: Sequence[_Item], sizes: Sequence[int]) -> Iterator[list[_Item]]:
    """Successive groups of ``items`` whose ``sizes`` add up to at most ``budget``; a larger item goes alone."""
    group: list[_Item] = []
    used = 0
    for item, size in zip(items, sizes, strict=True):
        if group and used + size > budget:
            yield group
            group, used = [], 0
        group.append(item)
        used += size
    if group:
        yield group


def rows_that_fit(model: PreTrainedModel, rollouts: Sequence[Rollout], *, fast: bool) -> int:
    """`ROWS`, or fewer where the free memory does not hold them with what a backward needs.

    Args:
        model: borrowed frozen; rollouts: at least one, each with a chain of thought and an answer.
        fast: see `affordable_rows`.
    """
    # One rollout is one batch whatever fits, and predicting takes the general path a pass.
    affordable = affordable_rows(model, rollouts, fast=fast) if len(rollouts) > 1 else None
    return ROWS if affordable is None else min(ROWS, max(1, affordable))


def affordable_rows(model: PreTrainedModel, rollouts: Sequence[Rollout], *, fast: bool = True) -> int | None:
    """Rows whose predicted peak fits the free memory of the model's device; None where that is unknown.

    Args:
        fast: whether they take the fast path, whose peak follows from shapes.
    """
    free = _free_bytes(model.device)
    if free is None:
        return None
    rows = sum(map(rows_of, rollouts))
    prompts = sum(map(len, {rollout.prompt_ids for rollout in rollouts}))
    answers = sum(len(rollout.answer_ids) + len(rollout.marker_ids) for rollout in rollouts)
    if fast:
        needed = peak_bytes(
            DecoderShape.of(model), model.dtype.itemsize, rows, answers, prompts, on_cpu=model.device.type == "cpu"
        )
    else:
        longest = max(rollouts, key=rows_of)
        kept = rows * kept_bytes_of(model, longest) / rows_of(longest)
        needed = int(kept * (_RESIDENT_PER_KEPT if model.device.type == "cpu" else _PEAK_PER_KEPT))
    return int((rows + prompts) * _HEADROOM * free / needed)


def kept_bytes_of(model: PreTrainedModel, rollout: Rollout) -> int:
    """Bytes that autograd through ``model`` keeps for the backward of one rollout, weights not counted: measured."""
    batch = pack([rollout], answer_loss="all", device=model.device)
    likelihood = ModelLikelihood(model, batch)
    bias = torch.zeros(batch.n_rows, device=model.device, requires_grad=True)
    with torch.enable_grad():
        return saved_bytes(model, lambda: likelihood(bias))


def saved_bytes(model: PreTrainedModel, forward: Callable[[], object]) -> int:
    """Bytes of what autograd saves in ``forward()``: storages count once, the weights of ``model`` never."""
    saved: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        # Held until the hooks have run, so that no address is given out twice.
        alive = forward()
    del alive
    return sum(size for pointer, size in saved.items() if pointer not in weights)


def halving_on_out_of_memory(run: Callable[[int], _Result], budget: int) -> _Result:
    """``run(budget)``; if memory runs out, once more with half the budget.

    Raises:
        torch.OutOfMemoryError: if it runs out with half of it, too.
    """
    try:
        return run(budget)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
    # Outside the handler: its traceback would keep the failed run's tensors alive.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return run(max(1, budget // 2))


def _is_out_of_memory(error: BaseException) -> bool:
    # The CPU's allocator has no exception of its own.
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What the allocator holds without using it is free for us as well.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    return min((free for free in (free_in_machine(), free_in_cgroup()) if free is not None), default=None)


def free_in_machine(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def free_in_cgroup(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container (cgroup v2) may still take; None without a limit. Cached files count as free."""
    limit, used, statistics = (root / f"memory.{name}" for name in ("max", "current", "stat"))
    if not limit.exists() or (most := limit.read_text().strip()) == "max":
        return None
    cached = next(
        int(line.split()[1]) for line in statistics.read_text().splitlines() if line.startswith("inactive_file ")
    )
    return max(0, int(most) - int(used.read_text()) + cached)
