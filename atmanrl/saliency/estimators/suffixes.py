"""Losses of altered rollouts from their altered rows alone, on top of one unaltered run.

Whatever happens to chain-of-thought token v changes rows v and later only. Those rows are recomputed against the
unaltered run's keys and values of everything before v, which is a nested range of one shared prefix: the variants of
a T-token rollout cost about T / 2 forwards instead of T. It works from an unbiased run only: a prefix has no bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels import AttentionPlan
from atman_kernels.hf import KeyValueRecord
from atmanrl.models import working_copy
from atmanrl.progress import track
from atmanrl.rollout import Rollout
from atmanrl.saliency.budget import halving_on_out_of_memory, rows_that_fit, within
from atmanrl.saliency.decoder import why_unsupported
from atmanrl.saliency.estimators.batches import bias_dtype
from atmanrl.saliency.frozen import frozen
from atmanrl.saliency.likelihood import ModelLikelihood, prompt_keys_and_values
from atmanrl.saliency.packing import PackedRollouts


@dataclass(frozen=True)
class Suffix:
    """A rollout altered from one of its chain-of-thought tokens on.

    Attributes:
        rollout: its index.
        start: the first token that is altered, 0..T-1.
        suppressed: tokens whose key columns get a bias, all at ``start`` or later.
        token: id in place of the token at ``start``; None keeps it.
    """

    rollout: int
    start: int
    suppressed: tuple[int, ...] = ()
    token: int | None = None


def suffix_rows(rollout: Rollout, start: int) -> int:
    """Rows that recomputing from chain-of-thought token ``start`` takes."""
    return len(rollout.completion_ids) - 1 - start


def suffix_losses(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    suffixes: Sequence[Suffix],
    *,
    bias: float = 0.0,
    token_budget: int | None = None,
    progress: bool = False,
    what: str = "variants",
) -> Tensor:
    """Mean negative log-likelihood of the answer under each suffix, (n,) float64 nats on the CPU.

    Equals a full forward per variant up to rounding.

    Args:
        model: a causal LM on transformers' AttentionInterface, adapted or sharded as :func:`working_copy` allows (then
            every rank must call); borrowed frozen.
        rollouts: each with a chain of thought and an answer.
        suffixes: in any order; those of neighbouring rollouts share batches.
        bias: of the suppressed columns, natural-log units; -inf hides them.
        token_budget: rows per forward, both of unaltered runs and of suffixes; one that is longer runs alone. What is
            kept between forwards is the keys and values of at most so many rows. None: see `rows_that_fit`. If memory
            runs out, half of it is tried once.
        progress: show a bar on stderr, labelled ``what``.
    """
    by_rollout: dict[int, list[int]] = {}
    for number, suffix in enumerate(suffixes):
        by_rollout.setdefault(suffix.rollout, []).append(number)
    losses = torch.full((len(suffixes),), torch.nan, dtype=torch.float64)

    def run(budget: int) -> None:
        total = sum(1 for _ in _work(rollouts, suffixes, by_rollout, budget)) if progress else None
        bases: tuple[int, ...] = ()
        prefix: KeyValueRecord | None = None
        work = _work(rollouts, suffixes, by_rollout, budget)
        for members, numbers in track(work, what, progress, total=total):
            batch = _pack(rollouts, members, [suffixes[number] for number in numbers], model.device)
            if prefix is None or members != bases:
                # The former record goes first, so that two are never held.
                bases, prefix = members, None
                prefix = prompt_keys_and_values(model, batch)
            cot_bias = torch.full((len(batch.cot_columns),), bias, dtype=bias_dtype(model), device=model.device)
            nll = ModelLikelihood(model, batch, prefix)(batch.key_bias(cot_bias))
            losses[numbers] = batch.mean_per_rollout(nll.double()).cpu()

    model = working_copy(model)
    with frozen(model), torch.no_grad():
        rows = sum(suffix_rows(rollouts[suffix.rollout], suffix.start) for suffix in suffixes)
        if token_budget is None:
            altered = [rollouts[index] for index in by_rollout]
            token_budget = rows_that_fit(model, altered, fast=why_unsupported(model) is None)
        halving_on_out_of_memory(run, min(token_budget, rows))
    return losses


def _work(
    rollouts: Sequence[Rollout], suffixes: Sequence[Suffix], by_rollout: dict[int, list[int]], budget: int
) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """(rollouts whose unaltered runs are held, numbers of the suffixes of one forward)."""
    for members in within(budget, list(by_rollout), [len(rollouts[index]) for index in by_rollout]):
        numbers = [number for index in members for number in by_rollout[index]]
        sizes = [suffix_rows(rollouts[suffixes[i].rollout], suffixes[i].start) for i in numbers]
        for group in within(budget, numbers, sizes):
            yield tuple(members), group


def _pack(
    rollouts: Sequence[Rollout], members: Sequence[int], suffixes: Sequence[Suffix], device: torch.device
) -> PackedRollouts:
    """Suffixes as a batch whose "prompts" are the unaltered runs of ``members``, nested where a suffix starts late."""
    runs = [rollouts[index].prompt_ids + rollouts[index].completion_ids[:-1] for index in members]
    lengths = [len(run) for run in runs]
    first_row = dict(zip(members, torch.tensor([0, *lengths[:-1]]).cumsum(0).tolist(), strict=True))
    ids: list[int] = []
    positions: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    loss_rows: list[int] = []
    kept: list[int] = []
    for suffix in suffixes:
        rollout = rollouts[suffix.rollout]
        prompt, completion, begin = len(rollout.prompt_ids), rollout.completion_ids, len(ids)
        ids += completion[suffix.start : -1]
        if suffix.token is not None:
            ids[begin] = suffix.token
        positions += range(prompt + suffix.start, prompt + len(completion) - 1)
        columns += [begin + token - suffix.start for token in suffix.suppressed]
        targets += rollout.answer_ids
        loss_rows += range(len(ids) - len(rollout.answer_ids), len(ids))
        kept.append(prompt + suffix.start)

    def on_device(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def plan(lengths_q: list[int]) -> AttentionPlan:
        rows = [suffix_rows(rollouts[suffix.rollout], suffix.start) for suffix in suffixes]
        return AttentionPlan(lengths_q, rows, [first_row[suffix.rollout] for suffix in suffixes], kept, device=device)

    answers = [len(rollouts[suffix.rollout].answer_ids) for suffix in suffixes]
    return PackedRollouts(
        prompt_ids=on_device([token for run in runs for token in run]),
        prompt_positions=on_device([i for length in lengths for i in range(length)]),
        prompt_plan=AttentionPlan(lengths, device=device),
        ids=on_device(ids),
        positions=on_device(positions),
        plan=plan([suffix_rows(rollouts[suffix.rollout], suffix.start) for suffix in suffixes]),
        cot_columns=on_device(columns),
        cot_lengths=tuple(len(suffix.suppressed) for suffix in suffixes),
        loss_rows=on_device(loss_rows),
        loss_plan=plan(answers),
        loss_targets=on_device(targets),
        loss_rollout=on_device([i for i, n in enumerate(answers) for _ in range(n)]),
        loss_lengths=on_device(answers),
    )
