"""The benchmark of one update runs the trainer's own work, at any shape, and belongs to `make gpu`."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig

from benchmarks import gpu, update
from benchmarks.device import Device

TINY = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("lora", [0, 4])
def test_an_update_times_its_three_parts_and_optimises_every_mask(lora: int) -> None:
    sizes = {"queries": 1, "prompt": 8, "completion": 12, "mask_steps": 20, "lora": lora}
    measured = update.run(LlamaConfig(**TINY), torch.device("cpu"), **sizes)
    assert set(measured["seconds"]) == {"generation", "saliency", "update"}
    assert all(seconds > 0 for seconds in measured["seconds"].values())
    assert measured["rollouts"] == 8
    assert all(map(math.isfinite, measured["mask_loss"]))
    assert measured["mask_loss"][0] != measured["mask_loss"][1]


def test_make_gpu_runs_the_update_with_all_weights_and_with_adapters() -> None:
    commands = {stage.name: " ".join(stage.command) for stage in gpu.stages(Device())}
    assert commands["update"].endswith("benchmarks.update")
    assert commands["update, LoRA"].endswith("benchmarks.update --lora 16")
    assert "benchmarks.masks" in commands["mask steps"]
