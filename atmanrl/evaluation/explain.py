"""Saliency of given prompts and completions, or of completions that the model writes; ``atmanrl explain``."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atmanrl.answers import AnswerFormat
from atmanrl.config import MaskConfig, ModelConfig
from atmanrl.errors import explained_without_training
from atmanrl.evaluation.evaluate import UNREADABLE, check_name, fault_of, faults_of, say_skipped
from atmanrl.evaluation.examples import AnnouncedAnswer, Example, LiteralAnswer, is_unicode, read_examples
from atmanrl.evaluation.faithfulness import with_deletion_effects, with_scores
from atmanrl.evaluation.recording import Completion, check_support, record, score_name, unusable
from atmanrl.evaluation.records import RolloutRecord, Run, check_writable, write_text_atomically
from atmanrl.generation import GenerationSettings, context_length, generate
from atmanrl.models import encode_completion, encode_prompt, load_policy
from atmanrl.recipe import RecipeError
from atmanrl.report import print_run, write_page
from atmanrl.saliency import Estimator, Mask, make_estimator
from atmanrl.settings import estimators_from

__all__ = ["Completed", "Example", "completed", "explain", "explain_command", "read_examples"]

_TEMPLATE = "chat_template_kwargs"


@dataclass(frozen=True)
class Completed:
    """Prompts and completions as token ids.

    Attributes:
        prompts, completions: (N,) lists of token ids, empty where ``faults`` has a reason.
        faults: why an example could not be used, with its place; None for the others.
        generation: how missing completions were written; None where there were none.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    faults: list[str | None]
    generation: GenerationSettings | None


def explain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    label: str = "explained",
    generation: GenerationSettings | None = None,
    temperature: float = 0.0,
    mask: MaskConfig | None = None,
    estimator: str | Estimator = "mask",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    record_every: int | None = None,
    progress: bool = False,
    rescue: Callable[[Run], object] | None = None,
) -> Run:
    """The saliency of each example's chain of thought for the answer that follows it.

    An example that cannot be used (it exceeds the model's context, its answer is not in its completion, its prompt
    cannot be rendered) becomes a record without tokens whose ``skipped`` says why; summaries leave it out.

    Args:
        model: any Hugging Face causal model.
        tokenizer: its tokenizer.
        examples: prompts with completions; the model completes those that have none.
        label: what a reader calls this run.
        generation: how missing completions are drawn, one per prompt; None: at ``temperature``, to the context's end.
        temperature: of the sampling where ``generation`` is None; 0 is greedy.
        mask: how masks are optimised; the paper's numbers where None.
        estimator: the estimator of token scores: one of `atmanrl.ESTIMATORS`, "best", or an estimator itself.
        chat_template_kwargs: see `encode_prompt`, for prompts that are messages.
        seed: of the sampling.
        settings: what else to write into the run's settings, such as the model's name.
        record_every: keep each mask and its loss every so many steps (`RolloutRecord.trajectory`).
        progress: show progress bars on stderr.
        rescue: called with what was recorded where an error ends the scoring; see `record`.

    Raises:
        ValueError: for no examples, none that can be used (with the first one's place and reason), or a model that the
            estimator cannot read; before anything is generated.
    """
    scorer = (
        make_estimator(estimator, mask=mask, record_every=record_every) if isinstance(estimator, str) else estimator
    )
    done = completed(
        model,
        tokenizer,
        examples,
        generation=generation,
        temperature=temperature,
        chat_template_kwargs=chat_template_kwargs,
        seed=seed,
        progress=progress,
        before=lambda prompts: check_support(model, scorer, prompts[0][-1]),
    )
    texts = [str(tokenizer.decode(ids)) for ids in done.completions]
    usable = [i for i, fault in enumerate(done.faults) if fault is None]
    completions = [
        Completion(
            examples[i].name,
            done.prompts[i],
            done.completions[i],
            _answer_format(examples[i], texts[i]),
            examples[i].expected,
            given=examples[i].completion is not None,
        )
        for i in usable
    ]
    generated = {"generation": asdict(done.generation), "seed": seed} if done.generation else {}
    masked = {"mask": asdict(scorer.config)} if isinstance(scorer, Mask) else {}
    rendered = {_TEMPLATE: dict(chat_template_kwargs)} if chat_template_kwargs else {}

    def run_of(records: Sequence[RolloutRecord]) -> Run:
        found = dict(zip(usable, records, strict=True))
        rollouts = (
            found[i] if fault is None else unusable(examples[i].name, fault, examples[i].expected)
            for i, fault in enumerate(done.faults)
        )
        return Run(
            label, tuple(rollouts), score_name(scorer.name), {**(settings or {}), **generated, **masked, **rendered}
        )

    rescued = None if rescue is None else lambda records: rescue(run_of(records))
    return run_of(record(model, tokenizer, completions, estimator=scorer, progress=progress, rescue=rescued))


