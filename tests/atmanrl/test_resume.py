"""A run that was killed, terminated or found its last checkpoint damaged ends as if nothing had happened."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from atmanrl.cli import main
from atmanrl.training import checkpoints
from atmanrl.training.callbacks import MetricsFile

# Two generation batches per epoch and three epochs, 12 optimiser steps; log lines and checkpoints do not line up.
COMMAND = [
    *("train", "--config", "ledger", "--data.ledger.train_size", "4", "--evaluation.prompts", "0"),
    *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--num_generations", "4"),
    *("--max_steps", "-1", "--num_train_epochs", "3", "--save_steps", "2", "--save_total_limit", "2"),
    *("--logging_steps", "3", "--mask.steps", "3", "--learning_rate", "1e-3", "--report_to", "none"),
]
STEPS = 12
GATED = Path(__file__).with_name("gated.py")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert main([*COMMAND, "--output_dir", str(run)]) == 0
    return run


def assert_same_run(run: Path, expected: Path) -> None:
    lines, wanted = ((each / "metrics.jsonl").read_text(encoding="utf-8").splitlines() for each in (run, expected))
    assert lines == wanted
    name = "model/model.safetensors"
    assert (run / name).read_bytes() == (expected / name).read_bytes()


@contextmanager
def started(run: Path, gate: Path, step: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run that after ``step`` steps waits for the file ``gate``; the block ends when the run has ended."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(GATED.parents[2])}
    command = [sys.executable, str(GATED), str(gate), str(step), *COMMAND, "--output_dir", str(run), *options]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def wait_for(there: Callable[[], Any], process: subprocess.Popen[Any]) -> None:
    while not there():
        assert process.poll() is None, f"ended with status {process.returncode}"
        time.sleep(0.005)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_of_every_epoch_ends_bit_for_bit_the_same(
    uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    seed = time.time_ns()
    print(f"seed of the kills: {seed}")
    rng = random.Random(seed)
    # The last one may come while the trained model is written.
    for step, last in ((2, 5), (6, 9), (10, STEPS)):
        with started(run, tmp_path / "never", last, *(["--resume"] if step > 2 else [])) as process:
            wait_for(lambda step=step: (run / f"checkpoint-{step}").is_dir(), process)
            time.sleep(rng.uniform(0.0, 0.3))
            process.kill()
        assert process.returncode == -signal.SIGKILL
    assert main([*COMMAND, "--output_dir", str(run), "--resume"]) == 0
    assert_same_run(run, uninterrupted)


@pytest.mark.slow
def test_sigterm_saves_where_a_generation_batch_ends_and_exits_0(uninterrupted: Path, tmp_path: Path) -> None:
    run, gate = tmp_path / "run", tmp_path / "gate"
    with started(run, gate, 5, "--save_steps", "12") as process:
        wait_for((run / "metrics.jsonl").is_file, process)
        process.terminate()
        gate.touch()
    assert process.returncode == 0
    (saved,) = run.glob("checkpoint-*")
    # The metrics are those of step 3; a generation batch has two steps.
    assert saved.name in ("checkpoint-4", "checkpoint-6")
    assert not (run / "model").exists()
    assert main([*COMMAND, "--save_steps", "12", "--output_dir", str(run), "--resume"]) == 0
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "no manifest"])
def test_a_damaged_checkpoint_is_recognised_and_the_one_before_taken(
    uninterrupted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    file = run / f"checkpoint-{STEPS}" / ("manifest.json" if damage == "no manifest" else "optimizer.pt")
    if damage in ("missing", "no manifest"):
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[100] ^= 1
        file.write_bytes(content[:1000] if damage == "truncated" else content)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.last_checkpoint(run) == run / f"checkpoint-{STEPS - 2}"
    assert f"checkpoint-{STEPS} is damaged ({file.name}" in caplog.text.replace("the content of ", "")


def test_resuming_from_an_older_checkpoint_repeats_the_same_lines(uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    shutil.rmtree(run / f"checkpoint-{STEPS}")
    shutil.rmtree(run / "model")
    # As after a kill in the middle of a line.
    lines = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(lines[:-20])
    assert main([*COMMAND, "--output_dir", str(run), "--resume"]) == 0
    assert_same_run(run, uninterrupted)


def test_a_run_that_ended_inside_a_generation_batch_goes_on_from_the_one_before(
    uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert main([*COMMAND, "--max_steps", "3", "--output_dir", str(run)]) == 0
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert main([*COMMAND, "--output_dir", str(run), "--resume"]) == 0
    assert_same_run(run, uninterrupted)


def test_old_checkpoints_are_deleted_and_none_is_left_half_written(uninterrupted: Path) -> None:
    assert sorted(path.name for path in uninterrupted.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-12"]
    assert not (uninterrupted / ".saving").exists()
    for checkpoint in uninterrupted.glob("checkpoint-*"):
        assert checkpoints.damage(checkpoint) is None


def test_resuming_needs_a_run_of_the_same_recipe(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, "--output_dir", str(tmp_path / "none"), "--resume"]) == 2
    assert "holds no run to resume" in capsys.readouterr().err
    assert main([*COMMAND, "--output_dir", str(uninterrupted), "--resume", "--mask.steps", "4"]) == 2
    assert "started with other settings: mask.steps (3, now 4)" in capsys.readouterr().err


def test_the_epochs_orders_differ_and_timings_stay_out_of_the_metrics(uninterrupted: Path) -> None:
    lines = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert len({line["completions/mean_length"] for line in lines}) > 1


def test_the_seconds_of_an_evaluation_stay_out_of_the_metrics(tmp_path: Path) -> None:
    times = {"eval_runtime": 1.5, "eval_samples_per_second": 2.0, "eval_steps_per_second": 0.5}
    args, state = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(global_step=2)
    MetricsFile({}).on_log(args, state, TrainerControl(), logs={"eval_reward": 0.5, **times})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8")) == {"step": 2, "eval_reward": 0.5}
