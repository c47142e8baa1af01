"""Answers in completions: where the announced value stands, whether two values are the same, and the split on tokens.

An answer is a marker, the phrase that announces it ("The final answer is", "####", "\\boxed{", "<ans>"), and a value
behind it. Between the phrase and the value may stand what people and models put there (a colon, Markdown or LaTeX
delimiters, a currency sign, "x ="); that belongs to the marker. The last announcement counts: where its value cannot be
read, the text has no answer, however many numbers it holds.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from atmanrl.answer_surroundings import Absent, Span
from atmanrl.answer_values import KINDS, Kind, ValueKind
from atmanrl.models import decode, encode_completion, end_of_turn_ids
from atmanrl.rollout import Rollout, as_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "GSM8K_ANSWER",
    "LEDGER_ANSWER",
    "MMLU_ANSWER",
    "AnswerFormat",
    "CompletionSplit",
    "ParsedAnswer",
    "announcements",
    "rollout_from_completion",
    "split_completion",
]

Mode = Literal["strict", "flexible"]
Marker = Literal["final answer is", "best answer is", "answer is", "####", "boxed", "<ans>"]

_POSSESSOR = r"\b(?:(?:the|my|our)\s+)?"
_MARKERS: dict[Marker, re.Pattern[str]] = {
    "final answer is": re.compile(_POSSESSOR + r"final\s+answer\s+is\b", re.IGNORECASE),
    "best answer is": re.compile(_POSSESSOR + r"best\s+answer\s+is\b", re.IGNORECASE),
    "answer is": re.compile(
        _POSSESSOR + r"(?:(?:final|best|correct|right)\s+)?answer"
        r"(?:(?:\s+(?:to|for)\s[^.\n]{1,60}?)?\s{1,9}is\b|(?=[*_]{0,2}\s?[:=]))",
        re.IGNORECASE,
    ),
    "####": re.compile(r"####"),
    "boxed": re.compile(r"\\(?:boxed|fbox)(?=[\s{])"),
    "<ans>": re.compile(r"<ans>"),
}


@dataclass(frozen=True)
class ParsedAnswer:
    """An answer found in a text, with half-open character spans.

    Attributes:
        value: the value as written, without currency, units or delimiters.
        value_span: where it stands: ``text[slice(*value_span)] == value``.
        marker_span: from the first character of the announcing phrase to the value; empty, at the value's start, where
            a flexible format took the last number or letter of a text without a marker.
    """

    value: str
    value_span: tuple[int, int]
    marker_span: tuple[int, int]


@dataclass(frozen=True)
class AnswerFormat:
    """Answer format of a task: announcement, syntax, comparison.

    Attributes:
        kind: "number", "choice" (a letter A to D) or "words".
        markers: phrases that count in strict mode: those the prompt asks for.
        flexible_markers: phrases that count besides them in flexible mode.
        mode: "strict" or "flexible". A flexible format also takes the last number or letter of a text without any
            marker, as lm-evaluation-harness' flexible-extract does, where it can be read.
    """

    kind: Kind
    markers: tuple[Marker, ...]
    flexible_markers: tuple[Marker, ...] = ()
    mode: Mode = "strict"

    def with_mode(self, mode: Mode) -> AnswerFormat:
        """The same format, strict or flexible."""
        return replace(self, mode=mode)

    @property
    def flexible(self) -> AnswerFormat | None:
        """The flexible format beside a strict one; None where this one is flexible or has no more markers."""
        return self.with_mode("flexible") if self.mode == "strict" and self.flexible_markers else None

    def accepts(self, text: str, gold: str) -> bool:
        """Whether ``text`` announces an answer that stands for the same as ``gold``."""
        found = self.parse(text)
        return found is not None and self.matches(found.value, gold)

    def parse(self, text: str) -> ParsedAnswer | None:
        """The value that ``text`` announces last; None where there is none, or one that cannot be read.

        An announcement with nothing behind it, of a text that was cut off, or with mere words about the answer ("The
        final answer is correct") takes no earlier one back. Time is linear in the text.
        """
        phrases = self._announcements(text)
        announced = bool(phrases)
        while phrases:
            start, end = phrases.pop()
            found = self._values.find_after(text, end)
            if found is Absent.UNREADABLE:
                return None
            if not isinstance(found, Absent):
                # "The final answer is \\boxed{18}" announces one value twice: the outer phrase is the marker.
                while phrases and self._values.find_after(text, phrases[-1][1]) == found:
                    start = min(start, phrases.pop()[0])
                if phrases and self._is_one_of_several(text, phrases[-1][1], start, found):
                    return None
                return ParsedAnswer(text[slice(*found)], found, (start, found[0]))
        if self.mode == "strict" or announced:
            return None
        last = self._values.find_last(text)
        return None if last is None else ParsedAnswer(text[slice(*last)], last, (last[0], last[0]))

    def canonical(self, value: str) -> Hashable | None:
        """What ``value`` stands for: a fraction, an upper-case letter or a tuple of words; None if unreadable."""
        return self._values.canonical(value)

    def matches(self, predicted: str, gold: str) -> bool:
        """Whether two values stand for the same thing: "1,000.00" and "1000" do, "0.5" and "50%" do not.

        Raises:
            ValueError: where ``gold`` cannot be read.
        """
        wanted = self.canonical(gold)
        if wanted is None:
            raise ValueError(f"gold answer {gold!r} is not a {self.kind}")
        return self.canonical(predicted) == wanted

    @property
    def _values(self) -> ValueKind:
        return KINDS[self.kind]

    def _announcements(self, text: str) -> list[tuple[int, int]]:
        """Start and end of every announcing phrase, the one that ends last at the end."""
        return announcements(text, self.markers if self.mode == "strict" else (*self.markers, *self.flexible_markers))

    def _is_one_of_several(self, text: str, earlier_end: int, start: int, found: Span) -> bool:
        """Whether the announcement at ``start`` goes on with a list: "\\boxed{17} or \\boxed{18}"."""
        between = text[max(earlier_end, start - 200) : start]
        if self.kind == "words" or not _CONNECTIVE.search(between) or _SENTENCE_END.search(between):
            return False
        earlier = self._values.find_after(text, earlier_end)
        value = text[slice(*found)]
        return isinstance(earlier, Absent) or self.canonical(text[slice(*earlier)]) != self.canonical(value)


# A Markdown heading: words, or a number of its own and words, with more text in the lines below.
_HEADING = re.compile(r"[ ]*(?:[0-9]{1,2}[.)][ ]+)?[*_]{0,2}[A-Za-z][^\n]{0,200}\n\s*[^\s#]")
_SENTENCE_END = re.compile(r"[.!?][^\w\s]{0,4}\s|\n")
_CONNECTIVE = re.compile(r"(?:\b(?:or|and)|[,;/&])[\s$(\[{*\\]*\Z", re.IGNORECASE)


def announcements(text: str, markers: Iterable[Marker] = tuple(_MARKERS)) -> list[tuple[int, int]]:
    """Spans of every phrase that announces an answer, by where they end; no Markdown headings.

    Of phrases with the same end the longest, "the final answer is", comes last.
    """
    found = (match for marker in markers for match in _MARKERS[marker].finditer(text))
    spans = {match.span() for match in found if match[0] != "####" or not _HEADING.match(text, match.end())}
    return sorted(spans, key=lambda span: (span[1], -span[0]))


GSM8K_ANSWER = AnswerFormat(
    kind="number", markers=("final answer is",), flexible_markers=("####", "boxed", "answer is", "<ans>")
)
MMLU_ANSWER = AnswerFormat(
    kind="choice",
    markers=("best answer is",),
    flexible_markers=("final answer is", "####", "boxed", "answer is", "<ans>"),
)
LEDGER_ANSWER = AnswerFormat(kind="words", markers=("<ans>",))


@dataclass(frozen=True)
class CompletionSplit:
    """A completion cut into chain of thought, marker and answer; what follows the value is dropped.

    Attributes:
        cot_ids: token ids before the marker; the whole completion, up to its end of turn, where no answer was found.
        marker_ids: token ids of the announcing phrase.
        answer_ids: token ids of the value; empty where no answer was found.
        answer: the answer as parsed from ``text``, or None.
        text: the completion up to its end of turn, decoded with its special tokens.
        finished: whether an end-of-turn token was there, that is the completion was not cut off.
    """

    cot_ids: tuple[int, ...]
    marker_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    answer: ParsedAnswer | None
    text: str
    finished: bool


def split_completion(
    completion_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    answer_format: AnswerFormat,
    *,
    end_ids: Collection[int] | None = None,
) -> CompletionSplit:
    """Cut a completion into chain of thought | marker | answer, on the tokens that were generated.

    The borders are found in the decoded text and carried back by decoding prefixes of the generated ids themselves, so
    nothing is tokenised again. A token that straddles a border goes to the later part: one with any byte of the value
    is answer (also where it holds a leading space or a closing brace), else one with any byte of the marker is marker.

    Args:
        completion_ids: generated ids, end-of-turn and padding included or not.
        tokenizer: decodes them; prefixes of the ids must decode to prefixes of the text, up to a character that is
            not complete yet (byte-level BPE, SentencePiece and word-level tokenizers do).
        answer_format: finds marker and value.
        end_ids: token ids that end a completion; None takes those of the tokenizer (`atmanrl.models.end_of_turn_ids`).
    """
    ends = end_of_turn_ids(tokenizer) if end_ids is None else end_ids
    length = next((i for i, token in enumerate(completion_ids) if token in ends), len(completion_ids))
    ids = as_ids("completion_ids", completion_ids[:length])
    text = decode(tokenizer, ids)
    finished = length < len(completion_ids)
    answer = answer_format.parse(text)
    if answer is None:
        return CompletionSplit(ids, (), (), None, text, finished)
    marker = _first_token_of(answer.marker_span[0], ids, tokenizer)
    value = _first_token_of(answer.value_span[0], ids, tokenizer)
    end = _tokens_until(answer.value_span[1], ids, tokenizer)
    return CompletionSplit(ids[:marker], ids[marker:value], ids[value:end], answer, text, finished)


def rollout_from_completion(
    prompt_ids: Iterable[int],
    completion_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    answer_format: AnswerFormat,
    *,
    target: Literal["predicted", "correct"] = "predicted",
    gold: str | None = None,
    end_ids: Collection[int] | None = None,
) -> Rollout:
    """The rollout of a completion, its answer the predicted one or the ground truth.

    ``target="correct"`` keeps the predicted tokens where they are right already and otherwise puts the tokens of
    ``gold`` in their place, behind the same chain of thought and marker. Without a parseable answer there is no place
    for it: the answer stays empty and everything is chain of thought.

    Raises:
        ValueError: for ``target="correct"`` without ``gold``.
    """
    split = split_completion(completion_ids, tokenizer, answer_format, end_ids=end_ids)
    answer_ids = split.answer_ids
    if target == "correct":
        if gold is None:
            raise ValueError('target="correct" needs the gold answer')
        if split.answer is not None and not answer_format.matches(split.answer.value, gold):
            answer_ids = _gold_ids(split, split.answer, gold, tokenizer)
    return Rollout(tuple(prompt_ids), split.cot_ids, answer_ids, split.marker_ids)


def _gold_ids(
    split: CompletionSplit, answer: ParsedAnswer, gold: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    # A first answer token such as " 18" holds a piece of the marker as well: the replacement must hold it too.
    before = split.cot_ids + split.marker_ids
    head = split.text[len(_complete(decode(tokenizer, before))) : answer.value_span[0]]
    return as_ids("gold", encode_completion(tokenizer, before, head + gold))


def _first_token_of(position: int, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Index of the first token with any byte of the text's character at ``position``."""

    def touched(count: int) -> bool:
        text = decode(tokenizer, ids[:count])
        complete = len(_complete(text))
        return complete > position or (complete == position and complete < len(text))

    return bisect_left(range(len(ids) + 1), True, key=touched) - 1


def _tokens_until(position: int, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens it takes to have all bytes of the text's first ``position`` characters."""

    def covered(count: int) -> bool:
        return len(_complete(decode(tokenizer, ids[:count]))) >= position

    return bisect_left(range(len(ids) + 1), True, key=covered)


def _complete(text: str) -> str:
    # A character whose bytes have not all been generated decodes to one or more replacement characters.
    return text.rstrip("\ufffd")
