"""The one loop in which a model runs here: checked, borrowed frozen, in batches that fit the free memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from atmanrl.models import working_copy
from atmanrl.progress import progress_bar
from atmanrl.rollout import Rollout
from atmanrl.saliency.cost import DecoderShape, free_bytes, peak_bytes, saved_bytes
from atmanrl.saliency.decoder import MakeLikelihood, fastest_likelihood
from atmanrl.saliency.likelihood import AnswerLikelihood, ModelLikelihood, frozen
from atmanrl.saliency.packing import PackedRollouts, Segment, pack
from atmanrl.saliency.scores import Trajectory, check_finite
from atmanrl.saliency.support import check_model

_Result = TypeVar("_Result")

ROWS = 8192
"""Most packed rows of a batch where no budget is given: enough to fill a device, few enough that a bar moves."""

# Logits of a batch that runs through the model's own modules, 1 GiB in float32.
_MOST_LOGITS = 2**28
# Of the free memory, what the allocator loses to fragments and other processes may take meanwhile.
_HEADROOM = 0.9
# Autograd's gradients and temporaries come on top of what it keeps; on a CPU malloc also holds what was freed, up to
# about as much again. `test_saliency_budget` holds both to what is measured.
_PEAK_PER_KEPT, _RESIDENT_PER_KEPT = 1.15, 2.0


@dataclass(frozen=True)
class Batch:
    """Segments packed together.

    Attributes:
        numbers: their places among all segments, which messages call them by.
        packed: their layout.
        likelihood: of their targets.
        dtype: of biases and losses.
        passed: called after every pass.
    """

    numbers: range
    packed: PackedRollouts
    likelihood: AnswerLikelihood
    dtype: torch.dtype
    passed: Callable[[], None]

    @property
    def rollouts(self) -> list[Rollout]:
        """The segments' rollouts."""
        return [segment.rollout for segment in self.packed.segments]

    def losses(self, cot_bias: Tensor, when: str = "under a bias") -> Tensor:
        """(n,) mean negative log-likelihood of each answer under ``cot_bias`` (C_total,), differentiable in it.

        Raises:
            NonFiniteLossError: on a CPU, with ``when`` in its message; elsewhere the check would wait for the device,
                and the scores are looked at.
        """
        losses = self.losses_unchecked(cot_bias)
        if losses.device.type == "cpu":
            check_finite(losses.detach(), self.numbers, when)
        self.passed()
        return losses

    def losses_unchecked(self, cot_bias: Tensor) -> Tensor:
        """The same without waiting for the device, which a CUDA graph can replay."""
        return self.packed.mean_per_rollout(self.likelihood(self.packed.key_bias(cot_bias)))

    def losses_and_gradient(self, cot_bias: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) losses and (C_total,) d(sum of losses) / d bias at ``cot_bias``."""
        cot_bias = cot_bias.detach().requires_grad_()
        with torch.enable_grad():
            losses = self.losses(cot_bias)
            (slope,) = torch.autograd.grad(losses.sum(), [cot_bias])
        return losses.detach(), slope

    def per_token(self, per_rollout: Tensor) -> Tensor:
        """(C_total,) each rollout's number at each of its tokens."""
        lengths = torch.tensor(self.packed.cot_lengths, device=per_rollout.device)
        # With its size known nothing waits for the device.
        return per_rollout.repeat_interleave(lengths, output_size=len(self.packed.cot_columns))

    def filled(self, value: float) -> Tensor:
        """(C_total,) of ``value``."""
        return torch.full((len(self.packed.cot_columns),), value, dtype=self.dtype, device=self.packed.ids.device)

    def trajectories(self, records: Sequence[tuple[int, Tensor, Tensor]]) -> list[Trajectory]:
        """Each rollout's part of what was recorded: updates done, scores (C_total,), losses (n,)."""
        steps = torch.tensor([number for number, _, _ in records])
        scores = torch.stack([values for _, values, _ in records]).cpu().split(self.packed.cot_lengths, dim=1)
        losses = torch.stack([losses for _, _, losses in records]).cpu()
        return [Trajectory(steps, own, losses[:, i]) for i, own in enumerate(scores)]


