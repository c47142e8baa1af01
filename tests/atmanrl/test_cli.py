"""The command line: fast help, runs that leave what they promise, and errors without a traceback."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from atmanrl import doctor
from atmanrl.cli import main
from atmanrl.config import ModelConfig
from atmanrl.models import load_model, source_of
from tests.atmanrl.tiny import byte_level_tokenizer, llama, write_gsm8k

QUICK = [
    *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--num_generations", "4"),
    *("--max_steps", "2", "--mask.steps", "2", "--save_steps", "2", "--evaluation.prompts", "2"),
    *("--evaluation.samples", "1", "--report_to", "none", "--max_completion_length", "32", "--bf16", "false"),
]


def test_training_on_ledger_leaves_a_complete_run_directory(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", "--config", "ledger", "--output_dir", str(run), *QUICK]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert "rewards/saliency/mean" in lines[0]
    assert not any("time" in key or "per_second" in key for line in lines for key in line)
    timings = [json.loads(line) for line in (run / "timings.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(timings[0][part] > 0 for part in ("generation", "saliency", "update"))
    for name in ("config.yaml", "environment.json", "before.json", "after.json", "summary.json", "report.html"):
        assert (run / name).stat().st_size > 0, name
    assert not (run / "README.md").exists(), "a model card without a model"
    trained = AutoModelForCausalLM.from_pretrained(run / "model")
    resumable = AutoModelForCausalLM.from_pretrained(run / "checkpoint-2")
    assert (run / "model" / "model.safetensors").is_file()
    for now, saved in zip(trained.parameters(), resumable.parameters(), strict=True):
        assert torch.equal(now, saved)
    assert AutoTokenizer.from_pretrained(run / "model").encode("a 6") == AutoTokenizer.from_pretrained(
        run / "checkpoint-2"
    ).encode("a 6")


def test_training_on_a_local_gsm8k_file_with_a_random_llama(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(model)
    llama(len(tokenizer)).save_pretrained(model)
    data = write_gsm8k(tmp_path / "train.jsonl")
    run = tmp_path / "run"
    source = ["--model.name", str(model), "--data.path", str(data), "--data.answers", "flexible"]
    rate = ["--learning_rate", "1e-3", "--gradient_checkpointing", "false"]
    assert main(["train", "--config", "gsm8k", "--output_dir", str(run), *source, *QUICK, *rate]) == 0
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (model, run / "model"))
    changed = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(changed)


def test_a_dry_run_prints_the_arithmetic_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", "--config", "ledger", "--output_dir", str(run), "--dry-run", "--max_steps", "-1"]) == 0
    printed = capsys.readouterr().out
    assert "8 queries x 8 rollouts = 64 rollouts" in printed
    assert "4096 examples -> 512 generation batches x 2 steps x 8 epochs = 8192 optimiser steps" in printed
    assert "64 x 64 = 4096 sampled" in printed
    assert "0.1405 M parameters in float32" in printed
    # 2 + 4 x 200 + 6 x 2 + 2 operations per parameter and token.
    assert "generation 0%, saliency 98%, update 2%" in printed
    assert not run.exists()
    # Credit may be all that the scores are for.
    credit = ["--saliency_weight", "0", "--credit_assignment.strategy", "saliency"]
    assert main(["train", "--config", "ledger", "--output_dir", str(run), "--dry-run", *credit]) == 0
    assert "generation 0%, saliency 98%, update 2%" in capsys.readouterr().out


def test_a_dry_run_tries_a_large_machines_recipe_on_any(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    llama(300).save_pretrained(model)
    data = write_gsm8k(tmp_path / "train.jsonl")
    command = ["train", "--config", "gsm8k", "--dry-run", "--model.name", str(model), "--data.path", str(data)]
    monkeypatch.setenv("WORLD_SIZE", "8")
    peaks = []
    for sharded, where in (("false", "per process"), ("true", "over all processes")):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", sharded)
        assert main([*command, "--gradient_accumulation_steps", "4"]) == 0
        printed = capsys.readouterr().out
        assert "2 rollouts x 8 process(es) x 4 accumulated = 64 rollouts" in printed
        assert f"GiB {where}" in printed
        peaks.append(re.search(r"([\d.]+) GiB in an update pass", printed)[1])
    assert float(peaks[1]) < float(peaks[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mask.stesp", "3"], "unknown key 'mask.stesp'; did you mean 'mask.steps'"),
        (["--num_generations", "7"], "whole groups of num_generations 7"),
        (["--data.name", "gsm8k", "--data.path", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--data.path", "mine.jsonl"], "data.path is not for ledger, whose rows are generated"),
        (["--model.name", "./nowhere"], "model './nowhere' cannot be loaded: there is no such directory"),
        (["--model.dtype", "fp16"], "'model.dtype' must be 'float32' or 'bfloat16' or"),
        (["--max_completion_length", "4000"], "max_completion_length 4000 leaves it 0 of the model's context of 256"),
        (["--evaluation.temperature", "0"], "is 0 for one sample alone; got 0.0 for 2"),
        (["--max_completion_length", "245"], "prompt 0 of the training rows has 16 tokens"),
    ],
)
def test_input_that_cannot_be_used_ends_with_status_2_and_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["train", "--config", "ledger", "--output_dir", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_models_directory_may_lie_in_the_home_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A shell expands "~"; of a recipe's key nobody else would.
    monkeypatch.setenv("HOME", str(tmp_path))
    assert source_of(ModelConfig("~/model")) == str(tmp_path / "model")
    with pytest.raises(ValueError, match="model '~/model' cannot be loaded: there is no such directory"):
        load_model(ModelConfig("~/model"))


def test_doctor_tests_the_backends_and_fails_when_one_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", printed, re.MULTILINE)
    assert re.search(r"^atmanrl +\S", printed, re.MULTILINE)
    assert re.search(r"^C\+\+ kernels +(built; .*portable|not built: .*)$", printed, re.MULTILINE)
    assert "reference" in printed
    monkeypatch.setattr(doctor, "largest_error", lambda name, device: 0.5)
    assert main(["doctor"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_doctor_fails_where_a_gradient_is_nan(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = doctor._output_and_gradients

    def spoiled(name: doctor.Backend, values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        output, *gradients = computed(name, values)
        return output, *gradients[:-1], gradients[-1] * (1.0 if values["q"].dtype == torch.float64 else torch.nan)

    monkeypatch.setattr(doctor, "_output_and_gradients", spoiled)
    assert main(["doctor"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_directory_with_another_run_is_refused_and_overwriting_deletes_a_runs_files_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ["train", "--config", "ledger", "--output_dir", str(run), *QUICK, "--evaluation.prompts", "0"]
    assert main(command) == 0
    for mine in ("notes.txt", "README.md"):
        (run / mine).write_text("mine", encoding="utf-8")
    assert main(command) == 2
    assert f"{run} holds another run" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--max_steps", "4", "--save_strategy", "no"]) == 0
    assert not (run / "checkpoint-2").exists()
    assert all((run / mine).read_text(encoding="utf-8") == "mine" for mine in ("notes.txt", "README.md"))


def test_a_directory_with_other_files_is_refused_even_to_overwriting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years", encoding="utf-8")
    assert main(["train", "--config", "ledger", "--output_dir", str(tmp_path), "--overwrite"]) == 2
    assert "is not empty (thesis.tex) and holds no run" in capsys.readouterr().err


def test_a_run_that_never_started_leaves_no_directory_behind(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", "--config", "ledger", "--output_dir", str(run), "--model.name", "./nowhere"]) == 2
    assert not run.exists()
