"""Token scores of any rollouts by any estimator, and the estimators by name."""

from __future__ import annotations

import difflib
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from transformers import PreTrainedModel

from atmanrl.config import MaskConfig
from atmanrl.rollout import Rollout
from atmanrl.saliency.engine import check_fits, reason_to_skip
from atmanrl.saliency.estimators.attention import FutureInfluence, ReceivedAttention
from atmanrl.saliency.estimators.bias_path import Gradient, Integrated
from atmanrl.saliency.estimators.chance import Random
from atmanrl.saliency.estimators.interface import Estimator, TokenScores
from atmanrl.saliency.estimators.masks import Mask, SparseMask
from atmanrl.saliency.estimators.suppression import Suppression
from atmanrl.saliency.result import NonFiniteLossError
from atmanrl.saliency.support import check_model
from atmanrl.saliency.working_copy import working_copy

BEST = "sparse-mask"
"""What ``"best"`` stands for: docs/estimators.md has the scores and costs that it was chosen by."""

_MAKE: Mapping[str, Callable[[], Estimator]] = MappingProxyType(
    {
        "mask": Mask,
        "sparse-mask": SparseMask,
        "integrated": Integrated,
        "gradient": Gradient,
        "leave-one-out": Suppression,
        "atman": lambda: Suppression(log_factor=math.log(0.1)),
        "atman-concept": lambda: Suppression(log_factor=math.log(0.1), similarity=0.6),
        "attention": ReceivedAttention,
        "fai": FutureInfluence,
        "random": Random,
    }
)

ESTIMATORS = tuple(_MAKE)
"""Names of the estimators; ``"best"``, which stands for one of them, is not listed."""


def make_estimator(name: str, *, mask: MaskConfig | None = None, record_every: int | None = None) -> Estimator:
    """The estimator of that name, or ``"best"``, with its default settings.

    Args:
        name: one of `ESTIMATORS`, or "best".
        mask: how ``"mask"`` optimises, the paper's numbers where None; the others have no use for it.
        record_every: keep the course of ``"mask"`` or ``"sparse-mask"`` every so many steps, None: not at all. The
            others have none.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    name = BEST if name == "best" else name
    if name not in _MAKE:
        near = difflib.get_close_matches(name, ESTIMATORS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown estimator {name!r}; choose best, {', '.join(ESTIMATORS)}{hint}")
    if name == "mask":
        return Mask(mask or MaskConfig(), record_every)
    if name == "sparse-mask":
        return SparseMask(record_every=record_every)
    return _MAKE[name]()


def estimate_saliency(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    estimator: str | Estimator = "best",
    *,
    token_budget: int | None = None,
    progress: bool | None = None,
) -> list[TokenScores]:
    """How far each rollout's answer rests on each of its chain-of-thought tokens, by the estimator chosen.

    Args:
        model: a causal LM whose attention goes through transformers' AttentionInterface, adapted or sharded as
            :func:`working_copy` allows; it is given back as it was.
        rollouts: prompt, chain of thought, marker and answer of each; packed together, scored independently.
        estimator: a name (`ESTIMATORS` or ``"best"``), or an estimator with settings of its own.
        token_budget: packed rows per pass; None: the estimator's own choice, within the free memory.
        progress: show a progress bar on stderr; default: if stderr is a terminal.

    Returns:
        one `TokenScores` per rollout. Where the chain of thought or the answer is empty nothing is estimated, all
        scores are 0 and ``skipped`` says why; one warning counts such rollouts.

    Raises:
        ValueError: an unknown estimator; a rollout that exceeds the model's context or vocabulary; a budget below 1.
        NonFiniteLossError: a rollout's loss or scores are NaN or infinite; its ``rollout`` is the index.
    """
    chosen = make_estimator(estimator) if isinstance(estimator, str) else estimator
    if token_budget is not None and token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, got {token_budget}")
    owner, model = model, working_copy(model)
    for index, rollout in enumerate(rollouts):
        check_fits(model, rollout, index)
    check_model(model, owner)
    reasons = [reason_to_skip(rollout) for rollout in rollouts]
    active = [index for index, reason in enumerate(reasons) if reason is None]
    if len(active) < len(rollouts):
        first = next(index for index, reason in enumerate(reasons) if reason is not None)
        warnings.warn(
            f"{len(rollouts) - len(active)} of {len(rollouts)} rollouts get no scores"
            f" (rollout {first}: {reasons[first]})",
            stacklevel=2,
        )
    shown = sys.stderr.isatty() if progress is None else progress
    members = [rollouts[index] for index in active]
    try:
        scored = iter(chosen(model, members, token_budget=token_budget, progress=shown) if members else [])
    except NonFiniteLossError as error:
        # It counts those it was given.
        raise NonFiniteLossError(active[error.rollout], error.loss, error.when) from error
    results = [
        next(scored) if reason is None else _unscored(chosen.name, rollout, reason)
        for rollout, reason in zip(rollouts, reasons, strict=True)
    ]
    for index, item in enumerate(results):
        if not bool(item.scores.isfinite().all()):
            raise NonFiniteLossError(index, item.loss_unmasked, f"or its scores are not finite ({chosen.name})")
    return results


def _unscored(estimator: str, rollout: Rollout, reason: str) -> TokenScores:
    zeros = torch.zeros(len(rollout.cot_ids))
    return TokenScores(estimator, rollout, zeros, zeros, skipped=reason)
