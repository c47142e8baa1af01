"""Two processes over gloo compute what one computes, whole and sharded; the launcher's configurations are whole."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from atmanrl.config import DataConfig, LedgerConfig, ModelConfig
from atmanrl.generation import GenerationSettings, generate
from atmanrl.models import encode_prompt, load_policy
from atmanrl.recipe import RECIPES
from atmanrl.tasks import load_task
from tests.atmanrl.launch import TWO, run_to_its_end
from tests.atmanrl.replay import BATCHES, GROUP, QUERIES

ROOT = Path(__file__).parents[2]
SHARDED = ("fsdp2", "zero2", "zero3")
MODES = ("one", "ddp", *SHARDED, *(f"{mode}-resumed" for mode in SHARDED))
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not installed")
ZERO = [pytest.param(mode, marks=needs_deepspeed) for mode in ("zero2", "zero3")]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    # DeepSpeed compiles an operator with ninja when it first runs on CPUs.
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "DS_ACCELERATOR": "cpu",
}


def zero_environment(directory: Path, stage: int) -> dict[str, str]:
    """What `accelerate launch` tells its processes, with a configuration that shards the smallest parameter as well."""
    optimization = {"stage": stage, "stage3_param_persistence_threshold": 0}
    counts = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    configuration = directory / f"zero{stage}.json"
    configuration.write_text(json.dumps({**dict.fromkeys(counts, "auto"), "zero_optimization": optimization}))
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(configuration),
        "CUDA_VISIBLE_DEVICES": "",
    }


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Completions of the prompts that `replay` trains on."""
    path = tmp_path_factory.mktemp("recorded") / "completions.json"
    model, tokenizer = load_policy(ModelConfig("ledger"))
    task = load_task(DataConfig(ledger=LedgerConfig(train_size=QUERIES * BATCHES, test_size=1)))
    prompts = [row["prompt"] for row in task.train]
    settings = GenerationSettings(max_new_tokens=24, samples=GROUP)
    sampled = generate(model, tokenizer, [encode_prompt(tokenizer, prompt) for prompt in prompts], settings, seed=0)
    path.write_text(json.dumps(dict(zip(prompts, sampled, strict=True))))
    return path


def replayed(recorded: Path, directory: Path, mode: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable] if mode == "one" else TWO
    command = [*launch, str(ROOT / "tests" / "atmanrl" / "replay.py"), str(recorded), str(directory), mode]
    kind = mode.partition("-")[0]
    zero = zero_environment(directory, int(kind.removeprefix("zero"))) if kind.startswith("zero") else {}
    return run_to_its_end(command, ENVIRONMENT | zero)