def in_batches(
    model: PreTrainedModel,
    segments: Sequence[Segment],
    compute: Callable[[Batch], Sequence[_Result]],
    *,
    token_budget: int | None,
    make: MakeLikelihood | None = None,
    forward_only: bool = False,
    progress: bool = False,
    what: str = "",
    passes: int = 1,
) -> Iterator[_Result]:
    """The results of ``compute`` for each of ``segments``, batch by batch, in their order.

    The model is borrowed frozen while a batch runs, and given back before its results are handed out. Where memory
    runs out, what is left goes on with half the rows; where it runs out again, the error is the caller's.

    Args:
        model: see :func:`prepared`.
        segments: neighbours with equal ``before`` share its rows.
        compute: one result per segment of a batch.
        token_budget: rows of a batch, those before the segments included; a longer segment forms a batch of its own.
            None: see :func:`rows_that_fit`.
        make: computes the likelihood of a packed batch; None: see :func:`fastest_likelihood`.
        forward_only: run the model's own modules, whose attention can be observed, and without gradients.
        progress: show a bar on stderr, labelled ``what``.
        passes: over each batch, which the bar counts for each segment.
    """
    if make is None:
        make = ModelLikelihood if forward_only else fastest_likelihood(model)
    if token_budget is None and segments:
        # A forward keeps less than any backward needs, so that the prediction from shapes is enough for it.
        fast = DecoderShape.known(model) if forward_only else make is not ModelLikelihood
        with frozen(model):
            token_budget = rows_that_fit(model, segments, fast=fast)
    budget = 1 if token_budget is None else token_budget
    # The fast path takes the logits in parts.
    most_targets = None if make is not ModelLikelihood else max(1, _MOST_LOGITS // _text_config(model).vocab_size)
    start, halved = 0, False
    kept: ModelLikelihood | None = None
    with progress_bar(f"{what}, passes", passes * len(segments), progress) as show:
        while start < len(segments):
            numbers = range(start, batch_end(segments, start, budget, most_targets))
            members = segments[numbers.start : numbers.stop]

            def run(numbers: range = numbers, members: Sequence[Segment] = members) -> Sequence[_Result]:
                nonlocal kept
                done = passes * numbers.start

                def passed() -> None:
                    nonlocal done
                    done += len(numbers)
                    show(done)

                with frozen(model):
                    packed = pack(members, device=model.device)
                    # The former prompts go before others run, so that two are never held.
                    kept = None if kept is None or kept.prompts != packed.prompts else kept
                    if forward_only:
                        likelihood: AnswerLikelihood = (kept := ModelLikelihood(model, packed, kept))
                    else:
                        likelihood = make(model, packed)
                    return compute(Batch(numbers, packed, likelihood, bias_dtype(model), passed))

            results = _unless_memory_runs_out(run, last=halved)
            if results is None:
                kept, halved = None, True
                rows = sum(segment.n_rows for segment in members) + sum(map(len, {s.before for s in members}))
                budget = max(1, min(budget, rows) // 2)
                continue
            yield from results
            start = numbers.stop


def prepared(model: PreTrainedModel, rollouts: Sequence[Rollout]) -> PreTrainedModel:
    """The model to compute on, see :func:`working_copy`; every function here that takes a model calls this first.

    Raises:
        ValueError: the model ignores something that packed rollouts need, see :func:`check_model`; a rollout exceeds
            the model's context or holds a token id outside its vocabulary.
    """
    # Before anything that may fail on one rank alone: where weights are sharded, every rank takes part.
    owner, model = model, working_copy(model)
    check_model(model, owner)
    config = _text_config(model)
    limit = getattr(config, "max_position_embeddings", None)
    for index, rollout in enumerate(rollouts):
        if limit is not None and len(rollout) > limit:
            raise ValueError(
                f"rollout {index} has {len(rollout)} tokens ({len(rollout.prompt_ids)} prompt,"
                f" {len(rollout.completion_ids)} completion), the model's context holds {limit}"
            )
        highest = max(rollout.prompt_ids + rollout.completion_ids)
        if highest >= config.vocab_size:
            raise ValueError(
                f"rollout {index} holds the token id {highest}, the model's vocabulary has {config.vocab_size} entries"
            )
    return model


def batch_end(segments: Sequence[Segment], start: int, budget: int, most_targets: int | None = None) -> int:
    """Where the batch ends that begins with segment ``start``: at most ``budget`` rows, ``before`` of each included.

    Segments with equal ``before`` share its rows. One segment always fits.

    Args:
        most_targets: most targets of a batch; None: as many as there are.
    """
    rows = targets = 0
    prompts: set[tuple[int, ...]] = set()
    for stop in range(start, len(segments)):
        segment = segments[stop]
        rows += segment.n_rows + (0 if segment.before in prompts else len(segment.before))
        targets += len(segment.targets)
        if stop > start and (rows > budget or (most_targets is not None and targets > most_targets)):
            return stop
        prompts.add(segment.before)
    return len(segments)


def rows_that_fit(model: PreTrainedModel, segments: Sequence[Segment], *, fast: bool) -> int:
    """`ROWS`, or fewer where the free memory does not hold them with what a backward needs.

    Args:
        model: borrowed frozen; segments: at least one.
        fast: see `affordable_rows`.
    """
    # One segment is one batch whatever fits, and predicting takes the general path a pass.
    affordable = affordable_rows(model, segments, fast=fast) if len(segments) > 1 else None
    return ROWS if affordable is None else min(ROWS, max(1, affordable))


def affordable_rows(model: PreTrainedModel, segments: Sequence[Segment], *, fast: bool = True) -> int | None:
    """Rows whose predicted peak fits the free memory of the model's device; None where that is unknown.

    Args:
        fast: predict the fast path's peak, which follows from shapes; else the general path's, which is measured.
    """
    on_cpu, free = model.device.type == "cpu", free_bytes(model.device)
    if free is None:
        return None
    rows = sum(segment.n_rows for segment in segments)
    prompts = sum(map(len, {segment.before for segment in segments}))
    if fast:
        targets = sum(len(segment.targets) for segment in segments)
        needed = peak_bytes(DecoderShape.of(model), model.dtype.itemsize, rows, targets, prompts, on_cpu=on_cpu)
    else:
        longest = max(segments, key=lambda segment: segment.n_rows)
        kept = rows * kept_bytes_of(model, longest) / longest.n_rows
        needed = int(kept * (_RESIDENT_PER_KEPT if on_cpu else _PEAK_PER_KEPT))
    return int((rows + prompts) * _HEADROOM * free / needed)


def kept_bytes_of(model: PreTrainedModel, segment: Segment) -> int:
    """Bytes that autograd through ``model`` keeps for the backward of one segment, weights not counted: measured."""
    batch = pack([segment], device=model.device)
    likelihood = ModelLikelihood(model, batch)
    bias = torch.zeros(batch.n_rows, device=model.device, requires_grad=True)
    with torch.enable_grad():
        return saved_bytes(model, partial(likelihood, bias))


def bias_dtype(model: PreTrainedModel) -> torch.dtype:
    """float32, or float64 for a float64 model."""
    return torch.float64 if model.dtype == torch.float64 else torch.float32


def _unless_memory_runs_out(run: Callable[[], Sequence[_Result]], *, last: bool) -> Sequence[_Result] | None:
    """``run()``; None if memory ran out, unless that is the ``last`` attempt."""
    try:
        return run()
    except (torch.OutOfMemoryError, RuntimeError) as error:
        # The CPU's allocator has no exception of its own.
        full = isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
        if last or not full:
            raise
    # Outside the handler: its traceback would keep the failed run's tensors alive.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _text_config(model: PreTrainedModel) -> PretrainedConfig:
    return model.config.get_text_config(decoder=True)
