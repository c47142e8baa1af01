"""Two processes over gloo compute what one computes, whole and sharded; the launcher's configurations are whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from atmanrl.chat import encode_prompt
from atmanrl.config import DataConfig, LedgerConfig
from atmanrl.data import load_task
from atmanrl.generation import GenerationSettings, generate
from atmanrl.policy import load_policy
from atmanrl.recipe import RECIPES, ModelConfig
from tests.atmanrl.replay import BATCHES, GROUP, QUERIES

ROOT = Path(__file__).parents[2]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# "resumed" goes on from the first checkpoint of "fsdp2".
LAUNCHES = {"one": [sys.executable], "ddp": TWO, "fsdp2": TWO, "resumed": TWO}


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


def replayed(launch: list[str], recorded: Path, directory: Path, mode: str) -> subprocess.CompletedProcess[str]:
    command = [*launch, str(ROOT / "tests" / "atmanrl" / "replay.py"), str(recorded), str(directory), mode]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, timeout=240, capture_output=True, text=True)


@pytest.fixture(scope="module")
def runs(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("replayed")
    results = {}
    for mode, launch in LAUNCHES.items():
        done = replayed(launch, recorded, directory, mode)
        if done.returncode:
            pytest.fail(f"{mode}: status {done.returncode}\n{done.stderr[-8000:]}", pytrace=False)
        results[mode] = torch.load(directory / f"{mode}.pt")
    return results


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
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
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_processes_log_the_metrics_of_one(runs: dict[str, dict[str, Any]], mode: str) -> None:
    ours = [
        name for line in runs["one"]["metrics"] for name in line if name.split("/")[0] in ("answers", "cot", "mask")
    ]
    assert {"answers/accuracy", "mask/restored/filler", "mask/loss_final"} <= set(ours)
    for line, expected in zip(runs[mode]["metrics"], runs["one"]["metrics"], strict=True):
        for name in (*ours, "reward", "frac_reward_zero_std", "completions/clipped_ratio"):
            assert line[name] == pytest.approx(expected[name], abs=1e-5), name


@pytest.mark.slow
def test_a_resumed_sharded_run_ends_bit_for_bit_the_same(runs: dict[str, dict[str, Any]]) -> None:
    whole, resumed = runs["fsdp2"], runs["resumed"]
    assert resumed["rewards"] == whole["rewards"][1:]
    for name, parameter in whole["parameters"].items():
        assert torch.equal(resumed["parameters"][name], parameter), name


@pytest.mark.slow
def test_a_loss_of_sharded_weights_that_is_not_finite_ends_all_processes(recorded: Path, tmp_path: Path) -> None:
    done = replayed(TWO, recorded, tmp_path, "broken")
    assert done.returncode != 0
    assert "skip_non_finite cannot leave out a loss of sharded weights" in done.stderr
    assert (tmp_path / "broken" / "non_finite" / "step-1-process-1.json").is_file()


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_launch_configuration_is_one_that_accelerate_reads(path: Path) -> None:
    config = load_config_from_file(str(path))
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}
    assert config.distributed_type == kind[path.stem]
    # Anything else would override the recipe's own precision.
    assert yaml.safe_load(path.read_text())["mixed_precision"] == "no"
