"""Rows of many rollouts packed one after another, what they look back to beside them: one batch of every estimator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from atman_kernels import AttentionPlan
from atmanrl.config import AnswerLoss
from atmanrl.rollout import Rollout


@dataclass(frozen=True)
class Segment:
    """The rows of one rollout that a batch computes, behind tokens that run once beforehand.

    Row i holds token ``sequence[seen + i]`` at position ``seen + i``. It sees the first ``seen`` tokens of ``before``
    and its own rows up to itself.

    Attributes:
        rollout: whose rows these are.
        before: token ids that run once, without a bias; segments of a batch with equal ones share keys and values.
        sequence: token ids of prompt and completion; those from ``seen`` on have rows.
        seen: how many of the tokens of ``before`` the rows see.
        biased: the rows, counted from 0, whose key columns get a bias.
        targets: token ids whose likelihood is read, in order.
        behind: rows behind the one that predicts the last target.
        first: token id of the first row in place of the sequence's; None: the sequence's.
    """

    rollout: Rollout
    before: tuple[int, ...]
    sequence: tuple[int, ...]
    seen: int
    biased: Sequence[int] = ()
    targets: tuple[int, ...] = ()
    behind: int = 0
    first: int | None = None

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.sequence) - self.seen

    @property
    def ids(self) -> tuple[int, ...]:
        """Token ids of the rows."""
        own = self.sequence[self.seen :]
        return own if self.first is None else (self.first, *own[1:])

    @property
    def reading(self) -> range:
        """The rows that predict the targets."""
        stop = self.n_rows - self.behind
        return range(stop - len(self.targets), stop)


def whole(rollout: Rollout, answer_loss: AnswerLoss = "value") -> Segment:
    """The completion behind its prompt, with a bias on every chain-of-thought column.

    The last answer token has no row, because nothing follows it: T + K + N - 1 rows (CoT, marker, answer).

    Args:
        rollout: with a chain of thought and an answer.
        answer_loss: "value": the answer's tokens are read; "all": the marker's as well.
    """
    prompt, completion = rollout.prompt_ids, rollout.completion_ids
    unread = len(rollout.cot_ids) + (len(rollout.marker_ids) if answer_loss == "value" else 0)
    return Segment(
        rollout,
        before=prompt,
        sequence=prompt + completion[:-1],
        seen=len(prompt),
        biased=range(len(rollout.cot_ids)),
        targets=completion[unread:],
    )


@dataclass(frozen=True)
class PackedRollouts:
    """The rows of segments, in order, and where each segment's tokens lie among them.

    Attributes:
        segments: what was packed.
        prompts: the distinct ``before`` of the segments: each runs once.
        prompt_ids, prompt_positions: (P_total,) int64, their tokens.
        prompt_plan: one sequence per entry of ``prompts``.
        ids, positions: (R_total,) int64, rows of all segments.
        plan: one sequence per segment; its prefix range is what it sees of its ``before``.
        cot_columns: (C_total,) int64, the packed column of each biased token, segment after segment.
        loss_rows: (L_total,) int64, the rows that predict the targets.
        loss_targets: (L_total,) int64, those tokens.
        loss_rollout: (L_total,) int64, the segment each belongs to.
        loss_lengths: (n,) int64, targets per segment.
    """

    segments: tuple[Segment, ...]
    prompts: tuple[tuple[int, ...], ...]
    prompt_ids: Tensor
    prompt_positions: Tensor
    prompt_plan: AttentionPlan
    ids: Tensor
    positions: Tensor
    plan: AttentionPlan
    cot_columns: Tensor
    loss_rows: Tensor
    loss_targets: Tensor
    loss_rollout: Tensor
    loss_lengths: Tensor

    @property
    def n_rollouts(self) -> int:
        """Number of segments."""
        return len(self.segments)

    @property
    def n_rows(self) -> int:
        """Packed rows of all segments together."""
        return int(self.ids.shape[0])

    @cached_property
    def cot_lengths(self) -> tuple[int, ...]:
        """Biased columns of each segment."""
        return tuple(len(segment.biased) for segment in self.segments)

    @cached_property
    def loss_plan(self) -> AttentionPlan:
        """As ``plan``, with only the loss rows as queries.

        Raises:
            ValueError: where rows stand behind them.
        """
        if any(segment.behind for segment in self.segments):
            raise ValueError("rows stand behind those that predict the targets: their keys would be seen")
        return _plan(self.segments, self.prompts, [len(s.targets) for s in self.segments], self.ids.device)

    def key_bias(self, cot_bias: Tensor) -> Tensor:
        """The bias of every packed column, (R_total,): ``cot_bias`` (C_total,) on CoT columns, 0 elsewhere."""
        return cot_bias.new_zeros(self.n_rows).index_copy(0, self.cot_columns, cot_bias)

    def mean_per_rollout(self, nll: Tensor) -> Tensor:
        """(n,) means of ``nll`` (L_total,) over each segment's own targets."""
        sums = nll.new_zeros(self.n_rollouts).index_add(0, self.loss_rollout, nll)
        return sums / self.loss_lengths.to(nll.dtype)


def pack(segments: Sequence[Segment], *, device: torch.device) -> PackedRollouts:
    """Lay out segments, at least one, as one batch whose tensors lie on ``device``."""
    prompts = tuple(dict.fromkeys(segment.before for segment in segments))
    ids: list[int] = []
    positions: list[int] = []
    cot_columns: list[int] = []
    loss_rows: list[int] = []
    for segment in segments:
        start = len(ids)
        ids += segment.ids
        positions += range(segment.seen, len(segment.sequence))
        cot_columns += [start + row for row in segment.biased]
        loss_rows += [start + row for row in segment.reading]

    def on_device(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return PackedRollouts(
        segments=tuple(segments),
        prompts=prompts,
        prompt_ids=on_device([token for prompt in prompts for token in prompt]),
        prompt_positions=on_device([place for prompt in prompts for place in range(len(prompt))]),
        prompt_plan=AttentionPlan([len(prompt) for prompt in prompts], device=device),
        ids=on_device(ids),
        positions=on_device(positions),
        plan=_plan(segments, prompts, [segment.n_rows for segment in segments], device),
        cot_columns=on_device(cot_columns),
        loss_rows=on_device(loss_rows),
        loss_targets=on_device([token for segment in segments for token in segment.targets]),
        loss_rollout=on_device([i for i, segment in enumerate(segments) for _ in segment.targets]),
        loss_lengths=on_device([len(segment.targets) for segment in segments]),
    )


def _plan(
    segments: Sequence[Segment], prompts: Sequence[tuple[int, ...]], queries: list[int], device: torch.device
) -> AttentionPlan:
    """The last ``queries`` rows of each segment against its rows and what it sees of its prompt."""
    starts: dict[tuple[int, ...], int] = {}
    end = 0
    for prompt in prompts:
        starts[prompt] = end
        end += len(prompt)
    return AttentionPlan(
        queries,
        [segment.n_rows for segment in segments],
        [starts[segment.before] for segment in segments],
        [segment.seen for segment in segments],
        device=device,
    )
