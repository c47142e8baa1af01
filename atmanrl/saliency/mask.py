"""The paper's mask: one trainable number per chain-of-thought token, learned by AdamW from full suppression.

Source: AtManRL (arXiv 2604.16158), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atmanrl.config import MaskConfig
from atmanrl.rollout import Rollout
from atmanrl.saliency.batches import Batch, in_batches
from atmanrl.saliency.decoder import MakeLikelihood, fastest_likelihood
from atmanrl.saliency.packing import whole
from atmanrl.saliency.scores import Passes, TokenScores, Trajectory, check_finite

# Eager calls before the capture: libraries choose their algorithms, lazily made buffers (AdamW's) come to exist.
WARM_UP = 3


@dataclass(frozen=True)
class Mask:
    """score_v = 1 - H_v / init after AdamW from full suppression: the paper's estimator.

    Minimises over H, per rollout and from H = init, the mean over answer tokens of
    -log P(y_n | prompt, CoT, marker, y_<n) under the key bias scale * min(H, upper) on the CoT columns, in every layer
    and head.

    Attributes:
        config: see :class:`atmanrl.MaskConfig`.
        record_every: keep the trajectory every so many steps, None: not at all.
        likelihood: computes the answers' likelihood of a packed batch; None: :class:`FrozenDecoder` where it supports
            the model, else :class:`ModelLikelihood`.

    Raises:
        ValueError: for recording every 0 steps.

    Source: AtManRL (arXiv 2604.16158), section 3.
    """

    config: MaskConfig = field(default_factory=MaskConfig)
    record_every: int | None = None
    likelihood: MakeLikelihood | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.record_every is not None and self.record_every < 1:
            raise ValueError(f"record_every must be at least 1, got {self.record_every}")

    @property
    def name(self) -> str:
        """ "mask"."""
        return "mask"

    def passes(self, rollout: Rollout) -> Passes:
        """A forward and a backward per step, and two forwards for the losses without a mask and at the end."""
        return Passes(self.config.steps + 2, self.config.steps)

    def __call__(
        self, model: PreTrainedModel, rollouts: Sequence[Rollout], *, token_budget: int | None, progress: bool
    ) -> list[TokenScores]:
        """See `Estimator`.

        Raises:
            ValueError: ``config.capture`` without a GPU; float8 weights on a model that the fast path does not cover.
        """
        config = self.config
        if config.capture and model.device.type != "cuda":
            raise ValueError(f"capture replays CUDA graphs, but the model is on {model.device}")
        found = in_batches(
            model,
            [whole(rollout, config.answer_loss) for rollout in rollouts],
            self._learn,
            token_budget=token_budget,
            make=self.likelihood or fastest_likelihood(model, config.weights),
            progress=progress,
            what=self.name,
            passes=config.steps + 2,
        )
        return list(found)

    def _learn(self, batch: Batch) -> list[TokenScores]:
        config = self.config
        mask = TrainableMask(batch.filled(config.init), config)

        def update() -> Tensor:
            losses = batch.losses_unchecked(mask.bias())
            mask.step(losses)
            return losses.detach()

        with torch.no_grad():
            unmasked = batch.losses(batch.filled(0.0), "without a mask")
        step = Replayed(update) if config.capture else update
        records: list[tuple[int, Tensor, Tensor]] = []
        initial: Tensor | None = None
        for number in range(config.steps):
            recording = self.record_every is not None and number % self.record_every == 0
            before = mask.values.detach().clone() if recording else None
            losses = step()
            # Elsewhere the check would wait for the device; a NaN stays in H, so the last check finds it.
            if losses.device.type == "cpu":
                check_finite(losses, batch.numbers, f"at step {number}")
            batch.passed()
            if initial is None:
                initial = losses.clone()
            if before is not None:
                records.append((number, before, losses.clone()))
        with torch.no_grad():
            final = batch.losses(mask.bias(), f"after {config.steps} steps")
        for losses, when in ((unmasked, "without a mask"), (final, f"after {config.steps} steps")):
            check_finite(losses, batch.numbers, when)
        return self._scores(
            batch, mask.values.detach(), final if initial is None else initial, final, unmasked, records
        )

    def _scores(
        self,
        batch: Batch,
        values: Tensor,
        initial: Tensor,
        final: Tensor,
        unmasked: Tensor,
        records: list[tuple[int, Tensor, Tensor]],
    ) -> list[TokenScores]:
        parts = values.cpu().split(batch.packed.cot_lengths)
        columns = zip(initial.tolist(), final.tolist(), unmasked.tolist(), strict=True)
        trajectories: Sequence[Trajectory | None] = [None] * len(parts)
        if self.record_every is not None:
            restored = [
                (number, 1 - at / self.config.init, losses)
                for number, at, losses in (*records, (self.config.steps, values, final))
            ]
            trajectories = batch.trajectories(restored)
        found = []
        for rollout, part, losses, course in zip(batch.rollouts, parts, columns, trajectories, strict=True):
            score = 1 - part / self.config.init
            found.append(TokenScores(self.name, rollout, score, score, *losses, trajectory=course, mask=part))
        return found


class TrainableMask:
    """H of a packed batch, one number per CoT token of all rollouts, and the AdamW that updates it.

    AdamW acts on each number alone and the loss is a sum over rollouts, so a rollout's mask does not depend on which
    others share the tensor.

    Args:
        values: (n_tokens,) H at the start, float32, or float64 for a float64 model; updated in place.
        config: clamp, scale and optimiser.
    """

    def __init__(self, values: Tensor, config: MaskConfig) -> None:
        self.config = config
        self.values = values.requires_grad_()
        self._optimizer = torch.optim.AdamW(
            [self.values],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
            capturable=values.device.type == "cuda",
        )

    def bias(self) -> Tensor:
        """``scale * min(H, upper)``, (n_tokens,), natural-log units."""
        return self.config.scale * self.values.clamp(max=self.config.upper)

    def penalty(self) -> Tensor | None:
        """``sparsity * sum_v |min(H_v, upper) / init - 1|`` in nats, a scalar; None where sparsity is 0.

        The sum runs over single tokens, so a token stays restored only where that lowers its rollout's loss by more
        than ``sparsity``, however long the chain of thought is.
        """
        if not self.config.sparsity:
            return None
        restored = 1 - self.values.clamp(max=self.config.upper) / self.config.init
        return self.config.sparsity * restored.abs().sum()

    def step(self, losses: Tensor) -> None:
        """One AdamW update of H down the gradient of the summed per-rollout ``losses`` (n,) and the penalty."""
        objective = losses.sum()
        penalty = self.penalty()
        if penalty is not None:
            objective = objective + penalty.to(objective.dtype)
        (self.values.grad,) = torch.autograd.grad(objective, [self.values])
        self._optimizer.step()


class Replayed:
    """``step`` with the launches of all but its first calls replayed from a CUDA graph.

    The first calls run eagerly and count as calls. Every call returns the same tensor, overwritten by the next.

    Args:
        step: works in place on tensors that live as long as this object, without synchronising with the host.
    """

    def __init__(self, step: Callable[[], Tensor]) -> None:
        self._step = step
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: Tensor | None = None
        # Capture forbids the default stream, and what is captured must not depend on work there.
        self._stream = torch.cuda.Stream()

    def __call__(self) -> Tensor:
        self._calls += 1
        if self._calls <= WARM_UP:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                output = self._step()
            torch.cuda.current_stream().wait_stream(self._stream)
            return output
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._output = self._step()
        self._graph.replay()
        assert self._output is not None
        return self._output
