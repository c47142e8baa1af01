"""Faults from outside: a run stops with a message and a status, and goes on from what it had saved."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from atmanrl.answers import AnswerFormat
from atmanrl.cli import main
from atmanrl.training import checkpoints
from tests.atmanrl.launch import TWO, error_of
from tests.atmanrl.test_resume import COMMAND, GATED, STEPS, assert_same_run, wait_for
from tests.atmanrl.tiny import PROBLEMS, write_gsm8k

HALF = STEPS // 2


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert main([*COMMAND, "--output_dir", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("half") / "run"
    assert main([*COMMAND, "--max_steps", str(HALF), "--output_dir", str(run)]) == 0
    shutil.rmtree(run / "model")
    return run


@pytest.fixture
def halfway(half: Path, tmp_path: Path) -> Path:
    """A run that got through half of the steps: its checkpoints and its metrics."""
    return Path(shutil.copytree(half, tmp_path / "run"))


def goes_on(run: Path, uninterrupted: Path) -> None:
    assert main([*COMMAND, "--output_dir", str(run), "--resume"]) == 0
    assert_same_run(run, uninterrupted)


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Writing past ``size`` bytes fails as it does on a full disk, with another errno."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [300_000, 800_000], ids=["the weights", "the optimiser"])
def test_a_disk_that_fills_while_a_checkpoint_is_saved_leaves_the_one_before_it(
    halfway: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    with files_no_larger_than(size):
        assert main([*COMMAND, "--output_dir", str(halfway), "--resume"]) == 1
    error = capsys.readouterr().err
    assert "cannot write a checkpoint (is the disk full?)" in error
    assert f"checkpoint-{HALF} is kept and --resume goes on from it" in error
    assert not (halfway / ".saving").exists()
    goes_on(halfway, uninterrupted)


def test_a_disk_that_fills_while_the_model_is_saved_leaves_no_part_of_it(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    shutil.rmtree(run / "model")
    # All steps are done: the model is what is left to write.
    with files_no_larger_than(300_000):
        assert main([*COMMAND, "--output_dir", str(run), "--resume"]) == 1
    assert f"checkpoint-{STEPS} is kept and --resume goes on from it" in capsys.readouterr().err
    assert not (run / "model").exists()
    assert not (run / ".saving").exists()
    goes_on(run, uninterrupted)


def test_a_disk_that_is_full_when_metrics_are_written_loses_no_line(
    halfway: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = halfway / "metrics.jsonl"
    aside = lines.rename(halfway / "aside")
    lines.symlink_to("/dev/full")
    assert main([*COMMAND, "--output_dir", str(halfway), "--resume"]) == 1
    assert f"cannot write: [Errno {errno.ENOSPC}] No space left on device" in capsys.readouterr().err
    lines.unlink()
    aside.rename(lines)
    goes_on(halfway, uninterrupted)


def test_a_reward_function_that_raises_keeps_its_traceback_and_says_how_to_go_on(
    halfway: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def matches(self: AnswerFormat, predicted: str, gold: str) -> bool:
        raise KeyError("no such answer")

    with monkeypatch.context() as patched:
        patched.setattr(AnswerFormat, "matches", matches)
        with pytest.raises(KeyError, match="no such answer") as raised:
            main([*COMMAND, "--output_dir", str(halfway), "--resume"])
    kept = f"stopped after step {HALF} of {STEPS}; checkpoint-{HALF} is kept and --resume goes on from it"
    assert raised.value.__notes__ == [kept]
    goes_on(halfway, uninterrupted)


def test_the_callers_handler_of_sigterm_stands_again_after_a_run_and_after_one_that_failed(
    halfway: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a notebook, a test or a script: what came after a run did not end on SIGTERM, or ended with status 0."""

    def own(number: int, frame: Any) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGTERM, own)
    try:
        assert main([*COMMAND, "--output_dir", str(halfway), "--resume"]) == 0
        assert signal.getsignal(signal.SIGTERM) is own
        monkeypatch.setattr("trl.GRPOTrainer._compute_loss", lambda *rest: out_of_memory_on_a_gpu())
        assert main([*COMMAND, "--output_dir", str(halfway), "--overwrite"]) == 1
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def out_of_memory_on_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def out_of_memory_on_a_cpu() -> None:
    torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("place", "part", "advice"),
    [
        ("trl.GRPOTrainer._compute_loss", "update", "per_device_train_batch_size down"),
        ("trl.GRPOTrainer._generate_single_turn", "generation", "max_completion_length"),
        ("atmanrl.training.trainer.estimate_saliency", "saliency", "LoRA"),
        ("atmanrl.rhythm.credit.attention_series", "credit", "credit_assignment.strategy"),
        ("atmanrl.training.run.evaluate", "evaluation", "evaluation.batch_size"),
    ],
    ids=["update", "generation", "saliency", "credit", "evaluation"],
)
@pytest.mark.parametrize("fail", [out_of_memory_on_a_gpu, out_of_memory_on_a_cpu])
def test_want_of_memory_is_said_with_the_settings_that_need_less_of_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
    part: str,
    advice: str,
    fail: Callable[[], None],
) -> None:
    monkeypatch.setattr(place, lambda *arguments, **options: fail())
    prompts = ("--evaluation.prompts", "2", "--evaluation.before", "false") if part == "evaluation" else ()
    credit = ("--credit_assignment.strategy", "local") if part == "credit" else ()
    assert main([*COMMAND, *prompts, *credit, "--max_steps", "2", "--output_dir", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert f"out of memory during {part}: " in error
    assert advice in error
    trained = f"the trained policy is kept: {tmp_path / 'run' / 'model'}"
    assert (trained if part == "evaluation" else "no checkpoint had been saved yet") in error


def test_want_of_memory_before_training_is_said_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("atmanrl.training.run.evaluate", lambda *rest, **options: out_of_memory_on_a_gpu())
    assert main([*COMMAND, "--evaluation.prompts", "2", "--output_dir", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "out of memory during evaluation: " in error
    assert "nothing has been trained yet" in error


@pytest.mark.parametrize("fail", [out_of_memory_on_a_gpu, out_of_memory_on_a_cpu])
@pytest.mark.parametrize("command", ["evaluate", "explain"])
def test_want_of_memory_without_training_is_said_as_well(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    fail: Callable[[], None],
) -> None:
    monkeypatch.setattr("atmanrl.evaluation.recording.estimate_saliency", lambda *arguments, **options: fail())
    given = {
        "evaluate": ["--config", "ledger", "--evaluation.prompts", "2", "--output", str(tmp_path)],
        "explain": ["--model", "ledger", "--prompt", "a 6 c 0 b 6 e 8 d 4 ? c b e <cot>"],
    }
    assert main([command, *given[command]]) == 1
    part = {"evaluate": "evaluation", "explain": "explanation"}[command]
    assert f"atmanrl {command}: out of memory during {part}: " in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--html", "--csv"])
def test_a_full_disk_is_said_where_an_explanation_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    prompt = "a 6 c 0 b 6 e 8 d 4 ? c b e <cot>"
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    assert main(["explain", "--model", "ledger", "--prompt", prompt, "--mask.steps", "1", option, str(full)]) == 1
    assert "atmanrl explain: cannot write: [Errno 28] No space left on device" in capsys.readouterr().err
    assert full.is_symlink()


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_again_by_itself(
    halfway: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (halfway / "metrics.jsonl").read_bytes()
    for checkpoint in checkpoints.saved(halfway):
        (checkpoint / "optimizer.pt").unlink()
    assert main([*COMMAND, "--output_dir", str(halfway), "--resume"]) == 2
    assert "every checkpoint in" in capsys.readouterr().err
    assert (halfway / "metrics.jsonl").read_bytes() == lines


def test_an_output_directory_that_cannot_be_written_to_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main([*COMMAND, "--output_dir", str(tmp_path / "file" / "run")]) == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_a_resumed_run_on_a_read_only_disk_is_refused_and_stays_as_it_was(
    halfway: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_only(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    before = {path: path.read_bytes() for path in halfway.rglob("*") if path.is_file()}
    # Permissions do not stop a test that runs as root.
    monkeypatch.setattr("tempfile.mkstemp", read_only)
    assert main([*COMMAND, "--output_dir", str(halfway), "--resume"]) == 2
    assert "cannot be written to: [Errno 30] Read-only file system" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in halfway.rglob("*") if path.is_file()}


def test_an_unreadable_row_in_the_middle_stops_a_run_before_it_deletes_the_one_before(
    halfway: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_gsm8k(tmp_path / "train.jsonl", PROBLEMS * 5)
    rows = data.read_bytes().splitlines(keepends=True)
    middle = len(rows) // 2
    data.write_bytes(b"".join([*rows[:middle], rows[middle][:20] + b"\n", *rows[middle:]]))
    overwriting = ["--overwrite", "--data.name", "gsm8k", "--data.path", str(data)]
    assert main([*COMMAND, "--output_dir", str(halfway), *overwriting]) == 2
    assert f"{data}, line {middle + 1}: not JSON" in capsys.readouterr().err
    assert len(checkpoints.saved(halfway)) == 2


def two_processes(run: Path, *options: str, gate: Path | None = None) -> subprocess.Popen[str]:
    """A run on two processes, which after three steps wait for the file ``gate``, where one is given."""
    program = ["-m", "atmanrl"] if gate is None else [str(GATED), str(gate), "3"]
    sizes = ["--gradient_accumulation_steps", "1", "--use_cpu", "true"]
    command = [*TWO, *program, *COMMAND, *sizes, "--output_dir", str(run), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(GATED.parents[2])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finished(launcher: subprocess.Popen[str]) -> None:
    error = error_of(launcher)
    assert launcher.returncode == 0, error[-8000:]


@pytest.mark.parametrize(("deepspeed", "joining"), [("false", "--use_cpu true"), ("true", "--ddp_backend gloo")])
def test_processes_that_do_not_know_one_another_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], deepspeed: str, joining: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    # With the variable itself transformers would ask for the package.
    monkeypatch.setattr("atmanrl.training.run.parse_flag_from_env", lambda name: deepspeed == "true")
    assert main([*COMMAND, "--gradient_accumulation_steps", "1", "--output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "launched as 2 processes that do not know one another" in error
    assert joining in error


def workers_of(launcher: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"atmanrl" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
def test_a_killed_worker_ends_both_processes_and_the_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    tmp_path: Path,
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    finished(two_processes(whole))
    gate = tmp_path / "gate"
    process = two_processes(run, gate=gate)
    wait_for(lambda: checkpoints.saved(run), process)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    # The other one goes on, and waits for it.
    gate.touch()
    error = error_of(process)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in error
    assert not (run / "model").exists()
    finished(two_processes(run, "--resume"))
    assert_same_run(run, whole)
