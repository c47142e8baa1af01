"""What is explained: prompts, completions, and the place of the answer in them."""

from __future__ import annotations

import difflib
import json as json_format
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atmanrl.answers import GSM8K_ANSWER, LEDGER_ANSWER, MMLU_ANSWER, AnswerFormat, ParsedAnswer, announcements
from atmanrl.tasks.files import Row, json_rows

_KEYS = ("prompt", "completion", "answer", "expected", "id")
_MARKERS = tuple(dict.fromkeys((*GSM8K_ANSWER.markers, *GSM8K_ANSWER.flexible_markers, *MMLU_ANSWER.markers)))
# What an announced value is read as, in this order, whatever the phrase that announces it; "<ans>" alone takes words.
_KINDS = (LEDGER_ANSWER, *(AnswerFormat(kind, _MARKERS) for kind in ("number", "choice")))
_UNANNOUNCED = GSM8K_ANSWER.with_mode("flexible")
# What may stand between an announcing phrase and a value: LaTeX commands, and no letter or digit.
_NOTHING_SAID = re.compile(r"(?:\\[a-zA-Z]+|[^\w\\]|\\[^a-zA-Z]|_){0,40}")


@dataclass(frozen=True)
class Example:
    """A prompt and its completion.

    Attributes:
        prompt: text that is tokenised as it stands, or chat messages for the model's template.
        completion: the completion's text; the model writes one where None.
        answer: the answer as it stands in the completion: the announced occurrence, else the last one that stands on
            its own, outside of any other number or word. Where None the answer is the last announced one ("The final
            answer is", "####", "\\\\boxed{", "<ans>", "The best answer is"), or the last number of a text that
            announces nothing.
        expected: the ground truth, where there is one.
        name: identifies the example.
        place: file and line for messages.
        fault: why the example cannot be used, None where it can.
    """

    prompt: str | Sequence[Mapping[str, str]]
    completion: str | None = None
    answer: str | None = None
    expected: str | None = None
    name: str = "prompt"
    place: str = "the prompt"
    fault: str | None = None


@dataclass(frozen=True)
class AnnouncedAnswer(AnswerFormat):
    """The last announced answer of a text, or the last number of a text without an announcement.

    An announced answer that cannot be read is no answer: no number from the chain of thought takes its place.

    Attributes:
        by: the format that reads and compares the value.
    """

    by: AnswerFormat = _UNANNOUNCED

    @classmethod
    def of(cls, text: str) -> AnnouncedAnswer:
        """The format for one completion."""
        read = [kind for kind in _KINDS if kind.parse(text) is not None]
        # Of a letter and of words the one that stands further back.
        by = max(read, key=lambda kind: _place(kind, text), default=_UNANNOUNCED)
        return cls(by.kind, by.markers, by=by)

    def parse(self, text: str) -> ParsedAnswer | None:
        """The answer of ``text``, None where the last announcement has no value behind it."""
        return self.by.parse(text)

    def matches(self, predicted: str, gold: str) -> bool:
        """As the format that reads the value."""
        return self.by.matches(predicted, gold)


def _place(kind: AnswerFormat, text: str) -> int:
    found = kind.parse(text)
    return -1 if found is None else found.value_span[0]


@dataclass(frozen=True)
class LiteralAnswer(AnswerFormat):
    """An answer given word for word: its announced occurrence, or the last one that stands on its own."""

    literal: str = ""

    def parse(self, text: str) -> ParsedAnswer | None:
        """The last announced occurrence, else the last; none inside another number or word."""
        starts = [
            match.start()
            for match in re.finditer(f"(?={re.escape(self.literal)})", text)
            if stands_alone(text, match.start(), match.start() + len(self.literal))
        ]
        if not starts:
            return None
        phrases = announcements(text)
        ends = [end for _, end in phrases]
        for start in reversed(starts):
            last = bisect_right(ends, start) - 1
            if last >= 0 and _NOTHING_SAID.fullmatch(text, ends[last], start):
                return self._at(start, _outermost(text, phrases[: last + 1]))
        return self._at(starts[-1], starts[-1])

    def _at(self, start: int, marker: int) -> ParsedAnswer:
        return ParsedAnswer(self.literal, (start, start + len(self.literal)), (marker, start))

    def canonical(self, value: str) -> tuple[str, ...] | None:
        """Its words."""
        return tuple(value.split()) or None


