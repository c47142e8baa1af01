"""Losses of an answer under altered chains of thought: packed, teacher-forced forwards of many variants."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from atmanrl.rollout import Rollout
from atmanrl.saliency.batches import Batch, in_batches, prepared
from atmanrl.saliency.likelihood import ModelLikelihood
from atmanrl.saliency.packing import whole

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Variant:
    """A rollout with some of its chain-of-thought tokens hidden from every row, their positions kept.

    Attributes:
        rollout: with an answer; its chain of thought may be empty.
        hidden: (T,) bool, or None for none. A hidden column has a key bias of -inf in all layers and heads, which is
            the same as deleting its keys and values.
    """

    rollout: Rollout
    hidden: Mask | None = None


@dataclass(frozen=True)
class Outcome:
    """The original answer under a variant.

    Attributes:
        nll: mean negative log-likelihood of its tokens, nats.
        unchanged: whether each of its tokens is the most likely one: whether greedy decoding would still write it.
    """

    nll: float
    unchanged: bool

    @property
    def probability(self) -> float:
        """exp(-nll), the geometric mean of the tokens' probabilities, in 0..1."""
        return math.exp(-self.nll)


def answer_log_probabilities(
    model: PreTrainedModel, variants: Sequence[Variant], *, rows: int | None = None
) -> Iterator[Tensor]:
    """Log-probabilities of the next token at each position of the answer, (N, V) fp32, one tensor per variant.

    Variants of one rollout share their prompt's forward where they stand next to each other.

    Args:
        model: see :func:`atmanrl.saliency.batches.prepared` (where it is sharded every rank must call); borrowed frozen
            while a batch runs.
        variants: in the order of the results.
        rows: packed rows per batch, see ``token_budget`` of :func:`atmanrl.saliency.batches.in_batches`.

    Raises:
        ValueError: for a rollout without an answer, or a ``hidden`` of another length than its chain of thought.
    """
    for variant in variants:
        _check(variant)
    # At the call, not at the first variant: a rank without any takes part in gathering a sharded model.
    model = prepared(model, [variant.rollout for variant in variants])
    segments = [whole(_with_a_row(variant.rollout)) for variant in variants]

    def compute(batch: Batch) -> Sequence[Tensor]:
        bias = torch.cat([_bias(variants[number]) for number in batch.numbers]).to(model.device)
        assert isinstance(batch.likelihood, ModelLikelihood)
        with torch.no_grad():
            logits = batch.likelihood.logits(batch.packed.key_bias(bias))
        return list(logits.split([len(segment.targets) for segment in batch.packed.segments]))

    found = in_batches(model, segments, compute, token_budget=rows, forward_only=True)
    # One variant's at a time: in float32 a vocabulary is large.
    return (logits.float().log_softmax(-1) for logits in found)


def outcomes(model: PreTrainedModel, variants: Sequence[Variant], *, rows: int | None = None) -> list[Outcome]:
    """The `Outcome` of each variant; arguments as for `answer_log_probabilities`."""
    results = []
    found = answer_log_probabilities(model, variants, rows=rows)
    for variant, log_probabilities in zip(variants, found, strict=True):
        targets = torch.tensor(variant.rollout.answer_ids, device=log_probabilities.device)
        own = log_probabilities.gather(1, targets[:, None])
        unchanged = bool((log_probabilities.argmax(1) == targets).all())
        results.append(Outcome(-float(own.mean()), unchanged))
    return results


def _check(variant: Variant) -> None:
    length = len(variant.rollout.cot_ids)
    if not variant.rollout.answer_ids:
        raise ValueError("a rollout without an answer has no outcome")
    if variant.hidden is not None and variant.hidden.shape != (length,):
        raise ValueError(f"hidden has shape {variant.hidden.shape}, the chain of thought {length} tokens")


def _with_a_row(rollout: Rollout) -> Rollout:
    # The row that predicts the answer's first token must be a packed one: an empty chain of thought borrows the
    # prompt's last token, which is the same computation, as nothing is hidden there.
    if rollout.cot_ids:
        return rollout
    if len(rollout.prompt_ids) < 2:
        raise ValueError("a prompt of one token and an empty chain of thought leave no prefix")
    return replace(rollout, prompt_ids=rollout.prompt_ids[:-1], cot_ids=rollout.prompt_ids[-1:])


def _bias(variant: Variant) -> Tensor:
    bias = torch.zeros(max(1, len(variant.rollout.cot_ids)))
    if variant.hidden is not None and len(variant.hidden):
        bias[torch.from_numpy(variant.hidden)] = -math.inf
    return bias
