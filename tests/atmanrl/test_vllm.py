"""Sampling through TRL's vLLM seam, with an engine in vLLM's place that decodes with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.grpo_trainer
from transformers import PreTrainedModel

from atmanrl import MaskConfig
from atmanrl.config import DataConfig, LedgerConfig, ModelConfig
from atmanrl.generation import GenerationSettings, generate
from atmanrl.models import load_policy
from atmanrl.tasks import load_task
from atmanrl.training.config import load_recipe
from atmanrl.training.trainer import AtManGRPOConfig, AtManGRPOTrainer


class Engine:
    """Samples from the policy itself, and says with which log-probabilities."""

    made: list[Engine]

    def __init__(self, model: PreTrainedModel, processing_class: Any, **settings: Any) -> None:
        self.model, self.tokenizer, self.settings = model, processing_class, settings
        self.synced = 0
        self.vllm_client = self
        Engine.made.append(self)

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def sync_weights(self) -> None:
        self.synced += 1

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], **others: Any) -> tuple[None, list[list[int]], Any, None]:
        settings = GenerationSettings(max_new_tokens=self.settings["max_completion_length"])
        sampled = [row for (row,) in generate(self.model, self.tokenizer, prompts, settings, seed=self.synced)]
        logprobs = []
        for prompt, completion in zip(prompts, sampled, strict=True):
            logits: Any = self.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            chosen = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])
            logprobs.append(chosen.tolist())
        return None, sampled, logprobs, None


@pytest.mark.parametrize("name", ["gsm8k_vllm_colocate", "gsm8k_vllm_server"])
def test_rollouts_from_an_engine_are_scored_and_its_weights_renewed_once_per_batch(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Engine.made = []
    monkeypatch.setattr(trl.trainer.grpo_trainer, "VLLMGeneration", Engine)
    keys = {key: value for key, value in load_recipe(name).values.items() if "vllm" in key}
    model, tokenizer = load_policy(ModelConfig("ledger"))
    args = AtManGRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        num_generations=4,
        max_steps=4,
        max_completion_length=24,
        learning_rate=1e-3,
        mask=MaskConfig(steps=2),
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        **keys,
    )
    task = load_task(DataConfig(ledger=LedgerConfig(train_size=4, test_size=1)))
    trainer = AtManGRPOTrainer(model, args, task, tokenizer)
    trainer.train()
    (engine,) = Engine.made
    # Two generation batches, each used for two optimiser steps.
    assert engine.synced == 2
    assert engine.settings["mode"] == keys["vllm_mode"]
    batches = [line for line in trainer.state.log_history if "rewards/saliency/mean" in line]
    assert len(batches) == 2
    assert all(line["rewards/saliency/mean"] > 0 for line in batches)
    # The ids that were scored are the ones that were sampled: the policy finds them as likely as the engine did.
    assert all(line["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3) for line in batches)
