"""Chains of thought as HTML: sentences of words of tokens, each with the shade of its score."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from itertools import pairwise

from markupsafe import Markup, escape

from atmanrl.evaluation.records import RolloutRecord, TokenSpan
from atmanrl.report.scale import Scale
from atmanrl.report.text import visible

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


# Tokens after which a long chain of thought is broken, at a sentence's end.
_BLOCK = 1000


def span_html(span: TokenSpan) -> Markup:
    """A span's text without scores."""
    pieces = [_token(text, "t") for text in span.texts]
    return _without_indent(Markup("").join(lead + html for lead, html in pieces))


def scored_html(rollout: RolloutRecord, values: Sequence[float] | None, scale: Scale) -> Markup:
    """The chain of thought of a rollout; a word's and a sentence's score is the mean over its tokens.

    Without ``values`` the tokens stand untinted. Every character that came from a tokenizer is escaped.
    """
    texts = rollout.cot.texts
    unused = deque(words(texts))
    html: list[Markup] = []
    blocks: list[Markup] = []
    start = 0
    for sentence in sentences(texts):
        inner: list[Markup] = []
        while unused and unused[0].start < sentence.stop:
            word = unused.popleft()
            tokens = [
                _token(texts[i], f"t {_shade(values, range(i, i + 1), scale)} c-{_slug(rollout.token_class(i))}", i)
                for i in word
            ]
            inner += _group("w", tokens, _shade(values, word, scale))
        html += _group("s", [(inner[0], Markup("").join(inner[1:]))], _shade(values, sentence, scale))
        if sentence.stop - start >= _BLOCK or sentence.stop == len(texts):
            # Chromium lays out one paragraph of 100 000 tokens for a minute, blocks out of sight not at all.
            blocks.append(Markup('<div class="block">{}</div>').format(_without_indent(Markup("").join(html))))
            html, start = [], sentence.stop
    return Markup("").join(blocks)


def _token(text: str, classes: str, index: int | None = None) -> tuple[Markup, Markup]:
    # White space before a token stands outside its tint, so that neighbours stay apart.
    shown = visible(text)
    body = shown.lstrip() if text.strip() else shown
    lead = escape(shown[: len(shown) - len(body)])
    position = Markup("") if index is None else Markup(' data-i="{}"').format(index)
    faint = "" if text.strip() else " blank"
    return lead, Markup('<span class="{}{}"{}>{}</span>').format(classes, faint, position, body)


def _group(kind: str, pieces: Sequence[tuple[Markup, Markup]], shade: str) -> tuple[Markup, Markup]:
    (lead, first), *others = pieces
    inner = first + Markup("").join(before + html for before, html in others)
    return lead, Markup('<span class="{} {}">{}</span>').format(kind, shade, inner)


def _without_indent(html: Markup) -> Markup:
    return Markup(html.lstrip(" "))


def _shade(values: Sequence[float] | None, tokens: range, scale: Scale) -> str:
    if values is None:
        return "z"
    level = scale.level(sum(values[i] for i in tokens) / len(tokens))
    return f"u{level}" if level > 0 else f"d{-level}" if level < 0 else "z"


def _slug(token_class: str) -> str:
    return str(escape("".join(c if c.isalnum() else "-" for c in token_class)))
