"""Held-out evaluation: completions, answers and saliency of one model on a task's rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atmanrl.config import Dtype, MaskConfig, ModelConfig
from atmanrl.errors import explained_without_training
from atmanrl.evaluation.compare import REPORT, write_comparison, write_single
from atmanrl.evaluation.faithfulness import with_deletion_effects, with_faithfulness
from atmanrl.evaluation.recording import Completion, check_support, record, score_name, unusable
from atmanrl.evaluation.records import RolloutRecord, Run, check_writable
from atmanrl.generation import GenerationSettings, context_length, generate
from atmanrl.models import check_loads, encode_prompt, load_policy
from atmanrl.saliency import Estimator, Mask, make_estimator
from atmanrl.settings import Settings, estimator_from
from atmanrl.tasks import Task, load_task


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
    rescue: Callable[[Run], object] | None = None,
) -> Run:
    """Completions of held-out rows with their answers graded and their chains of thought scored.

    Runs with equal rows, generation settings and seed are paired by `atmanrl.evaluation.summary.compare`. A row that
    cannot be used (a column is missing, its gold answer cannot be read, its prompt does not fit) becomes a record
    without tokens whose ``skipped`` says why; summaries leave it out.

    Args:
        model: any Hugging Face causal model; masks are optimised on it, frozen.
        tokenizer: its tokenizer.
        task: how answers are read, and token classes where the task knows them.
        rows: rows with "prompt" and "answer"; the task's test rows where None.
        label: what a reader calls this run.
        generation: how completions are drawn; see `GenerationSettings` for the defaults.
        mask: how masks are optimised; the paper's numbers where None.
        estimator: the estimator of token scores: one of `atmanrl.ESTIMATORS`, "best", or an estimator itself.
        saliency: whether they are scored at all.
        chat_template_kwargs: see `encode_prompt`; those of the training, whose prompts are other ones without them.
        seed: of the sampling.
        settings: what else to write into the run's settings, such as the model's name.
        progress: show progress bars on stderr.
        rescue: called with what was recorded where an error ends the scoring; see `record`.

    Raises:
        ValueError: for no rows, none that can be used (with the first one's reason), or a model that the estimator
            cannot read; before anything is generated.
    """
    rows = list(task.test if rows is None else rows)
    if not rows:
        raise ValueError(f"no rows of task {task.name!r} to evaluate on")
    generation = generation or GenerationSettings()
    scorer = make_estimator(estimator, mask=mask) if isinstance(estimator, str) else estimator
    read = [_prompt_of(model, tokenizer, task, row, generation, chat_template_kwargs) for row in rows]
    prompts = {i: ids for i, ids in enumerate(read) if not isinstance(ids, str)}
    faults = {i: _placed(rows[i], i, reason) for i, reason in enumerate(read) if isinstance(reason, str)}
    if not prompts:
        raise ValueError(f"none of {len(rows)} rows of task {task.name!r} can be used; {faults[0]}")
    if saliency:
        check_support(model, scorer, next(iter(prompts.values()))[-1])
    drawn = generate(model, tokenizer, list(prompts.values()), generation, seed=seed, progress=progress)
    completions = [
        Completion(
            prompt_id=f"{task.name}-{i}",
            sample=sample,
            prompt_ids=prompts[i],
            completion_ids=ids,
            answer_format=task.answer_format,
            expected=rows[i]["answer"],
            classify=None if task.classify_tokens is None else partial(task.classify_tokens, rows[i]),
        )
        for i, samples in zip(prompts, drawn, strict=True)
        for sample, ids in enumerate(samples)
    ]
    skipped = [unusable(f"{task.name}-{i}", reason) for i, reason in faults.items()]

    def run_of(records: Sequence[RolloutRecord]) -> Run:
        return Run(
            label=label,
            rollouts=(*records, *skipped),
            score=score_name(scorer.name),
            settings={
                **(settings or {}),
                "task": task.name,
                "generation": asdict(generation),
                "mask": asdict(scorer.config) if saliency and isinstance(scorer, Mask) else None,
                "seed": seed,
            },
        )

    rescued = None if rescue is None else lambda records: rescue(run_of(records))
    records = record(
        model, tokenizer, completions, estimator=scorer if saliency else None, progress=progress, rescue=rescued
    )
    return run_of(records)


def _placed(row: Mapping[str, Any], index: int, reason: str) -> str:
    """Where the row stands, by file and line where it knows them, and what is wrong with it."""
    return f"{row['place']}: the row {reason}" if "place" in row else f"prompt {index} {reason}"


def _prompt_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    row: Mapping[str, Any],
    generation: GenerationSettings,
    template_kwargs: Mapping[str, Any] | None,
) -> list[int] | str:
    """Token ids of a row's prompt, or why the row cannot be used, to stand behind "the row" or "prompt 3"."""
    missing = [name for name in ("prompt", "answer") if row.get(name) is None]
    if missing:
        return f"lacks the column {', '.join(missing)}; found {', '.join(row) or 'none'}"
    if not isinstance(row["answer"], str) or task.answer_format.canonical(row["answer"]) is None:
        return f"has the gold answer {row['answer']!r}, which is not a {task.answer_format.kind}"
    try:
        ids = encode_prompt(tokenizer, row["prompt"], template_kwargs)
    except UNREADABLE as error:
        return f"cannot be encoded: {error}"
    return fault_of(model, ids, (), generation.max_new_tokens) or ids


UNREADABLE = (ValueError, TypeError, KeyError, TemplateError)
"""What a tokenizer or a chat template raises for a prompt that it cannot render."""


def fault_of(
    model: PreTrainedModel, prompt: Sequence[int], completion: Sequence[int] = (), max_new_tokens: int = 0
) -> str | None:
    """Why the model cannot read these token ids or write so many more, None where it can."""
    if not prompt:
        return "is empty"
    context, length = context_length(model), len(prompt) + len(completion)
    if length + max_new_tokens > context:
        written = f"; with max_new_tokens {max_new_tokens} that is {length + max_new_tokens}" if max_new_tokens else ""
        return f"has {length} tokens{written}, more than the model's context of {context}"
    entries = model.config.get_text_config(decoder=True).vocab_size
    highest = max((*prompt, *completion))
    if highest >= entries:
        return f"holds the token id {highest}; the model's vocabulary has {entries} entries"
    return None


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
        faithfulness: also intervene on every chain of thought: see `atmanrl.evaluation.faithfulness`.
        initial_model: also intervene with this model as the reader of every checkpoint's chains of thought, measures
            named "initial ...". This separates a change of the chains from a change of the reader.

    Raises:
        ValueError: for a recipe, data or a checkpoint that cannot be used.
    """
    # TRL takes seconds to load.
    from atmanrl.training.config import load_recipe

    recipe = load_recipe(config, overrides)
    if not recipe.evaluation.prompts:
        raise ValueError(f"{recipe.source}: evaluation.prompts is 0; pass --evaluation.prompts N")
    if initial_model is not None and not faithfulness:
        raise ValueError("--initial-model takes part in --faithfulness only")
    estimator = estimator_from(recipe.values["saliency_estimator"], recipe)
    _generation(recipe)
    names = list(checkpoints) or [recipe.model.name]
    named = list(zip(names, labels(names), strict=True))
    for name in names:
        check_name(name)
    task = load_task(recipe.data, leave_out=True)
    if not len(task.test) and task.left_out:
        raise ValueError(task.left_out[0])
    vocabularies = {name: check_loads(_model_of(recipe, name)).get_vocab() for name in names}
    if initial_model is not None:
        wanted = check_loads(_model_of(recipe, initial_model)).get_vocab()
        if other := next((name for name in names if vocabularies[name] != wanted), None):
            raise ValueError(f"{other} and the initial model have different vocabularies: no chain can be read by both")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {output} cannot be made: {error}") from error
    files = {label: output / f"{label}.json" for _, label in named}
    for path in [*files.values(), *(folder / name for folder in _folders(output, named) for name in REPORT)]:
        check_writable(path, "--output", made=True)
    reader = None if initial_model is None else load_policy(_model_of(recipe, initial_model))
    runs = [_evaluate(recipe, task, name, files[label], estimator, faithfulness, reader) for name, label in named]
    console = Console(highlight=False)
    if len(runs) == 1:
        write_single(output, runs[0], title=f"{runs[0].label} on {task.name}", console=console)
    for folder, after in zip(_folders(output, named), runs[1:], strict=False):
        title = f"{runs[0].label} and {after.label} on {task.name}"
        write_comparison(folder, runs[0], after, title=title, console=console)
    console.print(f"written: {output}", markup=False)
    return say_skipped(faults_of(runs))


def check_name(model: str) -> None:
    """Refuse a model's name that no file can hold: a path that is not UTF-8 would end the run when it is saved."""
    try:
        model.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the model's name {model!r} is not valid UTF-8") from error


def say_skipped(reasons: Iterable[str | None]) -> int:
    """Say on stderr why rows could not be used, each reason once, and return the exit status: 1 where there is one."""
    distinct = [reason for reason in dict.fromkeys(reasons) if reason is not None]
    for reason in distinct:
        print(f"skipped: {reason}", file=sys.stderr)
    return int(bool(distinct))


def faults_of(runs: Iterable[Run]) -> Iterator[str | None]:
    """Why rows of these runs could not be used."""
    return (item.skipped for run in runs for item in run.rollouts if item.unusable)


def _folders(output: Path, named: Sequence[tuple[str, str]]) -> list[Path]:
    """Where the reports go: of one or two checkpoints into ``output``, else one per checkpoint after the first."""
    return [output] if len(named) <= 2 else [output / label for _, label in named[1:]]


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
    """The compute dtype of the recipe's training. A CPU computes in the dtype of the parameters."""
    half = recipe.values["bf16"] and torch.cuda.is_available()
    return "bfloat16" if half else recipe.model.dtype


def _model_of(recipe: Settings, name: str) -> ModelConfig:
    # A revision is one of the recipe's own model.
    revision = recipe.model.revision if name == recipe.model.name else None
    return replace(recipe.model, name=name, revision=revision, dtype=_dtype(recipe))


def _generation(recipe: Settings) -> GenerationSettings:
    section, limit = recipe.evaluation, recipe.values["max_completion_length"]
    given = {} if limit is None else {"max_new_tokens": limit}
    return GenerationSettings(
        temperature=section.temperature, samples=section.samples, batch_size=section.batch_size, **given
    )


def _evaluate(
    recipe: Settings, task: Task, name: str, file: Path, estimator: Estimator, faithfulness: bool, reader: Policy | None
) -> Run:
    """One checkpoint's run, saved in ``file`` after each of its stages."""
    section = recipe.evaluation
    model, tokenizer = load_policy(_model_of(recipe, name))
    left_out = tuple(unusable(fault.partition(": ")[0], fault) for fault in task.left_out)

    def save(run: Run) -> Run:
        whole = replace(run, rollouts=run.rollouts + left_out)
        whole.save(file)
        return whole

    run = evaluate(
        model,
        tokenizer,
        task,
        task.test.select(range(min(section.prompts, len(task.test)))),
        label=file.stem,
        generation=_generation(recipe),
        estimator=estimator,
        saliency=section.saliency,
        chat_template_kwargs=recipe.values["chat_template_kwargs"],
        seed=section.seed,
        settings={"model": name},
        progress=sys.stderr.isatty(),
        rescue=save,
    )
    whole = save(run)
    if faithfulness:
        run = with_faithfulness(model, tokenizer, with_deletion_effects(model, run), seed=section.seed)
        whole = save(run)
    if reader is not None:
        whole = save(with_faithfulness(*reader, run, seed=section.seed, prefix="initial_"))
    return whole
