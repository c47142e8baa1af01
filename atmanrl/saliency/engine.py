"""Mask optimisation of a batch of rollouts: checks, packing, the loop over steps, the result."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel

from atmanrl.config import MaskConfig
from atmanrl.rollouts import Rollout
from atmanrl.saliency.decoder import FrozenDecoder, why_unsupported
from atmanrl.saliency.frozen import frozen
from atmanrl.saliency.likelihood import AnswerLikelihood, ModelLikelihood
from atmanrl.saliency.mask import TrainableMask
from atmanrl.saliency.packing import PackedRollouts, pack
from atmanrl.saliency.result import RolloutSaliency, SaliencyResult, skipped


class NonFiniteLossError(FloatingPointError):
    """The loss of a rollout is NaN or infinite.

    Attributes:
        rollout: its index in what was given to :func:`optimize_masks`.
    """

    def __init__(self, rollout: int, loss: float, when: str) -> None:
        super().__init__(f"the loss of rollout {rollout} is {loss} {when}")
        self.rollout = rollout


def optimize_masks(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    config: MaskConfig | None = None,
    *,
    progress: bool | None = None,
    likelihood: Callable[[PreTrainedModel, PackedRollouts], AnswerLikelihood] | None = None,
) -> SaliencyResult:
    """Learn, for every rollout at once, which CoT tokens must be re-enabled for its answer to become likely again.

    Minimises over H, per rollout and by AdamW from H = init, the mean over answer tokens of
    -log P(y_n | prompt, CoT, marker, y_<n) under the key bias scale * min(H, upper) on the CoT columns, in every layer
    and head. All rollouts are packed into one call, each distinct prompt runs once, and only the rows that predict
    answer tokens reach the vocabulary. Rollouts are independent problems: a rollout's mask does not depend on its
    companions.

    Args:
        model: a causal LM whose attention goes through transformers' AttentionInterface. Its mode, attention
            implementation and ``requires_grad`` flags are restored on return, its gradients never touched; the
            caller's grad mode does not matter.
        rollouts: prompt, chain of thought, marker and answer of each, as token ids of the model's vocabulary.
        config: see :class:`MaskConfig`; default: the paper's.
        progress: show a progress bar on stderr; default: if stderr is a terminal.
        likelihood: computes the answers' likelihood of a packed batch; default: :class:`FrozenDecoder` where it
            supports the model, else :class:`ModelLikelihood`.

    Returns:
        one :class:`RolloutSaliency` per rollout, on the CPU. A rollout with an empty CoT or an empty answer is
        skipped: its mask stays at init, its losses are NaN, ``skipped`` says why; one warning counts them.

    Raises:
        ValueError: a rollout has more tokens than the model's context or a token id outside its vocabulary; the model
            cannot use the attention.
        NonFiniteLossError: a rollout's loss is NaN or infinite.

    Source: AtManRL (arXiv 2604.16158), section 3.
    """
    config = MaskConfig() if config is None else config
    for index, rollout in enumerate(rollouts):
        _check_fits(model, rollout, index)
    reasons = [_reason_to_skip(rollout) for rollout in rollouts]
    active = [index for index, reason in enumerate(reasons) if reason is None]
    n_skipped = len(rollouts) - len(active)
    if n_skipped:
        first = next(index for index, reason in enumerate(reasons) if reason is not None)
        warnings.warn(
            f"{n_skipped} of {len(rollouts)} rollouts get no mask (rollout {first}: {reasons[first]})", stacklevel=2
        )
    learned: dict[int, RolloutSaliency] = {}
    if active:
        with frozen(model), _progress_bar(config.steps, progress) as advance:
            make = likelihood or _default_likelihood(model)
            masks = _optimize(model, make, [rollouts[index] for index in active], active, config, advance)
        learned = dict(zip(active, masks, strict=True))
    return SaliencyResult(
        [
            learned[index] if reason is None else skipped(rollout, reason, config)
            for index, (rollout, reason) in enumerate(zip(rollouts, reasons, strict=True))
        ],
        config,
    )


def _default_likelihood(model: PreTrainedModel) -> Callable[[PreTrainedModel, PackedRollouts], AnswerLikelihood]:
    return FrozenDecoder if why_unsupported(model) is None else ModelLikelihood


def _optimize(
    model: PreTrainedModel,
    make_likelihood: Callable[[PreTrainedModel, PackedRollouts], AnswerLikelihood],
    rollouts: Sequence[Rollout],
    names: Sequence[int],
    config: MaskConfig,
    advance: Callable[[], None],
) -> list[RolloutSaliency]:
    device = model.device
    batch = pack(rollouts, answer_loss=config.answer_loss, device=device)
    likelihood = make_likelihood(model, batch)
    mask = TrainableMask(
        len(batch.cot_columns),
        config,
        device=device,
        dtype=torch.float64 if model.dtype == torch.float64 else torch.float32,
    )

    def losses() -> Tensor:
        return batch.mean_per_rollout(likelihood(batch.key_bias(mask.bias())))

    with torch.no_grad():
        unmasked = batch.mean_per_rollout(likelihood(batch.key_bias(torch.zeros_like(mask.values))))
    _check_finite(unmasked, names, "without a mask")
    initial: Tensor | None = None
    for step in range(config.steps):
        current = losses()
        if initial is None:
            initial = current.detach()
        # Elsewhere the check would wait for the device; a NaN stays in H, so the check of the last loss finds it.
        if device.type == "cpu":
            _check_finite(current.detach(), names, f"at step {step}")
        mask.step(current)
        advance()
    with torch.no_grad():
        final = losses()
    _check_finite(final, names, f"after {config.steps} steps")
    return [
        RolloutSaliency(rollout, values, config.init, *numbers)
        for rollout, values, *numbers in zip(
            rollouts,
            mask.values.detach().cpu().split(batch.cot_lengths),
            (final if initial is None else initial).tolist(),
            final.tolist(),
            unmasked.tolist(),
            strict=True,
        )
    ]


def _reason_to_skip(rollout: Rollout) -> str | None:
    if not rollout.cot_ids:
        return "empty chain of thought"
    if not rollout.answer_ids:
        return "empty answer"
    return None


def _check_fits(model: PreTrainedModel, rollout: Rollout, index: int) -> None:
    text_config = model.config.get_text_config(decoder=True)
    limit = getattr(text_config, "max_position_embeddings", None)
    if limit is not None and len(rollout) > limit:
        raise ValueError(
            f"rollout {index} has {len(rollout)} tokens ({len(rollout.prompt_ids)} prompt,"
            f" {len(rollout.completion_ids)} completion), the model's context holds {limit}"
        )
    highest = max(rollout.prompt_ids + rollout.completion_ids)
    if highest >= text_config.vocab_size:
        raise ValueError(
            f"rollout {index} holds the token id {highest}, the model's vocabulary has {text_config.vocab_size} entries"
        )


def _check_finite(losses: Tensor, names: Sequence[int], when: str) -> None:
    wrong = losses.isfinite().logical_not()
    if bool(wrong.any()):
        where = int(wrong.nonzero()[0])
        raise NonFiniteLossError(names[where], losses[where].item(), when)


@contextmanager
def _progress_bar(steps: int, shown: bool | None) -> Iterator[Callable[[], None]]:
    shown = sys.stderr.isatty() if shown is None else shown
    if not shown:
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("saliency masks", total=steps)
        yield lambda: bar.advance(task)
