"""Short runs of the trainer on Ledger, for tests that compare what they log and learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from atmanrl import MaskConfig
from atmanrl.config import DataConfig, LedgerConfig, ModelConfig
from atmanrl.models import load_policy
from atmanrl.tasks import Task, load_task
from atmanrl.training.trainer import AtManGRPOConfig, AtManGRPOTrainer

FEW_STEPS = MaskConfig(steps=3, lr=0.02)


def settings(directory: Path, **overrides: Any) -> dict[str, Any]:
    """Two queries of four rollouts, used twice; what both trainers are given."""
    return {
        "output_dir": str(directory),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "num_iterations": 2,
        "max_completion_length": 24,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "scale_rewards": "none",
        "loss_type": "grpo",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **overrides,
    }


def longer_ledger() -> Task:
    """Prompts longer than those of pre-training, most of whose groups hold right and wrong answers."""
    return load_task(DataConfig(ledger=LedgerConfig(pairs=8, train_size=4, test_size=2)))


class Losses(TrainerCallback):
    """Every number that was logged, without times."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "train_runtime" not in logs:
            self.lines.append({name: value for name, value in logs.items() if name != "step_time"})


def train(task: Task, directory: Path, **overrides: Any) -> tuple[AtManGRPOTrainer, list[dict[str, float]]]:
    model, tokenizer = load_policy(ModelConfig("ledger"))
    losses = Losses()
    args = AtManGRPOConfig(**settings(directory, **{"mask": FEW_STEPS, **overrides}))
    trainer = AtManGRPOTrainer(model, args, task, tokenizer, callbacks=[losses])
    trainer.train()
    return trainer, losses.lines
