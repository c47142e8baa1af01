"""What becomes of an answer when its chain of thought is altered: packed forwards of many variants, teacher forced."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from atmanrl.models import working_copy
from atmanrl.rollout import Rollout
from atmanrl.saliency.budget import halving_on_out_of_memory, rows_that_fit, within
from atmanrl.saliency.decoder import why_unsupported
from atmanrl.saliency.frozen import frozen
from atmanrl.saliency.likelihood import ModelLikelihood
from atmanrl.saliency.packing import pack

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

    Variants of one rollout share their prompt's forward where they stand in the same batch.

    Args:
        model: a causal LM on transformers' AttentionInterface, adapted or sharded as :func:`working_copy` allows (then
            every rank must call); borrowed frozen while a batch runs.
        variants: in the order of what is returned.
        rows: packed rows per forward, prompts not counted; a longer variant runs alone. None: see `rows_that_fit`. If
            memory runs out, half of it is tried once and kept.

    Raises:
        ValueError: for a rollout without an answer, or a ``hidden`` of another length than its chain of thought.
    """
    for variant in variants:
        _check(variant)
    # At the call, not at the first variant: a rank without any takes part in gathering a sharded model.
    model = working_copy(model)
    if rows is None and variants:
        with frozen(model):
            packed = [_with_a_row(variant.rollout) for variant in variants]
            rows = rows_that_fit(model, packed, fast=why_unsupported(model) is None)
    return _in_batches(model, variants, rows or 1)


def _in_batches(model: PreTrainedModel, variants: Sequence[Variant], rows: int) -> Iterator[Tensor]:
    sizes = [len(variant.rollout.completion_ids) for variant in variants]
    start = 0
    while start < len(variants):
        batch = next(within(rows, variants[start:], sizes[start:]))

        def run(budget: int, batch: Sequence[Variant] = batch) -> list[Tensor]:
            nonlocal rows
            rows = budget
            parts = within(budget, batch, [len(variant.rollout.completion_ids) for variant in batch])
            return [logits for part in parts for logits in _forward(model, part)]

        for logits in halving_on_out_of_memory(run, rows):
            # One variant's at a time: in float32 a vocabulary is large.
            yield logits.float().log_softmax(-1)
        start += len(batch)


def outcomes(model: PreTrainedModel, variants: Sequence[Variant], *, rows: int | None = None) -> list[Outcome]:
    """The `Outcome` of each variant; arguments as for `answer_log_probabilities`."""
    results = []
    for variant, log_probabilities in zip(variants, answer_log_probabilities(model, variants, rows=rows), strict=True):
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


@torch.no_grad()
def _forward(model: PreTrainedModel, variants: Sequence[Variant]) -> list[Tensor]:
    """(N, V) logits of each variant's answer, in the model's dtype."""
    with frozen(model), torch.no_grad():
        batch = pack([_with_a_row(variant.rollout) for variant in variants], answer_loss="value", device=model.device)
        bias = torch.cat([_bias(variant) for variant in variants]).to(model.device)
        logits = ModelLikelihood(model, batch).logits(batch.key_bias(bias))
        lengths = [len(variant.rollout.answer_ids) for variant in variants]
        return list(logits.split(lengths))


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
