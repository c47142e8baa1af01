"""Chains of thought as HTML: sentences of words of tokens, each with the shade of its score."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

from atmanrl.records import RolloutRecord, TokenSpan
from atmanrl.report.glyphs import visible
from atmanrl.report.scale import Scale
from atmanrl.report.units import sentences, words


def span_html(span: TokenSpan) -> Markup:
    """A span's text without scores."""
    return _without_indent(Markup("").join(_token(text, "t") for text in span.texts))


def scored_html(rollout: RolloutRecord, score: str, scale: Scale) -> Markup:
    """The chain of thought of a rollout; a word's and a sentence's score is the mean over its tokens.

    Without scores the tokens stand untinted. Every character that came from a tokenizer is escaped.
    """
    texts = rollout.cot.texts
    values = rollout.scores.get(score)
    word_ranges = words(texts)
    html: list[Markup] = []
    next_word = 0
    for sentence in sentences(texts):
        inner: list[Markup] = []
        while next_word < len(word_ranges) and word_ranges[next_word].start < sentence.stop:
            word = word_ranges[next_word]
            tokens = Markup("").join(
                _token(texts[i], f"t {_shade(values, range(i, i + 1), scale)} c-{_slug(rollout.token_class(i))}", i)
                for i in word
            )
            inner.append(_group("w", tokens, _shade(values, word, scale)))
            next_word += 1
        html.append(_group("s", Markup("").join(inner), _shade(values, sentence, scale)))
    return _without_indent(Markup("").join(html))


def _without_indent(html: Markup) -> Markup:
    return Markup(html.lstrip(" "))


def _token(text: str, classes: str, index: int | None = None) -> Markup:
    shown = visible(text)
    # White space around a token stands outside its tint, so that neighbours stay apart.
    body = shown.strip() if text.strip() else shown
    lead = shown[: len(shown) - len(shown.lstrip())] if text.strip() else ""
    trail = shown[len(lead) + len(body) :]
    position = Markup("") if index is None else Markup(' data-i="{}"').format(index)
    faint = "" if text.strip() else " blank"
    return Markup('{}<span class="{}{}"{}>{}</span>{}').format(lead, classes, faint, position, body, trail)


def _group(kind: str, inner: Markup, shade: str) -> Markup:
    return Markup('<span class="{} {}">{}</span>').format(kind, shade, inner)


def _shade(values: Sequence[float] | None, tokens: range, scale: Scale) -> str:
    if values is None:
        return "z"
    level = scale.level(sum(values[i] for i in tokens) / len(tokens))
    return f"u{level}" if level > 0 else f"d{-level}" if level < 0 else "z"


def _slug(token_class: str) -> str:
    return str(escape("".join(c if c.isalnum() else "-" for c in token_class)))
