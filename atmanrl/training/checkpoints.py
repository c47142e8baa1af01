"""Checkpoints, and the trained model, that are there whole or not at all, and a trainer that goes on from them exactly.

A checkpoint is written into a staging directory, gets a manifest with the size and CRC-32 of every file, and appears
under its name by one rename. A process killed at any moment leaves the older checkpoints as they were; a checkpoint
damaged later is recognised by its manifest.

Two more things stand in the way of an exact resumption in TRL's own trainer: its sampler starts again with the first
epoch's order in a resumed process, and what was measured since the last log line is lost.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel
from transformers.trainer_utils import rotate_checkpoints
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from atmanrl.errors import InputError

MANIFEST = "manifest.json"
UNLOGGED = "unlogged-{process}.json"
"""File of a checkpoint, one per process: what was measured since the last log line."""
STAGING = ".saving"
_CHUNK = 1 << 22

logger = logging.getLogger(__name__)

# transformers has torch.load put the optimiser of several processes on this process's device. On a CPU accelerate calls
# that "cpu:1", which torch.load does not know.
torch.serialization.register_package(
    30, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


@contextmanager
def staged(run: Path, name: str, accelerator: Accelerator) -> Iterator[Path]:
    """A directory in which ``name`` is to be written; afterwards it stands in ``run``, complete and on the disk.

    All processes enter and leave together; the main one creates, seals and renames.
    """
    staging = run / STAGING
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
    """The fault of a checkpoint's files; None if they are unchanged."""
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


class ResumableGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """Saves whole checkpoints with the measurements that are not logged yet.

    The order of an epoch depends on seed and epoch only.

    Its arguments are an :class:`atmanrl.training.config.AtManGRPOConfig`, which knows where a generation batch ends.
    """

    _staging: Path | None = None

    def _get_train_sampler(self, dataset: Any = None) -> EpochSampler:
        return EpochSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def _save_checkpoint(self, model: PreTrainedModel, trial: Any) -> None:
        if self.state.global_step % self.args.arithmetic.steps_per_generation:
            # Where a run ends; one that is to go on repeats the steps since the checkpoint before.
            logger.warning("no checkpoint at step %d, inside a generation batch", self.state.global_step)
            return
        name = f"checkpoint-{self.state.global_step}"
        with staged(Path(self.args.output_dir), name, self.accelerator) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self._unlogged_file(staging / name).write_text(json.dumps(self._unlogged()), encoding="utf-8")
        if self.args.should_save:
            rotate_checkpoints(self.args.output_dir, self.args.save_total_limit)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write none: TRL's, renewed with every checkpoint, names no base model, no data and no licence."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # Called once per resumed run, before its first step and after the loop has reset its running sums.
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and (path := self._unlogged_file(Path(checkpoint))).is_file():
            unlogged = json.loads(path.read_text(encoding="utf-8"))
            self._metrics["train"].update(unlogged["metrics"])
            self._tr_loss.fill_(unlogged["tr_loss"])
            self._total_loss_scalar = unlogged["total_loss"]
            self._globalstep_last_logged = unlogged["last_logged_step"]

    def _unlogged_file(self, checkpoint: Path) -> Path:
        return checkpoint / UNLOGGED.format(process=self.accelerator.process_index)

    def _unlogged(self) -> dict[str, Any]:
        # What the next log line averages over: without it a run saved between two lines logs other numbers.
        return {
            "metrics": self._metrics["train"],
            "tr_loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged_step": self._globalstep_last_logged,
        }


class EpochSampler(RepeatSampler):  # type: ignore[misc]
    """TRL's sampler with an order that depends on the seed and the epoch alone.

    The orders are those an uninterrupted run draws one after the other; TRL's own sampler starts again with the first
    epoch's order in a resumed process.
    """

    def __init__(self, *args: Any, epoch: Callable[[], int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(self.epoch()):
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()  # type: ignore[no-any-return]
