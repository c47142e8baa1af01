"""Packed batches within a budget of rows, each with the likelihood of its answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atmanrl.progress import progress_bar
from atmanrl.rollout import Rollout
from atmanrl.saliency.budget import halving_on_out_of_memory, rows_that_fit, split
from atmanrl.saliency.decoder import FrozenDecoder, why_unsupported
from atmanrl.saliency.estimators.interface import TokenScores
from atmanrl.saliency.frozen import frozen
from atmanrl.saliency.likelihood import AnswerLikelihood, ModelLikelihood
from atmanrl.saliency.packing import PackedRollouts, pack
from atmanrl.saliency.result import check_finite


@dataclass(frozen=True)
class Batch:
    """Rollouts packed together.

    Attributes:
        rollouts: in the order given.
        numbers: what they are called in messages.
        packed: their layout.
        likelihood: of their answers.
        dtype: of biases and losses.
        passed: called after every pass.
    """

    rollouts: list[Rollout]
    numbers: list[int]
    packed: PackedRollouts
    likelihood: AnswerLikelihood
    dtype: torch.dtype
    passed: Callable[[], None]

    def losses(self, cot_bias: Tensor) -> Tensor:
        """(n,) mean negative log-likelihood of each answer under ``cot_bias`` (C_total,), differentiable in it.

        Raises:
            NonFiniteLossError: on a CPU; elsewhere the check would wait for the device, and the scores are looked at.
        """
        losses = self.packed.mean_per_rollout(self.likelihood(self.packed.key_bias(cot_bias)))
        if losses.device.type == "cpu":
            check_finite(losses.detach(), self.numbers, "under a bias")
        self.passed()
        return losses

    def per_token(self, per_rollout: Tensor) -> Tensor:
        """(C_total,) each rollout's number at each of its tokens."""
        lengths = torch.tensor(self.packed.cot_lengths, device=per_rollout.device)
        # With its size known nothing waits for the device.
        return per_rollout.repeat_interleave(lengths, output_size=len(self.packed.cot_columns))

    def filled(self, value: float) -> Tensor:
        """(C_total,) of ``value``."""
        return torch.full((len(self.packed.cot_columns),), value, dtype=self.dtype, device=self.packed.ids.device)


def score_in_batches(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    score: Callable[[Batch], list[TokenScores]],
    *,
    token_budget: int | None,
    progress: bool,
    what: str,
    passes: int = 1,
    observed: bool = False,
) -> list[TokenScores]:
    """What ``score`` finds in packed batches of ``rollouts``, in their order.

    If memory runs out, the batches that are left are tried once more at half the size.

    Args:
        model: borrowed :func:`atmanrl.saliency.frozen.frozen`.
        score: one `TokenScores` per rollout of a batch.
        token_budget: packed rows per batch, prompts included; None: see `rows_that_fit`. A longer rollout forms a
            batch of its own.
        what: named beside the progress bar.
        passes: over each batch, which the bar counts for each rollout.
        observed: run the model's own modules, where their attention can be observed, and forwards only.
    """
    results: list[TokenScores] = []
    with frozen(model):
        known = why_unsupported(model) is None
        make = FrozenDecoder if known and not observed else ModelLikelihood
        if token_budget is None:
            token_budget = rows_that_fit(model, rollouts, fast=known)

        def scored(group: list[int]) -> list[TokenScores]:
            members = [rollouts[index] for index in group]
            packed = pack(members, answer_loss="value", device=model.device)
            done = itertools.count(passes * len(results) + len(group), len(group))
            likelihood = make(model, packed)
            return score(Batch(members, group, packed, likelihood, bias_dtype(model), lambda: show(next(done))))

        def run(budget: int) -> None:
            for group in split(rollouts, range(len(results), len(rollouts)), budget):
                results.extend(scored(group))

        with progress_bar(f"{what}, passes", passes * len(rollouts), progress) as show:
            halving_on_out_of_memory(run, min(token_budget, sum(map(len, rollouts))))
    return results


def bias_dtype(model: PreTrainedModel) -> torch.dtype:
    """float32, or float64 for a float64 model."""
    return torch.float64 if model.dtype == torch.float64 else torch.float32
