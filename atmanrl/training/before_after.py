"""Held-out evaluation on both sides of a training run, and the report that compares them."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atmanrl.evaluation.compare import write_comparison
from atmanrl.evaluation.evaluate import evaluate
from atmanrl.evaluation.records import Run
from atmanrl.generation import GenerationSettings
from atmanrl.models import computing_dtype, load_policy, plain
from atmanrl.recipe import Recipe
from atmanrl.tasks import Task
from atmanrl.training.trainer import AtManGRPOConfig

BEFORE, AFTER = "before.json", "after.json"


class BeforeAfter:
    """Evaluates the policy before and after training on the same prompts, with the same seed, in one process.

    Args:
        recipe: its ``evaluation`` section says how; 0 prompts turn everything off.
        args: masks are optimised as in training.
        task: its test rows are the prompts.
        tokenizer: the policy's.
        run: directory the results go to.
    """

    def __init__(
        self, recipe: Recipe, args: AtManGRPOConfig, task: Task, tokenizer: PreTrainedTokenizerBase, run: Path
    ) -> None:
        self.recipe = recipe
        self.args = args
        self.task = task
        self.tokenizer = tokenizer
        self.run = run

    def before(self, model: PreTrainedModel) -> None:
        """Evaluate the untrained policy, unless a stopped run has done so already."""
        if self._wants_before():
            self._evaluate(model, "before").save(self.run / BEFORE)

    def after(self, model: PreTrainedModel, console: Console) -> None:
        """Evaluate the trained policy; with an evaluation before, print and write the comparison."""
        config = self.recipe.evaluation
        if not config.prompts:
            return
        if self._wants_before():
            # Several processes train: none waited for this one to evaluate.
            self.before(load_policy(self.recipe.model)[0])
        after = self._evaluate(model, "after")
        after.save(self.run / AFTER)
        if config.before:
            before = Run.load(self.run / BEFORE)
            write_comparison(self.run, before, after, title=f"AtManRL on {self.task.name}", console=console)

    def _wants_before(self) -> bool:
        config = self.recipe.evaluation
        return config.prompts > 0 and config.before and not (self.run / BEFORE).is_file()

    def _evaluate(self, model: PreTrainedModel, label: str) -> Run:
        config = self.recipe.evaluation
        return evaluate(
            plain(model, computing_dtype(model, bf16=bool(self.args.bf16))),
            self.tokenizer,
            self.task,
            self.task.test.select(range(min(config.prompts, len(self.task.test)))),
            label=label,
            generation=GenerationSettings(
                max_new_tokens=self.args.max_completion_length,
                temperature=config.temperature,
                samples=config.samples,
                batch_size=config.batch_size,
            ),
            mask=self.args.mask,
            estimator=self.args.saliency_estimator,
            saliency=config.saliency,
            chat_template_kwargs=self.args.chat_template_kwargs,
            seed=config.seed,
            settings={"model": self.recipe.model.name},
            progress=sys.stderr.isatty(),
        )
