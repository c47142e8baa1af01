"""The steps: AdamW on the masks of one packed batch, recorded, replayed and ended early where asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from atmanrl.config import MaskConfig
from atmanrl.rollout import Rollout
from atmanrl.saliency.likelihood import AnswerLikelihood
from atmanrl.saliency.mask import TrainableMask
from atmanrl.saliency.packing import PackedRollouts, pack
from atmanrl.saliency.replay import Replayed
from atmanrl.saliency.result import RolloutSaliency, Trajectory, check_finite

CHECK_EVERY = 10
"""Steps from one look for rollouts that may end early to the next; each look waits for the device."""


class BatchOptimization:
    """Learns the masks of ``rollouts``, packed into one batch; those that end early leave it, the rest is repacked.

    Args:
        make: the likelihood of a packed batch.
        numbers: what the rollouts are called in messages.
        device: where the batch and H lie.
        dtype: of H.
        record_every: keep mask and loss every so many steps; None: never.
        loss_unmasked: losses without a mask that are known, by rollout.
    """

    def __init__(
        self,
        rollouts: Sequence[Rollout],
        make: Callable[[PackedRollouts], AnswerLikelihood],
        config: MaskConfig,
        *,
        numbers: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
        record_every: int | None,
        loss_unmasked: Mapping[Rollout, float] | None = None,
    ) -> None:
        self._rollouts, self._make, self._config, self._numbers = rollouts, make, config, numbers
        self._device, self._record_every = device, record_every
        self._records: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in rollouts]
        self._results: dict[int, RolloutSaliency] = {}
        n_tokens = sum(len(rollout.cot_ids) for rollout in rollouts)
        self._likelihood: AnswerLikelihood | None = None
        self._replayed: Replayed | None = None
        self._mask = TrainableMask(n_tokens, config, device=device, dtype=dtype)
        self._pack(list(range(len(rollouts))))
        known = {} if loss_unmasked is None else loss_unmasked
        if all(rollout in known for rollout in rollouts):
            self._unmasked = torch.tensor([known[rollout] for rollout in rollouts], device=device, dtype=dtype)
        else:
            with torch.no_grad():
                self._unmasked = self._losses_under(torch.zeros_like(self._mask.values))
        self._check_finite(self._unmasked, "without a mask")
        self._initial: Tensor | None = None

    def run(self, advance: Callable[[int], None]) -> list[RolloutSaliency]:
        """Do the steps, once; ``advance`` is called after each with the number of rollout-steps done."""
        try:
            for number in range(self._config.steps):
                self._one_step(number)
                ended = len(self._rollouts) - len(self._members)
                advance((number + 1) * len(self._members) + self._config.steps * ended)
                if not self._members:
                    break
            else:
                with torch.no_grad():
                    final = self._losses_under(self._mask.bias())
                self._check_finite(final, f"after {self._config.steps} steps")
                self._finish(range(len(self._members)), self._config.steps, self._mask.values.detach(), final)
        finally:
            self._release()
        return [self._results[index] for index in range(len(self._rollouts))]

    def _one_step(self, number: int) -> None:
        recording = self._record_every is not None and number % self._record_every == 0
        looking = self._config.early_stop is not None and number > 0 and number % CHECK_EVERY == 0
        before = self._mask.values.detach().clone() if recording or looking else None
        current = self._update() if self._replayed is None else self._replayed()
        # Elsewhere the check would wait for the device; a NaN stays in H, so a later check finds it.
        if looking or self._device.type == "cpu":
            self._check_finite(current, f"at step {number}")
        if self._initial is None:
            self._initial = current.clone()
        if before is not None and recording:
            self._record(range(len(self._members)), number, before, current.clone())
        if before is not None and looking:
            self._end_early(number, before, current)

    def _pack(self, members: list[int]) -> None:
        """Make ``members`` (indices of rollouts) the batch, in the place of the one before."""
        self._release()
        self._members = members
        rollouts = [self._rollouts[index] for index in members]
        self._batch = pack(rollouts, answer_loss=self._config.answer_loss, device=self._device)
        self._likelihood = self._make(self._batch)
        if self._config.capture:
            self._replayed = Replayed(self._update)

    def _release(self) -> None:
        # A captured step refers to this object: left in place, the buffers would wait for the garbage collector.
        self._likelihood = self._replayed = None

    def _losses_under(self, cot_bias: Tensor) -> Tensor:
        assert self._likelihood is not None
        return self._batch.mean_per_rollout(self._likelihood(self._batch.key_bias(cot_bias)))

    def _update(self) -> Tensor:
        losses = self._losses_under(self._mask.bias())
        self._mask.step(losses)
        return losses.detach()

    def _end_early(self, number: int, before: Tensor, losses: Tensor) -> None:
        """Let rollouts go whose loss under the mask ``before`` this step has recovered as far as is asked."""
        assert self._initial is not None
        assert self._config.early_stop is not None
        initial, unmasked = self._initial[self._members], self._unmasked[self._members]
        added = (initial - unmasked).clamp(min=0)
        ended = losses <= initial - self._config.early_stop * added
        if not bool(ended.any()):
            return
        self._finish(ended.nonzero()[:, 0].tolist(), number, before, losses)
        lengths = torch.tensor(self._batch.cot_lengths, device=self._device)
        self._mask = self._mask.select(ended.logical_not().repeat_interleave(lengths))
        remaining = [index for index, end in zip(self._members, ended.tolist(), strict=True) if not end]
        if remaining:
            self._pack(remaining)
        self._members = remaining

    def _record(self, places: Iterable[int], number: int, values: Tensor, losses: Tensor) -> None:
        parts = values.split(self._batch.cot_lengths)
        for place in places:
            records = self._records[self._members[place]]
            # A rollout that ends at a recorded step has that record.
            if not records or records[-1][0] < number:
                records.append((number, parts[place], losses[place]))

    def _finish(self, places: Sequence[int], number: int, values: Tensor, losses: Tensor) -> None:
        """Results of the rollouts at ``places`` of the batch, whose masks are ``values`` after ``number`` updates."""
        # Without steps nobody has left, and the final losses are the initial ones.
        initial = (losses if self._initial is None else self._initial).tolist()
        final, unmasked = losses.tolist(), self._unmasked.tolist()
        parts = values.cpu().split(self._batch.cot_lengths)
        if self._record_every is not None:
            self._record(places, number, values, losses)
        for place in places:
            index = self._members[place]
            self._results[index] = RolloutSaliency(
                self._rollouts[index],
                parts[place],
                self._config.init,
                loss_initial=initial[index],
                loss_final=final[place],
                loss_unmasked=unmasked[index],
                steps=number,
                trajectory=None if self._record_every is None else _trajectory(self._records[index]),
            )

    def _check_finite(self, losses: Tensor, when: str) -> None:
        check_finite(losses, [self._numbers[member] for member in self._members], when)


def _trajectory(records: list[tuple[int, Tensor, Tensor]]) -> Trajectory:
    steps, masks, losses = zip(*records, strict=True)
    return Trajectory(
        torch.tensor(steps), torch.stack([part.cpu() for part in masks]), torch.stack([loss.cpu() for loss in losses])
    )
