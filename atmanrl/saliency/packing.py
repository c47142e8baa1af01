"""Rollouts packed one after another, their prompts beside them: what every step of every estimator shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atman_kernels import AttentionPlan
from atmanrl.config import AnswerLoss
from atmanrl.rollout import Rollout


@dataclass(frozen=True)
class PackedRollouts:
    """The rows that exist, in order, and where each rollout's tokens lie among them.

    Row i of a rollout holds its completion token i at position ``len(prompt_ids) + i``. The last answer token has no
    row, because nothing follows it, so a rollout has T + K + N - 1 rows (CoT, marker, answer). Prompts are packed
    separately, each distinct one once.

    Attributes:
        prompt_ids, prompt_positions: (P_total,) int64.
        prompt_plan: one sequence per distinct prompt.
        ids, positions: (R_total,) int64, rows of all rollouts.
        plan: one sequence per rollout; its prefix range is its prompt among the packed prompts.
        cot_columns: (C_total,) int64, the packed column of each CoT token, rollout after rollout.
        cot_lengths: CoT tokens of each rollout.
        loss_rows: (L_total,) int64, the rows that predict the tokens of the loss: the last ones of each rollout.
        loss_plan: as ``plan``, with only those rows as queries.
        loss_targets: (L_total,) int64, those tokens.
        loss_rollout: (L_total,) int64, the rollout each belongs to.
        loss_lengths: (n,) int64, tokens of the loss per rollout.
    """

    prompt_ids: Tensor
    prompt_positions: Tensor
    prompt_plan: AttentionPlan
    ids: Tensor
    positions: Tensor
    plan: AttentionPlan
    cot_columns: Tensor
    cot_lengths: tuple[int, ...]
    loss_rows: Tensor
    loss_plan: AttentionPlan
    loss_targets: Tensor
    loss_rollout: Tensor
    loss_lengths: Tensor

    @property
    def n_rollouts(self) -> int:
        """Number of rollouts."""
        return len(self.cot_lengths)

    @property
    def n_rows(self) -> int:
        """Packed rows of all rollouts together."""
        return int(self.ids.shape[0])

    def key_bias(self, cot_bias: Tensor) -> Tensor:
        """The bias of every packed column, (R_total,): ``cot_bias`` (C_total,) on CoT columns, 0 elsewhere."""
        return cot_bias.new_zeros(self.n_rows).index_copy(0, self.cot_columns, cot_bias)

    def mean_per_rollout(self, nll: Tensor) -> Tensor:
        """(n,) means of ``nll`` (L_total,) over each rollout's own tokens."""
        sums = nll.new_zeros(self.n_rollouts).index_add(0, self.loss_rollout, nll)
        return sums / self.loss_lengths.to(nll.dtype)


def pack(rollouts: Sequence[Rollout], *, answer_loss: AnswerLoss, device: torch.device) -> PackedRollouts:
    """Lay out rollouts, each with a chain of thought and an answer, as one batch.

    Args:
        rollouts: at least one; equal ``prompt_ids`` share their rows.
        answer_loss: see :class:`atmanrl.MaskConfig`.
        device: where the tensors go.
    """
    prompts: dict[tuple[int, ...], int] = {}
    prompt_end = 0
    for rollout in rollouts:
        if rollout.prompt_ids not in prompts:
            prompts[rollout.prompt_ids] = prompt_end
            prompt_end += len(rollout.prompt_ids)

    ids: list[int] = []
    positions: list[int] = []
    cot_columns: list[int] = []
    loss_rows: list[int] = []
    loss_targets: list[int] = []
    loss_rollout: list[int] = []
    for index, rollout in enumerate(rollouts):
        start, prompt, completion = len(ids), len(rollout.prompt_ids), rollout.completion_ids
        ids += completion[:-1]
        positions += range(prompt, prompt + len(completion) - 1)
        cot_columns += range(start, start + len(rollout.cot_ids))
        targets = [completion[place] for place in loss_tokens(rollout, answer_loss)]
        # The row before a token predicts it; the CoT is not empty, so that row exists.
        loss_rows += range(start + len(completion) - len(targets) - 1, start + len(completion) - 1)
        loss_targets += targets
        loss_rollout += [index] * len(targets)

    def on_device(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def plan(lengths_q: list[int]) -> AttentionPlan:
        return AttentionPlan(
            lengths_q,
            [len(rollout.completion_ids) - 1 for rollout in rollouts],
            [prompts[rollout.prompt_ids] for rollout in rollouts],
            [len(rollout.prompt_ids) for rollout in rollouts],
            device=device,
        )

    loss_lengths = [len(loss_tokens(rollout, answer_loss)) for rollout in rollouts]
    return PackedRollouts(
        prompt_ids=on_device([i for prompt in prompts for i in prompt]),
        prompt_positions=on_device([i for prompt in prompts for i in range(len(prompt))]),
        prompt_plan=AttentionPlan([len(prompt) for prompt in prompts], device=device),
        ids=on_device(ids),
        positions=on_device(positions),
        plan=plan([len(rollout.completion_ids) - 1 for rollout in rollouts]),
        cot_columns=on_device(cot_columns),
        cot_lengths=tuple(len(rollout.cot_ids) for rollout in rollouts),
        loss_rows=on_device(loss_rows),
        loss_plan=plan(loss_lengths),
        loss_targets=on_device(loss_targets),
        loss_rollout=on_device(loss_rollout),
        loss_lengths=on_device(loss_lengths),
    )


def loss_tokens(rollout: Rollout, answer_loss: AnswerLoss) -> range:
    """Places in the completion of the tokens of the loss: the answer's, for "all" the marker's as well."""
    behind = len(rollout.cot_ids) + (len(rollout.marker_ids) if answer_loss == "value" else 0)
    return range(behind, len(rollout.completion_ids))
