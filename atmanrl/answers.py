"""Answers in completions: where the announced value stands, and whether two values are the same.

An answer is a marker, the phrase that announces it ("The final answer is", "####", "\\boxed{", "<ans>"), and a value
behind it. Between the phrase and the value may stand what people and models put there (a colon, Markdown or LaTeX
delimiters, a currency sign, "x ="); that belongs to the marker. The last announced value counts.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from atmanrl.answer_values import KINDS, Kind, ValueKind

__all__ = ["GSM8K_ANSWER", "LEDGER_ANSWER", "MMLU_ANSWER", "AnswerFormat", "ParsedAnswer"]

Mode = Literal["strict", "flexible"]
Marker = Literal["final answer is", "best answer is", "answer is", "####", "boxed", "<ans>"]

_POSSESSOR = r"\b(?:(?:the|my|our)\s+)?"
_MARKERS: dict[Marker, re.Pattern[str]] = {
    "final answer is": re.compile(_POSSESSOR + r"final\s+answer\s+is\b", re.IGNORECASE),
    "best answer is": re.compile(_POSSESSOR + r"best\s+answer\s+is\b", re.IGNORECASE),
    "answer is": re.compile(
        _POSSESSOR + r"(?:(?:final|best|correct|right)\s+)?answer"
        r"(?:(?:\s+(?:to|for)\s[^.\n]{1,60}?)?\s+is\b|(?=[*_]{0,2}\s?[:=]))",
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
    """How a task's answers are announced, written and compared.

    Attributes:
        kind: "number", "choice" (a letter A to D) or "words".
        markers: phrases that count in strict mode: those the prompt asks for.
        flexible_markers: phrases that count besides them in flexible mode.
        mode: "strict" or "flexible". A flexible format also takes the last number or letter of a text without any
            marker, as lm-evaluation-harness' flexible-extract does.
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
        """The last announced value of ``text``; None where there is none."""
        found = max(self._announced(text), key=_last_then_longest_marker, default=None)
        if found is None and self.mode == "flexible":
            span = self._values.find_last(text)
            found = None if span is None else ParsedAnswer(text[slice(*span)], span, (span[0], span[0]))
        return found

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

    def _announced(self, text: str) -> Iterator[ParsedAnswer]:
        markers = self.markers if self.mode == "strict" else (*self.markers, *self.flexible_markers)
        for marker in markers:
            for match in _MARKERS[marker].finditer(text):
                span = self._values.find_after(text, match.end())
                if span is not None:
                    yield ParsedAnswer(text[slice(*span)], span, (match.start(), span[0]))


def _last_then_longest_marker(answer: ParsedAnswer) -> tuple[int, int]:
    # "The final answer is \boxed{18}" announces one value twice: the outer phrase is the marker.
    return answer.value_span[0], -answer.marker_span[0]


GSM8K_ANSWER = AnswerFormat(
    kind="number", markers=("final answer is",), flexible_markers=("####", "boxed", "answer is", "<ans>")
)
MMLU_ANSWER = AnswerFormat(
    kind="choice",
    markers=("best answer is",),
    flexible_markers=("final answer is", "####", "boxed", "answer is", "<ans>"),
)
LEDGER_ANSWER = AnswerFormat(kind="words", markers=("<ans>",))


def announcements(text: str) -> list[tuple[int, int]]:
    """Spans of every phrase that announces an answer, whatever the format, by where they end."""
    spans = {match.span() for pattern in _MARKERS.values() for match in pattern.finditer(text)}
    return sorted(spans, key=lambda span: (span[1], -span[0]))