@pytest.fixture(scope="module")
def runs(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("replayed")
    results = {}
    for mode in MODES:
        if mode.startswith("zero") and not HAS_DEEPSPEED:
            continue
        done = replayed(recorded, directory, mode)
        if done.returncode:
            pytest.fail(f"{mode}: status {done.returncode}\n{done.stderr[-8000:]}", pytrace=False)
        results[mode] = torch.load(directory / f"{mode}.pt")
    return results


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2", *ZERO])
def test_two_processes_give_the_rewards_and_parameters_of_one(runs: dict[str, dict[str, Any]], mode: str) -> None:
    one, two = runs["one"], runs[mode]
    rewards = torch.tensor(one["rewards"])
    assert rewards.shape == (BATCHES, QUERIES * GROUP, 2)
    assert rewards[..., 1].std() > 0.01
    # The second batch is scored by a policy that has been updated.
    torch.testing.assert_close(torch.tensor(two["rewards"]), rewards, atol=1e-5, rtol=0)
    start, _ = load_policy(ModelConfig("ledger"))
    differences = [one["parameters"][name] - p.detach() for name, p in start.named_parameters()]
    moved = max(float(difference.abs().max()) for difference in differences)
    assert moved > 1e-3
    for name, parameter in one["parameters"].items():
        torch.testing.assert_close(two["parameters"][name], parameter, atol=1e-3 * moved, rtol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2", *ZERO])
def test_two_processes_log_the_metrics_of_one(runs: dict[str, dict[str, Any]], mode: str) -> None:
    ours = [
        name for line in runs["one"]["metrics"] for name in line if name.split("/")[0] in ("answers", "cot", "mask")
    ]
    assert {"answers/accuracy", "mask/restored/filler", "mask/loss_final"} <= set(ours)
    for line, expected in zip(runs[mode]["metrics"], runs["one"]["metrics"], strict=True):
        for name in (*ours, "reward", "frac_reward_zero_std", "completions/clipped_ratio"):
            assert line[name] == pytest.approx(expected[name], abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fsdp2", *ZERO])
def test_a_resumed_sharded_run_ends_bit_for_bit_the_same(runs: dict[str, dict[str, Any]], mode: str) -> None:
    whole, resumed = runs[mode], runs[f"{mode}-resumed"]
    assert resumed["rewards"] == whole["rewards"][1:]
    for name, parameter in whole["parameters"].items():
        assert torch.equal(resumed["parameters"][name], parameter), name


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fsdp2", *ZERO])
def test_a_sharded_loss_that_is_not_finite_ends_all_processes(recorded: Path, tmp_path: Path, mode: str) -> None:
    done = replayed(recorded, tmp_path, f"{mode}-broken")
    assert done.returncode != 0
    assert "skip_non_finite cannot leave out a loss under FSDP or DeepSpeed" in done.stderr
    assert (tmp_path / f"{mode}-broken" / "non_finite" / "step-1-process-1.json").is_file()


def train_with_deepspeed(launch: list[str], run: Path, environment: dict[str, str], *overrides: str) -> None:
    command = [
        *(*launch, "-m", "atmanrl", "train", "--config", "ledger", "--output_dir", str(run), "--ddp_backend", "gloo"),
        *("--data.ledger.train_size", "8", "--per_device_train_batch_size", "4", "--num_generations", "4"),
        *("--max_steps", "2", "--mask.steps", "3", "--learning_rate", "1e-3", "--report_to", "none", *overrides),
    ]
    done = run_to_its_end(command, ENVIRONMENT | environment)
    assert done.returncode == 0, done.stderr[-8000:]


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_launched_with_deepspeed_ends_with_its_whole_model_and_its_evaluation(stage: int, tmp_path: Path) -> None:
    run, launcher = tmp_path / "run", RECIPES / "accelerate" / f"deepspeed_zero{stage}.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launcher)]
    launch += ["--num_processes", "2", "--main_process_port", "0"]
    evaluated = ("--evaluation.prompts", "4", "--evaluation.samples", "1")
    train_with_deepspeed(launch, run, {"CUDA_VISIBLE_DEVICES": ""}, *evaluated)
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))
    models = (ModelConfig("ledger"), ModelConfig(str(run / "model")), ModelConfig(str(run / "checkpoint-2")))
    start, saved, gathered = (load_policy(each)[0].state_dict() for each in models)
    assert max(float((saved[name] - parameter).abs().max()) for name, parameter in start.items()) > 1e-3
    # DeepSpeed has gathered the weights of the checkpoint.
    for name, parameter in saved.items():
        assert torch.equal(gathered[name], parameter), name


@pytest.mark.slow
@needs_deepspeed
def test_adapters_trained_with_zero3_are_merged_into_the_saved_model(tmp_path: Path) -> None:
    run, adapted = tmp_path / "run", ("--model.lora.rank", "4", "--evaluation.prompts", "0", "--save_strategy", "no")
    train_with_deepspeed(TWO, run, zero_environment(tmp_path, 3), *adapted)
    start, _ = load_policy(ModelConfig("ledger"))
    before = {name: parameter.clone() for name, parameter in start.state_dict().items()}
    expected = peft.PeftModel.from_pretrained(start, run / "adapter").merge_and_unload().state_dict()
    saved = load_policy(ModelConfig(str(run / "model")))[0].state_dict()
    assert max(float((saved[name] - parameter).abs().max()) for name, parameter in before.items()) > 1e-4
    for name, parameter in saved.items():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_launch_configuration_is_one_that_accelerate_reads(path: Path) -> None:
    config = load_config_from_file(str(path))
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}
    assert config.distributed_type == kind[path.stem]
    # Anything else would override the recipe's own precision.
    assert yaml.safe_load(path.read_text())["mixed_precision"] == "no"
