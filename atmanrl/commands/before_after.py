"""Held-out evaluation on both sides of a training run, and the report that compares them."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atmanrl.data import Task
from atmanrl.recipe import EvaluationConfig
from atmanrl.trainer import AtManGRPOConfig


class BeforeAfter:
    """Evaluates the policy before and after training on the same prompts, with the same seed."""

    def __init__(
        self,
        config: EvaluationConfig,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        args: AtManGRPOConfig,
        run: Path,
    ) -> None:
        self.config = config

    def before(self, model: PreTrainedModel) -> None:
        """Evaluate the untrained policy, or read what a stopped run measured."""

    def after(self, model: PreTrainedModel) -> None:
        """Evaluate the trained policy and write the comparison."""
