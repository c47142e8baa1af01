"""Held-out evaluation: completions, answers and saliency of one model on a task's rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atmanrl.chat import encode_prompt
from atmanrl.config import MaskConfig
from atmanrl.evaluation.recording import Completion, record, score_name
from atmanrl.evaluation.records import Run
from atmanrl.generation import GenerationSettings, generate
from atmanrl.saliency.estimators import Estimator, Mask, make_estimator
from atmanrl.tasks import Task


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Iterable[Mapping[str, Any]] | None = None,
    *,
    label: str,
    generation: GenerationSettings | None = None,
    mask: MaskConfig | None = None,
    estimator: str | Estimator = "mask",
    saliency: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Run:
    """Completions of held-out rows with their answers graded and their chains of thought scored.

    Runs with equal rows, generation settings and seed are paired by `atmanrl.evaluation.summary.compare`.

    Args:
        model: any Hugging Face causal model; masks are optimised on it, frozen.
        tokenizer: its tokenizer.
        task: how answers are read, and token classes where the task knows them.
        rows: rows with "prompt" and "answer"; the task's test rows where None.
        label: what a reader calls this run.
        generation: how completions are drawn; see `GenerationSettings` for the defaults.
        mask: how masks are optimised; the paper's numbers where None.
        estimator: what scores the tokens: one of `atmanrl.ESTIMATORS`, "best", or an estimator itself.
        saliency: whether they are scored at all.
        chat_template_kwargs: see `encode_prompt`; those of the training, whose prompts are other ones without them.
        seed: of the sampling.
        settings: what else to write into the run's settings, such as the model's name.
        progress: show progress bars on stderr.

    Raises:
        ValueError: for no rows, a prompt that does not fit the model's context, or an unreadable gold answer.
    """
    rows = list(task.test if rows is None else rows)
    if not rows:
        raise ValueError(f"no rows of task {task.name!r} to evaluate on")
    generation = generation or GenerationSettings()
    scorer = make_estimator(estimator, mask=mask) if isinstance(estimator, str) else estimator
    prompts = [encode_prompt(tokenizer, row["prompt"], chat_template_kwargs) for row in rows]
    sampled = generate(model, tokenizer, prompts, generation, seed=seed, progress=progress)
    completions = [
        Completion(
            prompt_id=f"{task.name}-{i}",
            sample=sample,
            prompt_ids=prompts[i],
            completion_ids=ids,
            answer_format=task.answer_format,
            expected=row["answer"],
            classify=None if task.classify_tokens is None else partial(task.classify_tokens, row),
        )
        for i, row in enumerate(rows)
        for sample, ids in enumerate(sampled[i])
    ]
    records = record(model, tokenizer, completions, estimator=scorer if saliency else None, progress=progress)
    return Run(
        label=label,
        rollouts=tuple(records),
        score=score_name(scorer.name),
        settings={
            **(settings or {}),
            "task": task.name,
            "generation": asdict(generation),
            "mask": asdict(scorer.config) if saliency and isinstance(scorer, Mask) else None,
            "seed": seed,
        },
    )
