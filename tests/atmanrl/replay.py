"""A short training run on recorded completions, in one process or two, or its rest; `test_distributed` runs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from trl import GRPOTrainer

from atmanrl import MaskConfig
from atmanrl.config import CreditConfig, DataConfig, LedgerConfig, ModelConfig
from atmanrl.models import encode_prompt, load_policy, plain_copy
from atmanrl.tasks import load_task
from atmanrl.training.run import part_from_others
from atmanrl.training.trainer import AtManGRPOConfig, AtManGRPOTrainer

GROUP, QUERIES, PASSES, BATCHES = 4, 3, 2, 2


class Replay(AtManGRPOTrainer):
    """Keeps the rewards of every generation batch, those of all processes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rewards: list[list[list[float]]] = []

    def _calculate_rewards(self, *args: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(*args)
        self.rewards.append(rewards.tolist())
        return rewards


def shard_on_cpus() -> None:
    """Let accelerate use FSDP2 without an accelerator, which it has no setting for."""
    initialise = AcceleratorState.__init__

    def patched(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
        )

    AcceleratorState.__init__ = patched  # type: ignore[method-assign]


def break_a_loss() -> None:
    """Make the losses of the second process NaN."""
    plain = GRPOTrainer._compute_loss

    def broken(self: GRPOTrainer, *args: Any) -> torch.Tensor:
        loss: torch.Tensor = plain(self, *args)
        return loss * torch.nan if self.accelerator.process_index == 1 else loss

    GRPOTrainer._compute_loss = broken  # type: ignore[method-assign]


def main(recorded: Path, output: Path, mode: str) -> None:
    completions: dict[str, list[list[int]]] = json.loads(recorded.read_text())
    kind, _, part = mode.partition("-")
    sharded, deepspeed = kind not in ("one", "ddp"), kind.startswith("zero")
    if kind == "fsdp2":
        shard_on_cpus()
    if part == "broken":
        break_a_loss()
    micro_batch = GROUP * QUERIES // 2
    args = AtManGRPOConfig(
        output_dir=str(output / mode),
        per_device_train_batch_size=micro_batch,
        generation_batch_size=GROUP * QUERIES,
        gradient_accumulation_steps=2 if mode == "one" else 1,
        num_generations=GROUP,
        num_iterations=PASSES,
        max_steps=PASSES * BATCHES,
        max_completion_length=24,
        # The step of an adaptive optimiser turns rounding of a small gradient into a large difference.
        optim="sgd",
        learning_rate=0.5,
        mask=MaskConfig(steps=5, lr=0.02),
        # Its heads are ranked over the responses of all processes.
        credit_assignment=CreditConfig(strategy="local", gain=3.0),
        skip_non_finite=part == "broken",
        save_strategy="steps" if sharded and not part else "no",
        save_steps=PASSES,
        report_to="none",
        # With it accelerate ignores DeepSpeed; without it, it joins processes by what it is told.
        use_cpu=not deepspeed,
        ddp_backend="gloo" if deepspeed else None,
        bf16=False,
        disable_tqdm=True,
        seed=5,
    )
    model, tokenizer = load_policy(ModelConfig("ledger"))

    def replay(prompts: list[str], trainer: AtManGRPOTrainer) -> dict[str, Any]:
        # Groups straddle the border between the processes.
        first = trainer.accelerator.process_index * len(prompts)
        return {
            "prompt_ids": [encode_prompt(tokenizer, prompt) for prompt in prompts],
            "completion_ids": [completions[prompt][(first + i) % GROUP] for i, prompt in enumerate(prompts)],
            "logprobs": None,
        }

    task = load_task(DataConfig(ledger=LedgerConfig(train_size=QUERIES * BATCHES, test_size=1)))
    trainer = Replay(model, args, task, tokenizer, rollout_func=replay)
    # Of the sharded run, its second batch again.
    trainer.train(resume_from_checkpoint=str(output / kind / f"checkpoint-{PASSES}") if part == "resumed" else None)
    whole = plain_copy(trainer.accelerator.unwrap_model(trainer.model), torch.float32)
    parameters = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    if trainer.accelerator.is_main_process:
        metrics = [line for line in trainer.state.log_history if "reward" in line]
        torch.save({"rewards": trainer.rewards, "parameters": parameters, "metrics": metrics}, output / f"{mode}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    part_from_others()
