"""From generated or given token ids to records: split, masks, token texts and classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atmanrl.answers import AnswerFormat
from atmanrl.chat import end_of_turn_ids
from atmanrl.completions import CompletionSplit, split_completion
from atmanrl.evaluation.records import RESTORED, MaskLoss, RolloutRecord, TokenSpan, Trajectory
from atmanrl.rollout import Rollout
from atmanrl.saliency import Estimator, TokenScores, estimate_saliency

# A character takes at most four bytes, and so at most four tokens.
_LONGEST_CHARACTER = 4


@dataclass(frozen=True)
class Completion:
    """One completion to record.

    Attributes:
        prompt_id, sample, expected: see `RolloutRecord`.
        prompt_ids, completion_ids: token ids, end of turn included where one was generated.
        answer_format: finds and compares the answer.
        given: it was handed in, and is whole without an end of turn.
        classify: names the classes of the completion's tokens from their texts, where the task knows them.
    """

    prompt_id: str
    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    answer_format: AnswerFormat
    expected: str | None = None
    sample: int = 0
    given: bool = False
    classify: Callable[[Sequence[str]], list[str]] | None = None


def record(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    completions: Sequence[Completion],
    *,
    estimator: Estimator | None,
    batch: int = 64,
    progress: bool = False,
) -> list[RolloutRecord]:
    """Split completions into chain of thought, marker and answer, and score their tokens.

    Args:
        model: the model whose answers are explained, frozen while tokens are scored.
        tokenizer: its tokenizer.
        completions: what to record.
        estimator: scores the tokens; None records no saliency.
        batch: rollouts per call of `estimate_saliency`; scores do not depend on the companions.
        progress: show progress bars on stderr.
    """
    ends = end_of_turn_ids(tokenizer, model.generation_config.eos_token_id)
    splits = [
        split_completion(item.completion_ids, tokenizer, item.answer_format, end_ids=ends) for item in completions
    ]
    reasons = ["saliency not asked for" if estimator is None else _reason_to_skip(split) for split in splits]
    rollouts = {
        i: Rollout(tuple(item.prompt_ids), split.cot_ids, split.answer_ids, split.marker_ids)
        for i, (item, split) in enumerate(zip(completions, splits, strict=True))
        if reasons[i] is None
    }
    saliency: dict[int, TokenScores] = {}
    order = list(rollouts)
    for start in range(0, len(order), batch):
        assert estimator is not None
        members = order[start : start + batch]
        result = estimate_saliency(model, [rollouts[i] for i in members], estimator, progress=progress)
        saliency.update(zip(members, result, strict=True))
    return [
        record_one(tokenizer, item, splits[i], saliency.get(i), reasons[i], ends) for i, item in enumerate(completions)
    ]


def score_name(estimator: str) -> str:
    """What an estimator's scores are called in a record: ``RESTORED`` for the mask's, else its own name."""
    return RESTORED if estimator == "mask" else estimator


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, ...]:
    """The text each token contributes to the decoded whole, special tokens included.

    A token that ends inside a character contributes "", the token that completes the character all of it. Texts are
    differences of decoded windows, because a token alone may decode without its leading space.
    """
    texts: list[str] = []
    window = 0
    emitted = 0
    for i in range(len(ids)):
        before = _decode(tokenizer, ids[window:emitted])
        now = _decode(tokenizer, ids[window : i + 1])
        incomplete = now.endswith("\ufffd") and i + 1 - emitted < _LONGEST_CHARACTER and i + 1 < len(ids)
        if incomplete:
            texts.append("")
            continue
        texts.append(now[len(before) :])
        window, emitted = emitted, i + 1
    return tuple(texts)


def record_one(
    tokenizer: PreTrainedTokenizerBase,
    item: Completion,
    split: CompletionSplit,
    saliency: TokenScores | None,
    skipped: str | None,
    ends: Collection[int],
) -> RolloutRecord:
    """The record of a completion that has been split and, unless ``skipped`` says why not, scored.

    Args:
        tokenizer: the one it was written with.
        item: the completion; split: its parts; saliency: its scores.
        skipped: why there are none.
        ends: ids of the end-of-turn tokens.
    """
    prompt = _span(tokenizer, item.prompt_ids)
    texts = token_texts(tokenizer, item.completion_ids)
    lengths = [len(split.cot_ids), len(split.marker_ids), len(split.answer_ids)]
    borders = [0, lengths[0], sum(lengths[:2]), sum(lengths), len(texts)]
    cot, marker, answer, rest = (
        TokenSpan(tuple(item.completion_ids[start:stop]), texts[start:stop]) for start, stop in pairwise(borders)
    )
    predicted = None if split.answer is None else split.answer.value
    correct = None
    if item.expected is not None:
        correct = predicted is not None and item.answer_format.matches(predicted, item.expected)
    return RolloutRecord(
        prompt_id=item.prompt_id,
        sample=item.sample,
        prompt=prompt,
        cot=cot,
        marker=marker,
        answer=answer,
        rest=rest,
        classes=() if item.classify is None else tuple(item.classify(texts)[: len(cot)]),
        scores=_scores(saliency),
        predicted=predicted,
        expected=item.expected,
        correct=correct,
        truncated=not (split.finished or item.given),
        skipped=skipped,
        loss=_loss(saliency),
        measures=_other_parser(item, split),
        trajectory=_trajectory(saliency),
    )


def _span(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> TokenSpan:
    return TokenSpan(tuple(ids), token_texts(tokenizer, ids))


def _scores(saliency: TokenScores | None) -> Mapping[str, tuple[float, ...]]:
    if saliency is None:
        return {}
    return {score_name(saliency.estimator): decimals(saliency.scores)}


def _loss(saliency: TokenScores | None) -> MaskLoss | None:
    if saliency is None:
        return None
    losses = saliency.loss_initial, saliency.loss_final, saliency.loss_unmasked
    return MaskLoss(*losses) if all(map(math.isfinite, losses)) else None


def _other_parser(item: Completion, split: CompletionSplit) -> dict[str, float]:
    # Published accuracies differ in how strictly an answer must be announced: both are reported.
    flexible = item.answer_format.flexible
    if item.expected is None or flexible is None:
        return {}
    return {"accuracy_flexible": float(flexible.accepts(split.text, item.expected))}


def _trajectory(saliency: TokenScores | None) -> Trajectory | None:
    if saliency is None or saliency.trajectory is None:
        return None
    course = saliency.trajectory
    return Trajectory(
        steps=tuple(course.steps.tolist()),
        loss=decimals(course.losses),
        restored=tuple(decimals(row) for row in course.scores),
    )


def decimals(values: Tensor) -> tuple[float, ...]:
    """The shortest decimals that still tell float32 values apart: files stay small and lose nothing."""
    return tuple(float(str(value)) for value in values.float().numpy())


def _reason_to_skip(split: CompletionSplit) -> str | None:
    if split.answer is None:
        return "no answer found"
    return None if split.cot_ids else "no chain of thought"


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text: Any = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)
