"""Saliency of given prompts and completions, or of completions that the model writes."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atmanrl.answers import GSM8K_ANSWER, LEDGER_ANSWER, MMLU_ANSWER, AnswerFormat, ParsedAnswer
from atmanrl.chat import encode_prompt
from atmanrl.config import MaskConfig
from atmanrl.evaluation.recording import Completion, record, score_name
from atmanrl.evaluation.records import Run
from atmanrl.generation import GenerationSettings, context_length, generate
from atmanrl.saliency.estimators import Estimator, Mask, make_estimator
from atmanrl.tasks.files import Row, json_rows

_KEYS = ("prompt", "completion", "answer", "expected", "id")
# Tried in this order: the announcements that cannot be mistaken first, a lone number last.
_FORMATS = (LEDGER_ANSWER, MMLU_ANSWER, GSM8K_ANSWER.with_mode("flexible"))


@dataclass(frozen=True)
class Example:
    """A prompt and its completion.

    Attributes:
        prompt: text that is tokenised as it stands, or chat messages for the model's template.
        completion: the completion's text; the model writes one where None.
        answer: the answer as it stands in the completion (its last occurrence counts); found by its announcement
            ("The final answer is", "####", "\\\\boxed{", "<ans>", "The best answer is") where None.
        expected: the ground truth, where there is one.
        name: identifies the example.
        place: file and line for messages.
    """

    prompt: str | Sequence[Mapping[str, str]]
    completion: str | None = None
    answer: str | None = None
    expected: str | None = None
    name: str = "prompt"
    place: str = "the prompt"


@dataclass(frozen=True)
class LiteralAnswer(AnswerFormat):
    """An answer given word for word: its last occurrence, behind its announcement where it has one."""

    literal: str = ""

    def parse(self, text: str) -> ParsedAnswer | None:
        """The last occurrence of the literal."""
        start = text.rfind(self.literal)
        if start < 0:
            return None
        span = (start, start + len(self.literal))
        announced = (answer_format.parse(text) for answer_format in _FORMATS)
        marker = next((found.marker_span for found in announced if found and found.value_span[0] == start), span)
        return ParsedAnswer(self.literal, span, (marker[0], start))

    def matches(self, predicted: str, gold: str) -> bool:
        """Whether the two are the same text, up to white space."""
        return predicted.split() == gold.split()


def read_examples(path: str | Path) -> Iterator[Example]:
    """Examples of a JSONL file: "prompt" (text or messages); "completion", "answer", "expected" and "id" if given.

    Raises:
        ValueError: for a line that is no such object, has a misspelt key or the id of an earlier one, with file and
            line.
    """
    places: dict[str, str] = {}
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    for number, row in enumerate(json_rows(Path(path)), start=1):
        values = row.values
        _check_keys(row)
        name = str(values.get("id", number))
        if name in places:
            raise ValueError(f"{row.place}: the id {name!r} is that of {places[name]}")
        places[name] = row.place
        yield Example(
            prompt=values["prompt"],
            completion=values.get("completion"),
            answer=values.get("answer"),
            expected=values.get("expected"),
            name=name,
            place=row.place,
        )


def _check_keys(row: Row) -> None:
    values = row.values
    for key in values:
        near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.8)
        # Other columns may stand beside these, but not one that is a slip of the pen.
        if key not in _KEYS and near and near[0] not in values:
            raise ValueError(f'{row.place}: unknown key "{key}"; did you mean "{near[0]}"?')
    prompt = values.get("prompt")
    if not (isinstance(prompt, str) and prompt) and not (isinstance(prompt, list) and prompt):
        raise ValueError(f'{row.place}: "prompt" must be a text or a list of messages, got {prompt!r}')
    for message in prompt if isinstance(prompt, list) else ():
        parts = [message.get(part) for part in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(
                f'{row.place}: a message of "prompt" needs the texts "role" and "content", got {message!r}'
            )
    for key in ("completion", "answer", "expected"):
        if not isinstance(values.get(key), str | None):
            raise ValueError(f'{row.place}: "{key}" must be a text, got {values[key]!r}')
    if values.get("answer") == "":
        raise ValueError(f'{row.place}: "answer" is empty; leave it out to have the answer found')


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
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    record_every: int | None = None,
    progress: bool = False,
) -> Run:
    """The saliency of each example's chain of thought for the answer that follows it.

    Args:
        model: any Hugging Face causal model.
        tokenizer: its tokenizer.
        examples: prompts with completions; the model completes those that have none.
        label: what a reader calls this run.
        generation: how missing completions are drawn, one per prompt; None: at ``temperature``, to the context's end.
        temperature: of the sampling where ``generation`` is None; 0 is greedy.
        mask: how masks are optimised; the paper's numbers where None.
        estimator: what scores the tokens: one of `atmanrl.ESTIMATORS`, "best", or an estimator itself.
        seed: of the sampling.
        settings: what else to write into the run's settings, such as the model's name.
        record_every: keep each mask and its loss every so many steps (`RolloutRecord.trajectory`).
        progress: show progress bars on stderr.

    Raises:
        ValueError: for an example whose answer is not in its completion or that exceeds the model's context, with its
            place; for no examples.
    """
    scorer = (
        make_estimator(estimator, mask=mask, record_every=record_every) if isinstance(estimator, str) else estimator
    )
    prompts, completion_ids, generation = completed(
        model, tokenizer, examples, generation=generation, temperature=temperature, seed=seed, progress=progress
    )
    completions = [
        Completion(
            example.name,
            prompt,
            ids,
            _answer_format(example, str(tokenizer.decode(ids))),
            example.expected,
            given=example.completion is not None,
        )
        for example, prompt, ids in zip(examples, prompts, completion_ids, strict=True)
    ]
    records = record(model, tokenizer, completions, estimator=scorer, progress=progress)
    generated = {"generation": asdict(generation), "seed": seed} if generation else {}
    masked = {"mask": asdict(scorer.config)} if isinstance(scorer, Mask) else {}
    return Run(label, tuple(records), score_name(scorer.name), {**(settings or {}), **generated, **masked})


def completed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    generation: GenerationSettings | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    progress: bool = False,
) -> tuple[list[list[int]], list[list[int]], GenerationSettings | None]:
    """Token ids of the examples' prompts and completions, and how those that were missing were written.

    Args:
        generation: how missing completions are drawn; where None at ``temperature``, up to the context's end.

    Raises:
        ValueError: for no examples; for one that is empty or exceeds the model's context, with its place.
    """
    if not examples:
        raise ValueError("no prompts to explain")
    prompts = [_prompt_ids(tokenizer, example) for example in examples]
    completion_ids = [
        None if example.completion is None else tokenizer.encode(example.completion, add_special_tokens=False)
        for example in examples
    ]
    _check_context(model, examples, prompts, completion_ids)
    missing = [i for i, ids in enumerate(completion_ids) if ids is None]
    if missing:
        generation = generation or _up_to_the_end(model, [prompts[i] for i in missing], temperature)
        written = generate(model, tokenizer, [prompts[i] for i in missing], generation, seed=seed, progress=progress)
        for i, samples in zip(missing, written, strict=True):
            completion_ids[i] = samples[0]
    return prompts, [ids or [] for ids in completion_ids], generation


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[int]:
    try:
        return encode_prompt(tokenizer, example.prompt)
    except (ValueError, TemplateError) as error:
        raise ValueError(f"{example.place}: {error}") from error


def _up_to_the_end(model: PreTrainedModel, prompts: Sequence[Sequence[int]], temperature: float) -> GenerationSettings:
    room = context_length(model) - max(len(prompt) for prompt in prompts)
    return GenerationSettings(max(1, min(GenerationSettings.max_new_tokens, room)), temperature)


def _answer_format(example: Example, completion: str) -> AnswerFormat:
    if example.answer is not None:
        if example.answer not in completion:
            raise ValueError(f"{example.place}: the completion does not contain the answer {example.answer!r}")
        return LiteralAnswer(kind="words", markers=(), literal=example.answer)
    return next((each for each in _FORMATS if each.parse(completion) is not None), _FORMATS[-1])


def _check_context(
    model: PreTrainedModel,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int] | None],
) -> None:
    context = context_length(model)
    for example, prompt, completion in zip(examples, prompts, completions, strict=True):
        if not prompt:
            raise ValueError(f"{example.place}: the prompt is empty")
        length = len(prompt) + len(completion or ())
        if length > context:
            raise ValueError(f"{example.place}: {length} tokens, more than the model's context of {context}")