def _outermost(text: str, phrases: Sequence[tuple[int, int]]) -> int:
    """Where the announcement begins whose last phrase is the last of ``phrases``: "The final answer is \\boxed{"."""
    start = phrases[-1][0]
    for begin, end in reversed(phrases[:-1]):
        if end < start and not _NOTHING_SAID.fullmatch(text, end, start):
            break
        start = min(start, begin)
    return start


# Scripts that put no space between words, and Hangul, whose particles follow their noun without one.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1100-\u11ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_IN_NUMBERS = ".,:/\u00a0\u2009\u202f"
_IN_WORDS = "'’-−–^"


def stands_alone(text: str, start: int, stop: int) -> bool:
    """Whether ``text[start:stop]`` is no piece of a longer number or word: the 5 of "15", "0.5", "-5", "5th", "5/6"."""
    before, after = text[max(0, start - 2) : start], text[stop : stop + 2]
    first, last = text[start], text[stop - 1]
    if _one_word(before[-1:], first) or _one_word(last, after[:1]):
        return False
    if _bridged(before[:-1], before[-1:], first) or _bridged(last, after[:1], after[1:]):
        return False
    # A sign, or the point of a decimal without a digit before it.
    return not (first.isdigit() and before[-1:] in ("-", "−", "–", "^", ".") and not before[:-1].isalpha())


def _one_word(left: str, right: str) -> bool:
    """Whether two neighbours belong to one number or word."""
    if not left or not right or _UNSPACED.match(left) or _UNSPACED.match(right):
        return False
    # Combining marks belong to the letter before them.
    return all(each.isalnum() or each == "_" or unicodedata.category(each)[0] == "M" for each in (left, right))


def _bridged(left: str, middle: str, right: str) -> bool:
    if not left or not middle or not right:
        return False
    if middle in _IN_WORDS:
        return left.isalnum() and right.isalnum()
    return middle in _IN_NUMBERS and left.isdigit() and right.isdigit()


def read_examples(path: str | Path) -> Iterator[Example]:
    """Examples of a JSONL file: "prompt" (text or messages); "completion", "answer", "expected" and "id" if given.

    A line that is no such object, has a misspelt key, the id of an earlier one or text that is no Unicode becomes an
    example whose ``fault`` says so.

    Raises:
        ValueError: for a file that is not there or holds no line.
    """
    places: dict[str, str] = {}
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    left_out: list[str] = []
    number = 0
    for row in json_rows(Path(path), left_out):
        yield from _faulty(left_out)
        left_out.clear()
        number += 1
        name = str(row.values.get("id", number))
        fault = _fault_of_row(row)
        if fault is None and name in places:
            fault = f"{row.place}: the id {name!r} is that of {places[name]}"
        if fault is not None:
            yield from _faulty([fault])
            continue
        places[name] = row.place
        given = {key: row.values.get(key) for key in ("completion", "answer", "expected")}
        yield Example(row.values["prompt"], **given, name=name, place=row.place)
    yield from _faulty(left_out)


def _faulty(faults: Sequence[str]) -> Iterator[Example]:
    for fault in faults:
        place, _, reason = fault.partition(": ")
        yield Example("", name=place, place=place, fault=reason)


def _fault_of_row(row: Row) -> str | None:
    try:
        _check_row(row)
    except ValueError as error:
        return str(error)
    return None


def _check_row(row: Row) -> None:
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
    for key in _KEYS:
        if not is_unicode(values.get(key)):
            raise ValueError(f'{row.place}: "{key}" holds half of a surrogate pair, which is no Unicode text')


def is_unicode(value: Any) -> bool:
    """Whether every text in a JSON value can be written: half of a surrogate pair cannot."""
    try:
        json_format.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
