"""What would stop a run late stops it before its first forward, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, TrainerControl, TrainerState, TrainingArguments

from atmanrl.cli import main
from atmanrl.config import DataConfig, EvaluationConfig, LedgerConfig, LoraSettings, ModelConfig
from atmanrl.errors import InputError
from atmanrl.evaluation.records import Run
from atmanrl.models import load_policy
from atmanrl.recipe import parse_overrides
from atmanrl.tasks import load_task
from atmanrl.tasks.ledger import CHECKPOINT
from atmanrl.training import preflight
from atmanrl.training.callbacks import RolloutPages
from atmanrl.training.config import AtManGRPOConfig, load_recipe
from atmanrl.training.directory import INPUTS, RunDirectoryError, made
from atmanrl.training.run import lora_config
from tests.atmanrl.ledger_training import settings
from tests.atmanrl.saliency_runs import rollout, run
from tests.atmanrl.tiny import PROBLEMS, byte_level_tokenizer, llama, write_gsm8k

QUICK = [
    *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--num_generations", "4"),
    *("--num_iterations", "1", "--save_strategy", "steps", "--save_steps", "1", "--mask.steps", "2", "--bf16", "false"),
    *("--max_completion_length", "8", "--report_to", "none", "--evaluation.prompts", "0"),
]


def args(folder: Path, **changed: Any) -> AtManGRPOConfig:
    return AtManGRPOConfig(**settings(folder, **changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"report_to": "clipboard"}, "report_to cannot be used: clipboard is not supported"),
        ({"optim": "galore_adamw", "optim_target_modules": "all-linear"}, "optim cannot be used"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type cannot be used"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"wrong": 1}}, "lr_scheduler_type cannot be used"),
    ],
)
def test_a_part_that_cannot_be_made_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        preflight.check_settings(args(tmp_path, **changed), EvaluationConfig())


def test_plots_are_tried_where_a_report_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **options: Any) -> None:
        raise ValueError("no such backend")

    monkeypatch.setattr(preflight.Figure, "savefig", fails)
    preflight.check_settings(args(tmp_path), EvaluationConfig(prompts=0))
    with pytest.raises(InputError, match="the report's plots cannot be used: no such backend"):
        preflight.check_settings(args(tmp_path), EvaluationConfig(prompts=2))


def unsavable_tokenizer(model: Any, tokenizer: Any) -> None:
    tokenizer.init_kwargs["made_of"] = object()


def unsavable_sampling(model: Any, tokenizer: Any) -> None:
    model.generation_config = GenerationConfig(temperature=0.9, top_p=0.6)


@pytest.mark.parametrize("spoil", [unsavable_tokenizer, unsavable_sampling])
def test_what_cannot_be_saved_is_refused_and_leaves_nothing(tmp_path: Path, spoil: Callable[[Any, Any], None]) -> None:
    model, tokenizer = load_policy(ModelConfig("ledger"))
    spoil(model, tokenizer)
    with pytest.raises(InputError, match="the policy could not be saved"), made(tmp_path / "run"):
        preflight.check_outputs(tmp_path / "run", model, tokenizer, args(tmp_path), None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("targets", "message"), [("nope", "'nope'} not found"), ("embed_tokens", "embed_tokens is a Embedding: only")]
)
def test_adapters_that_the_model_cannot_have_or_nobody_could_merge_are_refused(
    tmp_path: Path, targets: str, message: str
) -> None:
    model, tokenizer = load_policy(ModelConfig("ledger"))
    adapters = lora_config(LoraSettings(targets=(targets,)))
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(InputError, match=f"model.lora cannot be used: .*{message}"):
        preflight.check_outputs(tmp_path, model, tokenizer, args(tmp_path), adapters)
    assert [name for name, _ in model.named_parameters()] == before
    preflight.check_outputs(tmp_path, model, tokenizer, args(tmp_path), lora_config(LoraSettings()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "adapters", "times"),
    [
        # Weights, and two moments of each, in three checkpoints; and the trained model.
        ({"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}, None, 3 * 3 + 1),
        ({"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "save_only_model": True}, None, 3 + 1),
        ({"save_strategy": "no"}, None, 1),
    ],
)
def test_a_disk_with_too_little_room_is_refused_at_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], adapters: Any, times: int
) -> None:
    model, tokenizer = load_policy(ModelConfig("ledger"))
    needed = times * sum(each.numel() * 4 for each in model.parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    preflight.check_outputs(tmp_path, model, tokenizer, args(tmp_path, **changed), adapters)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(RunDirectoryError, match="GiB free"):
        preflight.check_outputs(tmp_path, model, tokenizer, args(tmp_path, **changed), adapters)


def test_an_evaluation_without_rows_is_refused(tmp_path: Path) -> None:
    model, tokenizer = load_policy(ModelConfig("ledger"))
    task = load_task(DataConfig(ledger=LedgerConfig(train_size=4, test_size=1)))
    empty = replace(task, test=task.test.select([]))
    with pytest.raises(InputError, match="no test rows to evaluate on"):
        preflight.check_rows(model, tokenizer, empty, args(tmp_path), EvaluationConfig(prompts=2, before=False))


ROWS = st.lists(st.sampled_from("abcdef"), max_size=6)


@given(before=ROWS, now=ROWS)
def test_other_rows_or_another_order_are_told_apart_with_the_first_that_differs(
    tmp_path_factory: pytest.TempPathFactory, before: list[str], now: list[str]
) -> None:
    run = tmp_path_factory.mktemp("run")
    (run / INPUTS).write_text(json.dumps({"training rows": before}), encoding="utf-8")
    if before == now:
        preflight.compare_inputs(run, {"training rows": now})
        return
    first = next((i for i in range(len(before)) if before[: i + 1] != now[: i + 1]), len(before))
    with pytest.raises(RunDirectoryError, match=rf"have changed since: training rows .*the first is row {first}\)"):
        preflight.compare_inputs(run, {"training rows": now})


def changed_inputs(spoil: Callable[[Any, Any], None]) -> tuple[Any, Any]:
    task = load_task(DataConfig(ledger=LedgerConfig(train_size=4, test_size=1)))
    model, tokenizer = load_policy(ModelConfig("ledger"))
    before = preflight.inputs_of(model, tokenizer, task)
    spoil(model, tokenizer)
    return before, preflight.inputs_of(model, tokenizer, task)


def other_weights(model: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        list(model.parameters())[3].mul_(1.001)


def other_configuration(model: Any, tokenizer: Any) -> None:
    model.config.rms_norm_eps *= 2


def other_template(model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages }}"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_weights, r"base model \(model\.layers\.0\.\S+\)"),
        (other_configuration, r"base model \(config\.json\)"),
        (other_template, r"tokenizer \(chat template\)"),
    ],
)
def test_another_policy_under_the_same_name_is_told_apart(
    tmp_path: Path, spoil: Callable[[Any, Any], None], message: str
) -> None:
    before, now = changed_inputs(spoil)
    (tmp_path / INPUTS).write_text(json.dumps(before), encoding="utf-8")
    preflight.compare_inputs(tmp_path, before)
    with pytest.raises(RunDirectoryError, match=message):
        preflight.compare_inputs(tmp_path, now)


def test_a_run_is_not_resumed_on_rows_that_have_changed_under_their_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = byte_level_tokenizer()
    llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = write_gsm8k(tmp_path / "rows.jsonl")
    command = ["train", "--config", "gsm8k", *QUICK, "--gradient-checkpointing", "false", "--data.path", str(data)]
    command += ["--model.name", str(tmp_path / "model"), "--output_dir", str(tmp_path / "run")]
    assert main([*command, "--max_steps", "2"]) == 0
    write_gsm8k(data, [PROBLEMS[0], *PROBLEMS[:0:-1]])
    assert main([*command, "--max_steps", "4", "--resume"]) == 2
    assert "have changed since: training rows (" in capsys.readouterr().err
    write_gsm8k(data)
    assert main([*command, "--max_steps", "4", "--resume"]) == 0


def test_a_checkpoint_that_cannot_be_saved_again_trains_no_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(CHECKPOINT, tmp_path / "model", copy_function=shutil.copyfile)
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.9, "top_p": 0.6}), encoding="utf-8")
    command = ["train", "--config", "ledger", *QUICK, "--data.ledger.train_size", "4", "--max_steps", "2"]
    status = main([*command, "--model.name", str(tmp_path / "model"), "--output_dir", str(tmp_path / "run")])
    printed = capsys.readouterr().err
    # Saved, or refused before the first step.
    assert (status == 0) == (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert status == 0 or "step 1/2" not in printed


def test_a_model_that_the_saliency_cannot_read_is_refused_before_anything_is_generated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(model: Any) -> None:
        raise ValueError("TinyForCausalLM ignores key_bias")

    monkeypatch.setattr(preflight, "check_model", refuse)
    monkeypatch.setattr(preflight, "is_whole", lambda model: True)
    with pytest.raises(InputError, match="TinyForCausalLM ignores key_bias; or set saliency_weight: 0"):
        preflight.check_support(torch.nn.Identity(), SimpleNamespace(scores_tokens=True))
    preflight.check_support(torch.nn.Identity(), SimpleNamespace(scores_tokens=False))


def test_a_page_is_tried_with_the_first_batch_and_kept_where_it_is_due(tmp_path: Path) -> None:
    taken: list[int] = []

    def sampled() -> Run:
        taken.append(len(taken))
        return run(rollout())

    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    pages = RolloutPages(sampled, every=3)
    for step in range(1, 7):
        pages.on_step_end(arguments, TrainerState(global_step=step, is_world_process_zero=True), TrainerControl())
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == ["step-3.html", "step-6.html"]
    assert len(taken) == 3


def test_a_page_that_cannot_be_written_stops_a_run_at_its_first_step(tmp_path: Path) -> None:
    (tmp_path / "rollouts").write_text("", encoding="utf-8")
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    state = TrainerState(global_step=1, is_world_process_zero=True)
    with pytest.raises(OSError, match="rollouts"):
        RolloutPages(lambda: run(rollout()), every=50).on_step_end(arguments, state, TrainerControl())


def test_a_file_in_place_of_a_directory_is_found_before_a_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--config", "ledger", *QUICK, "--data.ledger.train_size", "4", "--output_dir", str(tmp_path)]
    (tmp_path / "config.yaml").write_text(load_recipe("ledger", parse_overrides(command[3:])).to_yaml())
    (tmp_path / "rollouts").write_text("", encoding="utf-8")
    assert main([*command, "--resume"]) == 2
    assert "rollouts is a file, and the run writes a directory of that name" in capsys.readouterr().err
