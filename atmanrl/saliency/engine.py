"""Mask optimisation of any number of rollouts: checks, batches that fit memory, results in order."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from transformers import PreTrainedModel

from atmanrl.config import MaskConfig
from atmanrl.rollout import Rollout
from atmanrl.saliency.budget import affordable_rows, halving_on_out_of_memory, split
from atmanrl.saliency.decoder import FrozenDecoder, why_unsupported
from atmanrl.saliency.frozen import frozen
from atmanrl.saliency.likelihood import AnswerLikelihood, ModelLikelihood
from atmanrl.saliency.optimization import BatchOptimization
from atmanrl.saliency.packing import PackedRollouts
from atmanrl.saliency.progress import progress_bar
from atmanrl.saliency.result import RolloutSaliency, SaliencyResult, skipped
from atmanrl.saliency.support import check_model
from atmanrl.saliency.working_copy import working_copy

_log = logging.getLogger(__name__)

MakeLikelihood = Callable[[PreTrainedModel, PackedRollouts], AnswerLikelihood]


def optimize_masks(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    config: MaskConfig | None = None,
    *,
    progress: bool | None = None,
    record_every: int | None = None,
    token_budget: int | None = None,
    loss_unmasked: Mapping[Rollout, float] | None = None,
    likelihood: MakeLikelihood | None = None,
) -> SaliencyResult:
    """Learn, for every rollout at once, which CoT tokens must be re-enabled for its answer to become likely again.

    Minimises over H, per rollout and by AdamW from H = init, the mean over answer tokens of
    -log P(y_n | prompt, CoT, marker, y_<n) under the key bias scale * min(H, upper) on the CoT columns, in every layer
    and head. All rollouts are packed into one call, each distinct prompt runs once, and only the rows that predict
    answer tokens reach the vocabulary. Rollouts are independent problems: a rollout's mask does not depend on its
    companions.

    Args:
        model: a causal LM whose attention goes through transformers' AttentionInterface, also with PEFT's LoRA
            adapters or sharded by FSDP2 (see :func:`working_copy`; then every rank must call). Its mode, attention
            implementation and ``requires_grad`` flags are restored on return, its gradients never touched; the
            caller's grad mode does not matter.
        rollouts: prompt, chain of thought, marker and answer of each, as token ids of the model's vocabulary.
        config: see :class:`MaskConfig`; default: the paper's.
        progress: show a progress bar on stderr; default: if stderr is a terminal.
        record_every: keep each mask and its loss every so many steps as ``trajectory``; default: never.
        token_budget: rows packed into one batch, prompts included; default: as many as are predicted to fit the free
            memory on the fast path, all on the general one. If memory runs out, half of it is tried once.
        loss_unmasked: losses without a mask that a forward elsewhere has found. A batch whose rollouts are all there
            takes none of its own, except with ``early_stop``, which decides by them.
        likelihood: computes the answers' likelihood of a packed batch; default: :class:`FrozenDecoder` where it
            supports the model, else :class:`ModelLikelihood`.

    Returns:
        one :class:`RolloutSaliency` per rollout, on the CPU. A rollout with an empty CoT or an empty answer is
        skipped: its mask stays at init, its losses are NaN, ``skipped`` says why; one warning counts them.

    Raises:
        ValueError: a rollout has more tokens than the model's context or a token id outside its vocabulary; the model
            cannot use the attention, or something else in it mixes positions; ``config.capture`` without a GPU.
        NonFiniteLossError: a rollout's loss is NaN or infinite; its ``rollout`` is the index.

    Source: AtManRL (arXiv 2604.16158), section 3.
    """
    config = MaskConfig() if config is None else config
    if config.capture and model.device.type != "cuda":
        raise ValueError(f"capture replays CUDA graphs, but the model is on {model.device}")
    if record_every is not None and record_every < 1:
        raise ValueError(f"record_every must be at least 1, got {record_every}")
    if token_budget is not None and token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, got {token_budget}")
    rollouts = tuple(rollouts)
    # Before anything that may fail on one rank alone: where weights are sharded, every rank takes part.
    owner, model = model, working_copy(model)
    for index, rollout in enumerate(rollouts):
        check_fits(model, rollout, index)
    check_model(model, owner)
    reasons = [reason_to_skip(rollout) for rollout in rollouts]
    active = [index for index, reason in enumerate(reasons) if reason is None]
    n_skipped = len(rollouts) - len(active)
    if n_skipped:
        first = next(index for index, reason in enumerate(reasons) if reason is not None)
        warnings.warn(
            f"{n_skipped} of {len(rollouts)} rollouts get no mask (rollout {first}: {reasons[first]})", stacklevel=2
        )
    learned: dict[int, RolloutSaliency] = {}
    if active:
        with frozen(model), progress_bar("saliency masks, rollout-steps", config.steps * len(active), progress) as show:
            make = likelihood or _default_likelihood(model, config)
            if token_budget is None and likelihood is None:
                fast = make is not ModelLikelihood
                token_budget = affordable_rows(model, [rollouts[index] for index in active], fast=fast)

            def learn(group: list[int]) -> list[RolloutSaliency]:
                finished = config.steps * len(learned)
                return BatchOptimization(
                    [rollouts[index] for index in group],
                    partial(make, model),
                    config,
                    numbers=group,
                    device=model.device,
                    dtype=torch.float64 if model.dtype == torch.float64 else torch.float32,
                    record_every=record_every,
                    loss_unmasked=loss_unmasked if config.early_stop is None else None,
                ).run(lambda steps: show(finished + steps))

            def run(budget: int) -> None:
                for group in split(rollouts, [index for index in active if index not in learned], budget):
                    learned.update(zip(group, learn(group), strict=True))

            all_rows = sum(len(rollouts[index]) for index in active)
            halving_on_out_of_memory(run, all_rows if token_budget is None else min(token_budget, all_rows))
    return SaliencyResult(
        [
            learned[index] if reason is None else skipped(rollout, reason, config)
            for index, (rollout, reason) in enumerate(zip(rollouts, reasons, strict=True))
        ],
        config,
    )


def _default_likelihood(model: PreTrainedModel, config: MaskConfig) -> MakeLikelihood:
    reason = why_unsupported(model)
    if reason is None:
        return partial(FrozenDecoder, weights=config.weights)
    if config.weights != "model":
        raise ValueError(f"weights={config.weights!r} needs the fast path, which does not cover this model: {reason}")
    _log.info("masks take the general path: %s", reason)
    return ModelLikelihood


def reason_to_skip(rollout: Rollout) -> str | None:
    """Why a rollout has no saliency: an empty chain of thought or answer; None where it has both."""
    if not rollout.cot_ids:
        return "empty chain of thought"
    if not rollout.answer_ids:
        return "empty answer"
    return None


def check_fits(model: PreTrainedModel, rollout: Rollout, index: int) -> None:
    """Raise ValueError for a rollout that exceeds the model's context or vocabulary; messages call it ``index``."""
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
