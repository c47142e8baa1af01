"""``atmanrl evaluate``: one or several checkpoints on the same held-out prompts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atmanrl.config import Dtype
from atmanrl.errors import explained_without_training
from atmanrl.evaluation.comparison import write_comparison, write_single
from atmanrl.evaluation.evaluate import evaluate
from atmanrl.evaluation.records import Run
from atmanrl.evaluation.scoring import with_deletion_effects, with_faithfulness
from atmanrl.generation import GenerationSettings
from atmanrl.models import load_policy
from atmanrl.saliency.estimators import Estimator
from atmanrl.settings import Settings, estimator_from
from atmanrl.tasks import Task, load_task
from atmanrl.training.config import load_recipe

Policy = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@explained_without_training("evaluation", "checkpoints evaluated before this one have their files")
def evaluate_command(
    config: str,
    overrides: Sequence[tuple[str, str]] = (),
    *,
    checkpoints: Sequence[str] = (),
    output: Path = Path("runs/evaluation"),
    faithfulness: bool = False,
    initial_model: str | None = None,
) -> int:
    """Evaluate checkpoints by a recipe's data, evaluation and mask sections, and return the exit status.

    Writes ``<label>.json`` per checkpoint, and the report: of the one checkpoint, of both side by side, or, with more,
    of each later one against the first in ``<label>/``.

    Args:
        config: a recipe or a run's ``config.yaml``.
        overrides: see `load_recipe`.
        checkpoints: directories, hub ids or "ledger"; the recipe's model where none is given.
        output: directory the results go to.
        faithfulness: also intervene on every chain of thought: see `atmanrl.evaluation.scoring`.
        initial_model: also intervene with this model as the reader of every checkpoint's chains of thought, measures
            named "initial ...": what changed in the chains is then told apart from what changed in the reader.

    Raises:
        ValueError: for a recipe, data or a checkpoint that cannot be used.
    """
    recipe = load_recipe(config, overrides)
    if not recipe.evaluation.prompts:
        raise ValueError(f"{recipe.source}: evaluation.prompts is 0; pass --evaluation.prompts N")
    if initial_model is not None and not faithfulness:
        raise ValueError("--initial-model takes part in --faithfulness only")
    estimator = estimator_from(recipe.values["saliency_estimator"], recipe)
    names = list(checkpoints) or [recipe.model.name]
    named = list(zip(names, labels(names), strict=True))
    task = load_task(recipe.data)
    reader = None if initial_model is None else _load(recipe, initial_model)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {output} cannot be made: {error}") from error
    runs = []
    for name, label in named:
        run = _evaluate(recipe, task, name, label, estimator, faithfulness, reader)
        run.save(output / f"{label}.json")
        runs.append(run)
    console = Console(highlight=False)
    if len(runs) == 1:
        write_single(output, runs[0], title=f"{runs[0].label} on {task.name}", console=console)
    for after in runs[1:]:
        folder = output if len(runs) == 2 else output / after.label
        title = f"{runs[0].label} and {after.label} on {task.name}"
        write_comparison(folder, runs[0], after, title=title, console=console)
    console.print(f"written: {output}", markup=False)
    return 0


def labels(names: Sequence[str]) -> list[str]:
    """A short distinct name per checkpoint: as many trailing parts of its path as it takes, joined by "-"."""
    parts = [Path(name).parts for name in names]
    if len(set(parts)) < len(parts):
        raise ValueError(f"a checkpoint is named twice: {', '.join(names)}")
    for length in range(1, max(map(len, parts)) + 1):
        short = ["-".join(part.strip("/") for part in path[-length:]).strip("-") for path in parts]
        if len(set(short)) == len(short):
            return short
    return [f"{i + 1}-{name}" for i, name in enumerate(short)]


def _dtype(recipe: Settings) -> Dtype:
    """What the recipe's training computes in; a CPU has no use for half precision."""
    half = recipe.values["bf16"] and torch.cuda.is_available()
    return "bfloat16" if half else recipe.model.dtype


def _load(recipe: Settings, name: str) -> Policy:
    # A revision is one of the recipe's own model.
    revision = recipe.model.revision if name == recipe.model.name else None
    return load_policy(replace(recipe.model, name=name, revision=revision, dtype=_dtype(recipe)))


def _evaluate(
    recipe: Settings, task: Task, name: str, label: str, estimator: Estimator, faithfulness: bool, reader: Policy | None
) -> Run:
    section = recipe.evaluation
    model, tokenizer = _load(recipe, name)
    if reader is not None and reader[1].get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{name} and the initial model have different vocabularies: no chain can be read by both")
    limit = recipe.values["max_completion_length"]
    generation = GenerationSettings(
        temperature=section.temperature, samples=section.samples, batch_size=section.batch_size
    )
    run = evaluate(
        model,
        tokenizer,
        task,
        task.test.select(range(min(section.prompts, len(task.test)))),
        label=label,
        generation=generation if limit is None else replace(generation, max_new_tokens=limit),
        estimator=estimator,
        saliency=section.saliency,
        chat_template_kwargs=recipe.values["chat_template_kwargs"],
        seed=section.seed,
        settings={"model": name},
        progress=sys.stderr.isatty(),
    )
    if faithfulness:
        run = with_faithfulness(model, tokenizer, with_deletion_effects(model, run), seed=section.seed)
    if reader is not None:
        run = with_faithfulness(*reader, run, seed=section.seed, prefix="initial_")
    return run
