"""Choices: the letters A to D as they are written in answers."""

from __future__ import annotations

import re
from collections import deque

from atmanrl.answer_surroundings import (
    DELIMITERS,
    EXPLANATION,
    LEAD_IN,
    WINDOW,
    Absent,
    Span,
    after,
    plain,
    taken_back,
    why_absent,
)


class Choices:
    """One of the letters A to D: "B", "(B)", "b)", "option B"; compared without case."""

    def find_after(self, text: str, start: int) -> Span | Absent:
        window = plain(text[start : start + WINDOW])
        ends = start + WINDOW >= len(text)
        match = _CHOICE.match(window)
        if match is None:
            return why_absent(window, after(LEAD_IN, window, 0), ends=ends)
        begin, end = match.span("letter")
        return (start + begin, start + end) if _stands_alone(window, begin, end) else Absent.UNREADABLE

    def find_last(self, text: str) -> Span | None:
        text = plain(text)
        last = deque(_LONE_LETTER.finditer(text), maxlen=1)
        if not last:
            return None
        begin, end = last[0].span("letter")
        alone = not _LETTER_BEFORE.search(text, max(0, begin - 16), begin) and _stands_alone(text, begin, end)
        return (begin, end) if alone else None

    def canonical(self, value: str) -> str | None:
        span = self.find_after(value, 0)
        return None if isinstance(span, Absent) else plain(value[slice(*span)]).upper()


# Underscores are emphasis: "_B_" is a letter, "B_1" is a name.
_ENDS = r"(?!_*[^\W_]|'\w)"
_BEGINS = r"(?<![^\W_])(?<![^\W_]_)(?<!')"
_CHOICE = re.compile(
    DELIMITERS
    + r"(?i:(?:the[ ])?(?:option|choice|answer|letter|statement)(?![^\W_]))?"
    + DELIMITERS
    + rf"(?P<letter>[A-D]{_ENDS}|[a-d](?=\s*(?:[).,:;*_}}$\]]|$)){_ENDS})",
)
# "A" before a word is the article, but for words that no noun follows.
_NO_NOUN = r"(?:is|was|only|alone|not|because|since|as|rather|and|or|but|could|might|may|should|would|seems)\b"
_A = rf"A(?!\s+(?!{_NO_NOUN})[a-z])"
_LONE_LETTER = re.compile(rf"{_BEGINS}(?P<letter>[B-D]|{_A}){_ENDS}")
_LETTER = re.compile(rf"{_BEGINS}(?:[B-D]|{_A}){_ENDS}")
_NEXT_LETTER = re.compile(r"[.!]\s+[(*_]*[A-D][)*_]*(?:[.!]|\s*\Z)")
_LETTER_BEFORE = re.compile(r"(?:\b(?:or|and|not|neither|nor)|[A-D][),.]?\s?[,/&+-])\W{0,3}\Z")
# Behind a letter: the end of the sentence, the option's own words, or a reason; no other letter, no article's noun.
_OTHER_LETTER = re.compile(rf"{_BEGINS}(?:[B-HJ-Z]|{_A}){_ENDS}|\b(?:or|either|vs|versus|maybe|perhaps|possibly)\b")
_OTHER_SMALL_LETTER = re.compile(r"[\s)*_]*(?:,|/|&|-|\bor\b|\band\b)[\s(*_]*[a-d]\b")
# A sign or digit makes the letter a part of more only right behind it: behind "B)" the option's text begins.
_GLUED = re.compile(r"[ ]?[+&/]|-[0-9]|[ ]?-[ ]?[A-Za-z]\b|[0-9²³]")
_ARTICLE = re.compile(rf"\s+(?!{_NO_NOUN})[a-z0-9]")
_SENTENCE = re.compile(r"[^.!?\n<]*")
_CLOSERS = re.compile(r"[\s*_\"'`()\]}$]*(?:[,;:—-]|\bis\b)?\s*")


def _stands_alone(text: str, begin: int, end: int) -> bool:
    """Whether the letter at ``begin`` is the one choice of its sentence."""
    letter = text[begin]
    if _GLUED.match(text, end) or (letter.islower() and _OTHER_SMALL_LETTER.match(text, end)):
        return False
    sentence = text[end : end + WINDOW]
    rest = _SENTENCE.match(sentence)
    if rest is None or sentence[rest.end() : rest.end() + 1] == "?":
        return False
    if EXPLANATION.match(rest[0], after(_CLOSERS, rest[0], 0)):
        return True
    if letter == "A" and _ARTICLE.match(rest[0]):
        return False
    others = {match[0] for match in _OTHER_LETTER.finditer(rest[0])} - {letter.upper()}
    second = {match[0] for match in _LETTER.finditer(taken_back(sentence, rest.end() + 1))} - {letter.upper()}
    return not others and not second and not _NEXT_LETTER.match(sentence, rest.end())
