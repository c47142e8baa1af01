"""What a training run says when it has to stop: why, and how to go on."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from atmanrl.errors import RunError
from atmanrl.training.checkpoints import saved

if TYPE_CHECKING:
    from atmanrl.training.trainer import AtManGRPOTrainer

_CANNOT_WRITE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EISDIR),
}
_LESS_MEMORY = {
    "generation": "generation_batch_size and max_completion_length set how much is sampled together; vLLM needs less",
    "saliency": "masks are split into batches that fit already; LoRA or fsdp2.yaml leave them more room",
    "credit": 'credit_assignment.strategy "random" or "saliency" needs no pass of its own; LoRA leaves it more room',
    "evaluation": "evaluation.batch_size sets how many prompts are sampled together",
    "explanation": "--dtype bfloat16 halves the model; examples may also be explained in several files",
    "update": "per_device_train_batch_size down and gradient_accumulation_steps up by as much change no result, nor "
    "does gradient_checkpointing: true",
}


@contextmanager
def explained_without_training(part: str, note: str) -> Iterator[None]:
    """Turn want of disk or memory of what is no training into a `RunError` that ends with ``note``.

    Args:
        part: "evaluation" or "explanation".
    """
    try:
        yield
    except Exception as error:
        reason = _reason(error, part)
        if reason is None:
            raise
        raise RunError(f"{reason}\n{note}") from error


@contextmanager
def explained(run: Path, trainer: AtManGRPOTrainer) -> Iterator[None]:
    """Turn want of disk or memory inside the block into a `RunError`, and add how to go on to any other error.

    Args:
        run: the run's directory.
        trainer: knows how far the run is.
    """
    try:
        yield
    except Exception as error:
        names = [path.name for path in saved(run)[:1]]
        kept = f"{names[0]} is kept and --resume goes on from it" if names else "no checkpoint had been saved yet"
        stopped = f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; {kept}"
        reason = _reason(error, trainer.part)
        if reason is None:
            error.add_note(stopped)
            raise
        raise RunError(f"{reason}\n{stopped}") from error


def _reason(error: Exception, part: str) -> str | None:
    """What lacked and what can be done about it; None for an error that its traceback explains best."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
        return f"cannot write: {text}"
    # safetensors and torch.save have the operating system's error in their text alone.
    if isinstance(error, SafetensorError) or "PytorchStreamWriter failed" in text or "unexpected pos" in text:
        return f"cannot write a checkpoint (is the disk full?): {text}"
    # The CPU's allocator has no exception of its own.
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator: can't allocate memory" in text:
        estimate = "" if part == "explanation" else "; atmanrl train --dry-run estimates what a recipe takes"
        return f"out of memory during {part}: {text}\n{_LESS_MEMORY[part]}{estimate}"
    return None
