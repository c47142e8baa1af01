"""Callbacks: files and progress during training, and stopping."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atmanrl.evaluation.records import Run, write_text_atomically
from atmanrl.progress import StepsBar
from atmanrl.report import write_page

METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"
ROLLOUTS = "rollouts"

_MEASURED_TIMES = ("step_time", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


class MetricsFile(TrainerCallback):
    """Writes each log line to ``metrics.jsonl``, and the seconds of each part of an update to ``timings.jsonl``.

    Apart, because metrics are reproducible, line by line, and times are not. A resumed run drops the lines that were
    written after its checkpoint.

    Args:
        seconds: the trainer's running sums per part of an update.
    """

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self.seconds = seconds
        self._written: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            for name in (METRICS, TIMINGS):
                _keep_lines_up_to(_directory(args) / name, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        values = {name: value for name, value in logs.items() if name not in _MEASURED_TIMES}
        _append(_directory(args) / METRICS, {"step": state.global_step, **values})
        spent = {part: seconds - self._written.get(part, 0.0) for part, seconds in self.seconds.items()}
        self._written = dict(self.seconds)
        _append(_directory(args) / TIMINGS, {"step": state.global_step, **spent})


class ProgressLine(TrainerCallback):
    """One line: how far the run is, how it does, and where the time goes; a line per log entry where stderr is a file.

    Args:
        seconds: the trainer's running sums per part of an update.
    """

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self.seconds = seconds
        self._bar: StepsBar | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and sys.stderr.isatty():
            self._bar = StepsBar(state.max_steps, state.global_step)

    def show_part(self, part: str) -> None:
        """Say in front of the bar what is going on; a generation batch may take minutes."""
        if self._bar is not None:
            self._bar.show(word=part)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.show(done=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # A step that uses a generation batch again has sampled and scored nothing.
        if not state.is_world_process_zero or not logs or "reward" not in logs:
            return
        text = self._describe(logs)
        if self._bar is not None:
            self._bar.show(text=text)
        else:
            print(f"step {state.global_step}/{state.max_steps}  {text}", file=sys.stderr, flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _describe(self, logs: Mapping[str, Any]) -> str:
        names = {
            "reward": "reward",
            "answers/accuracy": "accuracy",
            "cot/tokens": "CoT tokens",
            "rewards/saliency/mean": "saliency",
        }
        numbers = [f"{label} {logs[name]:.3g}" for name, label in names.items() if logs.get(name) is not None]
        everything = sum(self.seconds.values())
        shares = [f"{part} {seconds / everything:.0%}" for part, seconds in self.seconds.items() if everything]
        return "  ".join(numbers) + (f"  | {everything:.0f} s: {', '.join(shares)}" if shares else "")


class RolloutPages(TrainerCallback):
    """Every so many steps, ``rollouts/step-N.html``: sampled rollouts, each token coloured by its saliency.

    Args:
        sampled: the rollouts of the last generation batch; None where they have no masks.
        every: optimiser steps between two pages; 0 for none.
    """

    def __init__(self, sampled: Callable[[], Run | None], every: int) -> None:
        self.sampled = sampled
        self.every = every
        self._tried = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.every or not state.is_world_process_zero:
            return
        due = state.global_step % self.every == 0
        if self._tried and not due:
            return
        run = self.sampled()
        if run is not None:
            # The first batch's page is a trial: a page that cannot be made or written is found at once.
            self._tried = True
            path = _directory(args) / ROLLOUTS / f"step-{state.global_step}.html"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_page(path, run, title=f"Rollouts sampled before step {state.global_step}")
            if not due:
                path.unlink()
                if not any(path.parent.iterdir()):
                    path.parent.rmdir()


class StopOnSigterm(TrainerCallback):
    """On SIGTERM, trains to the end of the generation batch, saves there and ends training.

    Attributes:
        requested: whether the signal came.
    """

    def __init__(self, steps_per_generation: int) -> None:
        self.steps_per_generation = steps_per_generation
        self.requested = False
        self._before: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._before = signal.signal(signal.SIGTERM, self._request)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.steps_per_generation:
            return
        # The signal reaches processes at different moments, but all must stop at the same step.
        if any(gather_object([self.requested])):
            self.requested = True
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        print("SIGTERM: saving at the end of this generation batch", file=sys.stderr, flush=True)


def _directory(args: TrainingArguments) -> Path:
    return Path(str(args.output_dir))


def _append(path: Path, values: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def _keep_lines_up_to(path: Path, step: int) -> None:
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        # The last line may have been cut off where the process was killed.
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    write_text_atomically(path, "".join(kept))
