"""TRL's GRPO trainer with checkpoints from which a run goes on exactly as if it had never stopped.

Three things stand in the way of that in TRL's own: its sampler starts again with the first epoch's order in a resumed
process, what was measured since the last log line is lost, and a checkpoint may be left half written.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.trainer_utils import rotate_checkpoints
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from atmanrl.training import checkpoints

UNLOGGED = "unlogged-{process}.json"
"""File of a checkpoint, one per process: what was measured since the last log line."""

logger = logging.getLogger(__name__)

# transformers has torch.load put the optimiser of several processes on this process's device. On a CPU accelerate calls
# that "cpu:1", which torch.load does not know.
torch.serialization.register_package(
    30, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


class ResumableGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """Saves whole checkpoints with what is not logged yet, and draws each epoch's order from the seed and the epoch.

    Its arguments are an :class:`atmanrl.training.trainer.AtManGRPOConfig`, which knows where a generation batch ends.
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
        with checkpoints.staged(Path(self.args.output_dir), name, self.accelerator) as staging:
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
