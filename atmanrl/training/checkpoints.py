"""Checkpoints, and the trained model, that are there whole or not at all.

One is written into a staging directory, gets a manifest with the size and CRC-32 of every file, and appears
under its name by one rename. A process killed at any moment leaves the older checkpoints as they were; a checkpoint
damaged later is recognised by its manifest.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from atmanrl.errors import InputError

MANIFEST = "manifest.json"
_STAGING = ".saving"
_CHUNK = 1 << 22

logger = logging.getLogger(__name__)


@contextmanager
def staged(run: Path, name: str, accelerator: Accelerator) -> Iterator[Path]:
    """A directory in which ``name`` is to be written; afterwards it stands in ``run``, complete and on the disk.

    All processes enter and leave together; the main one creates, seals and renames.
    """
    staging = run / _STAGING
    if accelerator.is_main_process:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        yield staging
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _seal(staging / name)
            shutil.rmtree(run / name, ignore_errors=True)
            os.replace(staging / name, run / name)
            _sync(run)
            staging.rmdir()
    except BaseException:
        # A full disk needs the room, for instance for the message.
        shutil.rmtree(staging, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()


def saved(run: Path) -> list[Path]:
    """The checkpoints of a run, whole or damaged, the newest first."""
    found = {int(match[1]): path for path in run.glob("checkpoint-*") if (match := re.search(r"-(\d+)$", path.name))}
    return [path for _, path in sorted(found.items(), reverse=True)]


def last_checkpoint(run: Path) -> Path | None:
    """The newest undamaged checkpoint of a run, None where it has saved none; each damaged one passed over is logged.

    Raises:
        InputError: every checkpoint is damaged; starting again would drop what the run has logged.
    """
    for path in saved(run):
        problem = damage(path)
        if problem is None:
            return path
        logger.warning("%s is damaged (%s): falling back to the checkpoint before it", path, problem)
    if saved(run):
        raise InputError(f"every checkpoint in {run} is damaged; --overwrite deletes the run and starts it again")
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if they are as they were written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {error}"
    for name, expected in manifest.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["size"]:
            return f"{name} has {file.stat().st_size} bytes, {expected['size']} were written"
        if _crc32(file) != expected["crc32"]:
            return f"the content of {name} has changed"
    return None


def _seal(checkpoint: Path) -> None:
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    manifest = {}
    for file in files:
        manifest[str(file.relative_to(checkpoint))] = {"size": file.stat().st_size, "crc32": _crc32(file)}
        _sync(file)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(checkpoint / MANIFEST)
    _sync(checkpoint)


def _crc32(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _sync(path: Path) -> None:
    # Without it a crash of the machine may keep the rename and lose the content.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