def completed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    generation: GenerationSettings | None = None,
    temperature: float = 0.0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = False,
    before: Callable[[list[list[int]]], None] | None = None,
) -> Completed:
    """Token ids of the examples' prompts and completions; the model writes those that are missing.

    Args:
        generation: how missing completions are drawn; where None at ``temperature``, each up to the context's end.
        before: called with the usable prompts before anything is generated.

    Raises:
        ValueError: for no examples, or none that can be used, with the first one's place and reason.
    """
    if not examples:
        raise ValueError("no prompts to explain")
    given = [_ids_of(model, tokenizer, example, generation, chat_template_kwargs) for example in examples]
    faults = [
        f"{each.place}: {ids}" if isinstance(ids, str) else None for each, ids in zip(examples, given, strict=True)
    ]
    usable = {i: ids for i, ids in enumerate(given) if not isinstance(ids, str)}
    if not usable:
        raise ValueError(next(fault for fault in faults if fault is not None))
    if before is not None:
        before([prompt for prompt, _ in usable.values()])
    completions = {i: completion for i, (_, completion) in usable.items() if completion is not None}
    missing = [i for i in usable if i not in completions]
    for limited in _by_limit(model, {i: usable[i][0] for i in missing}, generation, temperature):
        members, generation = limited
        written = generate(model, tokenizer, [usable[i][0] for i in members], generation, seed=seed, progress=progress)
        completions.update({i: samples[0] for i, samples in zip(members, written, strict=True)})
    return Completed(
        [usable[i][0] if i in usable else [] for i in range(len(examples))],
        [completions.get(i, []) for i in range(len(examples))],
        faults,
        generation if missing else None,
    )


def _ids_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    generation: GenerationSettings | None,
    template_kwargs: Mapping[str, Any] | None,
) -> tuple[list[int], list[int] | None] | str:
    """Token ids of the prompt and of the given completion, or why they cannot be used."""
    if example.fault is not None:
        return example.fault
    try:
        prompt = encode_prompt(tokenizer, example.prompt, template_kwargs)
    except UNREADABLE as error:
        return str(error)
    if example.completion is None:
        fault = fault_of(model, prompt, (), 1 if generation is None else generation.max_new_tokens)
        return (prompt, None) if fault is None else f"the prompt {fault}"
    try:
        completion = encode_completion(tokenizer, prompt, example.completion)
        _answer_format(example, str(tokenizer.decode(completion)))
    except UNREADABLE as error:
        return str(error)
    fault = fault_of(model, prompt, completion)
    return (prompt, completion) if fault is None else f"the example {fault}" if prompt else f"the prompt {fault}"


def _by_limit(
    model: PreTrainedModel,
    prompts: Mapping[int, Sequence[int]],
    generation: GenerationSettings | None,
    temperature: float,
) -> Iterator[tuple[list[int], GenerationSettings]]:
    """Prompts that may be completed together, with how; a long prompt leaves the others their room."""
    if generation is not None:
        if prompts:
            yield list(prompts), generation
        return
    context, most = context_length(model), GenerationSettings.max_new_tokens
    limits = {i: min(most, context - len(prompt)) for i, prompt in prompts.items()}
    # The largest comes last: it is the one that is written down.
    for limit in sorted(set(limits.values())):
        yield [i for i in prompts if limits[i] == limit], GenerationSettings(limit, temperature)


def _answer_format(example: Example, completion: str) -> AnswerFormat:
    """How the example's answer is found.

    Raises:
        ValueError: where a given answer does not stand in a given completion.
    """
    if example.answer is None:
        return AnnouncedAnswer.of(completion)
    literal = LiteralAnswer(kind="words", markers=(), literal=example.answer)
    if example.completion is not None and literal.parse(completion) is None:
        inside = ", except inside another number or word" if example.answer in completion else ""
        raise ValueError(f"the completion does not contain the answer {example.answer!r}{inside}")
    return literal


