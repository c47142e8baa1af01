"""The errors that the command line shows without a traceback; importing this module loads no torch."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Input that cannot be used: a recipe, data, a model's name or a directory. The message says what and where."""


class RunError(Exception):
    """A run that had to stop for want of disk or memory. The message says of what, and how to go on."""


CANNOT_WRITE = {
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
    """Outside training, turn a full disk or an out-of-memory error into a `RunError` that ends with ``note``.

    Args:
        part: "evaluation" or "explanation".
    """
    try:
        yield
    except Exception as error:
        reason = what_lacked(error, part)
        if reason is None:
            raise
        raise RunError(f"{reason}\n{note}") from error


def what_lacked(error: Exception, part: str) -> str | None:
    """The missing resource and its remedy; None if the traceback explains the error best."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        return f"cannot write: {text}"
    # By name: this module imports neither of the libraries.
    kinds = {each.__name__ for each in type(error).__mro__}
    # safetensors and torch.save have the operating system's error in their text alone.
    if "SafetensorError" in kinds or "PytorchStreamWriter failed" in text or "unexpected pos" in text:
        return f"cannot write a checkpoint (is the disk full?): {text}"
    # The CPU's allocator has no exception of its own.
    if kinds & {"OutOfMemoryError", "MemoryError"} or "DefaultCPUAllocator: can't allocate memory" in text:
        estimate = "" if part == "explanation" else "; atmanrl train --dry-run estimates what a recipe takes"
        return f"out of memory during {part}: {text}\n{_LESS_MEMORY[part]}{estimate}"
    return None
