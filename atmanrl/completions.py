"""Completions split on tokens into chain of thought, marker and answer."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from atmanrl.answers import AnswerFormat, ParsedAnswer
from atmanrl.chat import end_of_turn_ids
from atmanrl.rollout import Rollout, as_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        end_ids: token ids that end a completion; None takes those of the tokenizer (`atmanrl.chat.end_of_turn_ids`).
    """
    ends = end_of_turn_ids(tokenizer) if end_ids is None else end_ids
    length = next((i for i, token in enumerate(completion_ids) if token in ends), len(completion_ids))
    ids = as_ids("completion_ids", completion_ids[:length])
    text = _decode(tokenizer, ids)
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
    before = len(_complete(_decode(tokenizer, split.cot_ids + split.marker_ids)))
    head = split.text[before : answer.value_span[0]]
    ids = as_ids("gold", tokenizer.encode(head + gold, add_special_tokens=False))
    # SentencePiece puts a space before every text, also where the marker's last token already holds it.
    lone_space = not head and len(ids) > 1 and tokenizer.convert_ids_to_tokens(ids[0]) == "\u2581"
    return ids[1:] if lone_space else ids


def _first_token_of(position: int, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Index of the first token with any byte of the text's character at ``position``."""

    def touched(count: int) -> bool:
        text = _decode(tokenizer, ids[:count])
        complete = len(_complete(text))
        return complete > position or (complete == position and complete < len(text))

    return bisect_left(range(len(ids) + 1), True, key=touched) - 1


def _tokens_until(position: int, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens it takes to have all bytes of the text's first ``position`` characters."""

    def covered(count: int) -> bool:
        return len(_complete(_decode(tokenizer, ids[:count]))) >= position

    return bisect_left(range(len(ids) + 1), True, key=covered)


def _complete(text: str) -> str:
    # A character whose bytes have not all been generated decodes to one or more replacement characters.
    return text.rstrip("\ufffd")


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if not isinstance(text, str):
        raise TypeError(f"the tokenizer decoded one completion to {type(text).__name__}")
    return text
