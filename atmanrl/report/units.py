"""Words and sentences as ranges of tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*\s*$|[。！？]\s*$|\n\s*$")


LONGEST = 512
"""Tokens after which a word or sentence is cut, so that a page can lay out a text of any length in blocks."""


def words(texts: Sequence[str]) -> list[range]:
    """Token ranges of the words: a word starts at the first token, and wherever white space separates two tokens.

    White-space tokens belong to the word before them. Scripts written without spaces give one word per such run.
    """
    starts = [
        i
        for i, text in enumerate(texts)
        if i == 0 or (text.strip() and (text[0].isspace() or (texts[i - 1][-1:].isspace())))
    ]
    return [piece for word in _ranges(starts, len(texts)) for piece in _pieces(word)]


def sentences(texts: Sequence[str]) -> list[range]:
    """Token ranges of the sentences, made of whole words: a sentence ends with . ! ? … or 。！？ or a line's end."""
    starts = [0] if texts else []
    for word in words(texts)[:-1]:
        ended = _SENTENCE_END.search("".join(texts[word.start : word.stop]))
        if ended or word.stop - starts[-1] >= LONGEST:
            starts.append(word.stop)
    return _ranges(starts, len(texts))


def _pieces(unit: range) -> list[range]:
    return [range(start, min(start + LONGEST, unit.stop)) for start in range(unit.start, unit.stop, LONGEST)]


def _ranges(starts: Sequence[int], end: int) -> list[range]:
    return [range(start, stop) for start, stop in pairwise([*starts, end])]
