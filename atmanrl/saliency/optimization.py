"""The steps: AdamW on the masks of one packed batch, recorded and replayed where asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from atmanrl.config import MaskConfig
from atmanrl.rollouts import Rollout
from atmanrl.saliency.likelihood import AnswerLikelihood
from atmanrl.saliency.mask import TrainableMask
from atmanrl.saliency.packing import PackedRollouts
from atmanrl.saliency.replay import Replayed
from atmanrl.saliency.result import NonFiniteLossError, RolloutSaliency, Trajectory


def optimize_batch(
    rollouts: Sequence[Rollout],
    batch: PackedRollouts,
    likelihood: AnswerLikelihood,
    config: MaskConfig,
    *,
    numbers: Sequence[int],
    dtype: torch.dtype,
    record_every: int | None,
    capture: bool,
    advance: Callable[[int], None],
) -> list[RolloutSaliency]:
    """Learn the masks of ``batch``, which packs ``rollouts``.

    Args:
        likelihood: of the batch.
        numbers: what the rollouts are called in messages.
        dtype: of H.
        record_every: keep mask and loss every so many steps; None: never.
        capture: replay the steps from a CUDA graph.
        advance: called after each step with the number of steps done.
    """
    device = batch.ids.device
    mask = TrainableMask(len(batch.cot_columns), config, device=device, dtype=dtype)

    def losses() -> Tensor:
        return batch.mean_per_rollout(likelihood(batch.key_bias(mask.bias())))

    def step() -> Tensor:
        current = losses()
        mask.step(current)
        return current.detach()

    with torch.no_grad():
        unmasked = batch.mean_per_rollout(likelihood(batch.key_bias(torch.zeros_like(mask.values))))
    _check_finite(unmasked, numbers, "without a mask")
    replayed = Replayed(step) if capture else step
    initial: Tensor | None = None
    recorded: list[tuple[int, Tensor, Tensor]] = []
    for number in range(config.steps):
        recording = record_every is not None and number % record_every == 0
        before = mask.values.detach().clone() if recording else None
        current = replayed()
        # Elsewhere the check would wait for the device; a NaN stays in H, so the check of the last loss finds it.
        if device.type == "cpu":
            _check_finite(current, numbers, f"at step {number}")
        if initial is None:
            initial = current.clone()
        if before is not None:
            recorded.append((number, before, current.clone()))
        advance(number + 1)
    with torch.no_grad():
        final = losses()
    _check_finite(final, numbers, f"after {config.steps} steps")
    recorded.append((config.steps, mask.values.detach(), final))
    masks = mask.values.detach().cpu().split(batch.cot_lengths)
    losses_of = [values.tolist() for values in (final if initial is None else initial, final, unmasked)]
    results = [
        RolloutSaliency(rollout, masks[index], config.init, *(values[index] for values in losses_of))
        for index, rollout in enumerate(rollouts)
    ]
    if record_every is None:
        return results
    trajectories = _split(recorded, batch.cot_lengths)
    return [replace(result, trajectory=one) for result, one in zip(results, trajectories, strict=True)]


def _split(recorded: list[tuple[int, Tensor, Tensor]], lengths: Sequence[int]) -> list[Trajectory]:
    steps = torch.tensor([number for number, _, _ in recorded])
    masks = torch.stack([values for _, values, _ in recorded]).cpu()
    losses = torch.stack([values for _, _, values in recorded]).cpu()
    return [Trajectory(steps, part, losses[:, index]) for index, part in enumerate(masks.split(tuple(lengths), dim=1))]


def _check_finite(losses: Tensor, numbers: Sequence[int], when: str) -> None:
    wrong = losses.isfinite().logical_not()
    if bool(wrong.any()):
        where = int(wrong.nonzero()[0])
        raise NonFiniteLossError(numbers[where], losses[where].item(), when)