@explained_without_training("explanation", "files written before this one are whole")
def explain_command(
    model: ModelConfig,
    overrides: Sequence[tuple[str, str]] = (),
    *,
    examples: Path | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    answer: str | None = None,
    html: Path | None = None,
    json: Path | None = None,
    csv: Path | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    color: bool = True,
    estimators: Sequence[str] = ("mask",),
    deletion: bool = False,
    record_every: int | None = None,
) -> int:
    """Explain the examples of a JSONL file, or one prompt, and return the exit status: 1 where a line was skipped.

    Args:
        model: the model to explain.
        overrides: keys of the estimators' sections (``mask.*``, ``sparse_mask.*``), as on ``train``'s command
            line, and ``chat_template_kwargs.*``.
        examples: JSONL file, see `read_examples`.
        prompt, completion, answer: one example, see `Example`; the model writes a completion that is not given.
        html, json, csv: files to write.
        max_new_tokens, temperature, seed: of completions that the model writes.
        color: whether the terminal's colours may be used.
        estimators: names from `atmanrl.ESTIMATORS`, or "best"; the first one's scores are summarised
            and shown first.
        deletion: also hide each token in turn and record how much the answer's loss rises.
        record_every: also record the masks' and losses' course, every so many optimiser steps.

    Raises:
        ValueError: for examples or options that cannot be used, before anything is computed.
    """
    template_kwargs, overrides = split_template_kwargs(overrides)
    named = estimators_from(estimators, overrides, record_every=record_every)
    names = [each.name for each in named]
    masks = [each.config for each in named if isinstance(each, Mask)]
    if len(set(names)) < len(names):
        raise ValueError(f"an estimator is named twice: {', '.join(estimators)}")
    if record_every is not None and names[0] not in ("mask", "sparse-mask"):
        raise ValueError(f"--record-every belongs to a mask as the first estimator, not to {estimators[0]!r}")
    check_outputs(html=html, json=json, csv=csv)
    check_name(model.name)
    items = examples_of(examples, prompt, completion, answer)
    generation = generation_of(max_new_tokens, temperature)
    policy, tokenizer = load_policy(model)
    console = Console(no_color=not color, highlight=False)

    def show(run: Run) -> None:
        print_run(run, console)
        _write(run, console, html=html, json=json, csv=csv)

    run = explain(
        policy,
        tokenizer,
        items,
        label=Path(model.name).name,
        generation=generation,
        temperature=temperature,
        estimator=named[0],
        chat_template_kwargs=template_kwargs,
        seed=seed,
        settings={"model": model.name} | ({"mask": asdict(masks[0])} if masks else {}),
        record_every=record_every,
        progress=sys.stderr.isatty(),
        rescue=show,
    )
    try:
        for each in named[1:]:
            run = with_scores(policy, run, each, score_name(each.name))
        if deletion:
            run = with_deletion_effects(policy, run)
    finally:
        # What an error leaves unscored is no reason to lose what was scored.
        show(run)
    return say_skipped(faults_of([run]))


def split_template_kwargs(
    overrides: Sequence[tuple[str, str]],
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The arguments of the chat template among the overrides, and the other overrides.

    They are written ``--chat_template_kwargs.enable_thinking false`` or as one YAML mapping.

    Raises:
        RecipeError: for a value that is no YAML, or a whole that is no mapping.
    """
    given: dict[str, Any] = {}
    for key, text in overrides:
        section, _, name = key.partition(".")
        if section != _TEMPLATE:
            continue
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"--{key}: not a YAML value: {text!r}") from error
        if not name and not isinstance(value, dict):
            raise RecipeError(f"--{key} must be a mapping, got {text!r}")
        given |= {name: value} if name else value
    return given, [(key, text) for key, text in overrides if key.partition(".")[0] != _TEMPLATE]


def generation_of(max_new_tokens: int | None, temperature: float) -> GenerationSettings | None:
    """How completions are written; None without a limit of their length, which is then the context's end.

    Raises:
        ValueError: for a limit below 1, or a temperature that is negative.
    """
    settings = GenerationSettings(
        GenerationSettings.max_new_tokens if max_new_tokens is None else max_new_tokens, temperature
    )
    return None if max_new_tokens is None else settings


def examples_of(path: Path | None, prompt: str | None, completion: str | None, answer: str | None) -> list[Example]:
    """The examples of a file, or the one given.

    Raises:
        ValueError: for both, neither, or parts of an example beside a file.
    """
    if (path is None) == (prompt is None):
        raise ValueError("give either a file of examples or one prompt")
    if path is None:
        for option, text in (("--prompt", prompt), ("--completion", completion), ("--answer", answer)):
            if not is_unicode(text):
                raise ValueError(f"{option} is not valid UTF-8")
        if answer == "":
            raise ValueError("--answer is empty; leave it out to have the answer found")
        return [Example(prompt or "", completion, answer)]
    if completion is not None or answer is not None:
        raise ValueError("the completion and the answer of a file's examples stand in the file")
    examples = list(read_examples(path))
    if all(example.fault is not None for example in examples):
        raise ValueError(f"{examples[0].place}: {examples[0].fault}" if examples else f"{path}: holds no rows")
    return examples


def check_outputs(**paths: Path | None) -> None:
    """Refuse files that cannot be written, or one that is named twice; the keywords are the options' names.

    Raises:
        ValueError: naming the option.
    """
    seen: dict[Path, str] = {}
    for option, path in paths.items():
        if path is None:
            continue
        check_writable(path, f"--{option}")
        twin = seen.setdefault(path.resolve(), option)
        if twin != option and not (path.exists() and not path.is_file()):
            raise ValueError(f"--{option} and --{twin} name one file, {path}")


def _write(run: Run, console: Console, *, html: Path | None, json: Path | None, csv: Path | None) -> None:
    """Write the files asked for; one that fails does not keep the others from being written."""
    failed: list[OSError] = []
    for path, write in ((json, run.save), (csv, partial(_write_csv, run)), (html, partial(_write_html, run))):
        if path is None:
            continue
        try:
            write(path)
        except OSError as error:
            failed.append(error)
        else:
            console.print(f"written: {path}", markup=False)
    if failed:
        raise failed[0]


def _write_html(run: Run, path: Path) -> None:
    write_page(path, run, shown=len(run.rollouts))


def _write_csv(run: Run, path: Path) -> None:
    text = io.StringIO(newline="")
    run.write_csv(text)
    write_text_atomically(path, text.getvalue())
