"""From generated or given token ids to the records of a run: split, scores, token texts and classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atmanrl.answers import AnswerFormat, CompletionSplit, split_completion
from atmanrl.evaluation.records import (
    RESTORED,
    MaskLoss,
    RolloutRecord,
    TokenSpan,
    Trajectory,
    decimals,
)
from atmanrl.models import end_of_turn_ids
from atmanrl.rollout import Rollout
from atmanrl.saliency import Estimator, Mask, NonFiniteLossError, TokenScores, estimate_saliency

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
    rescue: Callable[[list[RolloutRecord]], object] | None = None,
) -> list[RolloutRecord]:
    """Split completions into chain of thought, marker and answer, and score their tokens.

    Args:
        model: the model whose answers are explained, frozen while tokens are scored.
        tokenizer: its tokenizer.
        completions: what to record.
        estimator: scores the tokens; None records no saliency.
        batch: rollouts per call of `estimate_saliency`; scores do not depend on the companions.
        progress: show progress bars on stderr.
        rescue: called with the records so far where an error ends the scoring, before the error is raised again. Those
            that were not scored say so in ``skipped``.
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

    def records(unscored: str | None = None) -> list[RolloutRecord]:
        return [
            record_one(
                tokenizer,
                item,
                splits[i],
                saliency.get(i),
                unscored if i in rollouts and i not in saliency else reasons[i],
                ends,
            )
            for i, item in enumerate(completions)
        ]

    order = list(rollouts)
    try:
        for start in range(0, len(order), batch):
            assert estimator is not None
            members = order[start : start + batch]
            result = estimate_saliency(model, [rollouts[i] for i in members], estimator, progress=progress)
            saliency.update(zip(members, result, strict=True))
    except BaseException as error:
        if rescue is not None:
            rescue(records(f"not scored: {type(error).__name__} ended the run"))
        raise
    return records()


def check_support(model: PreTrainedModel, estimator: Estimator, token: int) -> None:
    """Score a rollout of three tokens, so that a model that the estimator cannot read is refused before any other work.

    Args:
        model: the model to be explained.
        estimator: what will score its rollouts; a mask takes no step here.
        token: any token id of the model.

    Raises:
        ValueError: as `estimate_saliency`.
    """
    if isinstance(estimator, Mask):
        estimator = replace(estimator, config=replace(estimator.config, steps=0), record_every=None)
    # A loss that is not finite is a matter of the three tokens.
    with suppress(NonFiniteLossError):
        estimate_saliency(model, [Rollout((token,), (token,), (token,))], estimator, progress=False)


def unusable(prompt_id: str, reason: str, expected: str | None = None) -> RolloutRecord:
    """The record of a row that could not be used: no tokens, and the reason in ``skipped``."""
    return RolloutRecord(prompt_id, TokenSpan(), TokenSpan(), expected=expected, skipped=reason)


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
    measured = {} if saliency is None else _measured(saliency)
    return RolloutRecord(
        prompt_id=item.prompt_id,
        sample=item.sample,
        prompt=prompt,
        cot=cot,
        marker=marker,
        answer=answer,
        rest=rest,
        classes=() if item.classify is None else tuple(item.classify(texts)[: len(cot)]),
        predicted=predicted,
        expected=item.expected,
        correct=None if item.expected is None else predicted is not None and _same(item, predicted),
        truncated=not (split.finished or item.given),
        skipped=skipped,
        measures=_other_parser(item, split),
        **measured,
    )


def _same(item: Completion, predicted: str) -> bool:
    assert item.expected is not None
    # A truth that the answer's format cannot read ("Paris" behind a number) is another text, and no error.
    if item.answer_format.canonical(item.expected) is None:
        return predicted.split() == item.expected.split()
    return item.answer_format.matches(predicted, item.expected)


def _measured(saliency: TokenScores) -> dict[str, Any]:
    """The fields of a record that an estimator fills."""
    losses = saliency.loss_initial, saliency.loss_final, saliency.loss_unmasked
    course = saliency.trajectory
    return {
        "scores": {score_name(saliency.estimator): _decimals(saliency.scores)},
        "loss": MaskLoss(*losses) if all(map(math.isfinite, losses)) else None,
        "trajectory": course
        and Trajectory(
            steps=tuple(course.steps.tolist()),
            loss=_decimals(course.losses),
            restored=tuple(_decimals(row) for row in course.scores),
        ),
    }


def _decimals(values: Tensor) -> tuple[float, ...]:
    return decimals(values.float().numpy())


def _span(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> TokenSpan:
    return TokenSpan(tuple(ids), token_texts(tokenizer, ids))


def _other_parser(item: Completion, split: CompletionSplit) -> dict[str, float]:
    # Published accuracies differ in how strictly an answer must be announced: both are reported.
    flexible = item.answer_format.flexible
    if item.expected is None or flexible is None or flexible.canonical(item.expected) is None:
        return {}
    return {"accuracy_flexible": float(flexible.accepts(split.text, item.expected))}


def _reason_to_skip(split: CompletionSplit) -> str | None:
    if split.answer is None:
        return "no answer found"
    return None if split.cot_ids else "no chain of thought"


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text: Any = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)
