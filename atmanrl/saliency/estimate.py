"""Token scores of any rollouts by any estimator, and the estimators by name."""

from __future__ import annotations

import difflib
import math
import sys
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from transformers import PreTrainedModel

from atmanrl.config import MaskConfig
from atmanrl.rollout import Rollout
from atmanrl.saliency.attention import FutureInfluence, ReceivedAttention
from atmanrl.saliency.batches import prepared
from atmanrl.saliency.decoder import MakeLikelihood
from atmanrl.saliency.gradients import Gradient, Integrated
from atmanrl.saliency.leave_one_out import Suppression
from atmanrl.saliency.mask import Mask
from atmanrl.saliency.scores import Estimator, NonFiniteLossError, Passes, TokenScores
from atmanrl.saliency.sparse_mask import SparseMask


@dataclass(frozen=True)
class Random:
    """score_v uniform in 0..1, the baseline of all estimators.

    Attributes:
        seed: of the draws, which depend on it and on the rollout's tokens alone.
    """

    seed: int = 0

    @property
    def name(self) -> str:
        """ "random"."""
        return "random"

    def passes(self, rollout: Rollout) -> Passes:
        """None."""
        return Passes(0)

    def __call__(
        self, model: PreTrainedModel, rollouts: Sequence[Rollout], *, token_budget: int | None, progress: bool
    ) -> list[TokenScores]:
        """See `Estimator`."""
        results = []
        for rollout in rollouts:
            key = zlib.crc32(repr((self.seed, rollout)).encode())
            score = torch.rand(len(rollout.cot_ids), generator=torch.Generator().manual_seed(key))
            results.append(TokenScores(self.name, rollout, score, score))
        return results


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
        record_every: keep the trajectory of ``"mask"`` or ``"sparse-mask"`` every so many steps, None: not at all. The
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
    """Score each chain-of-thought token of each rollout with one estimator.

    All rollouts are packed into few calls, each distinct prompt runs once, and only the rows that predict answer tokens
    reach the vocabulary. Rollouts are independent problems: a rollout's scores do not depend on its companions.

    Args:
        model: a causal LM whose attention goes through transformers' AttentionInterface, adapted or sharded as
            :func:`working_copy` allows (then every rank must call). Its mode, attention implementation and
            ``requires_grad`` flags are restored on return, its gradients never touched; the caller's grad mode does not
            matter.
        rollouts: prompt, chain of thought, marker and answer of each, as token ids of the model's vocabulary.
        estimator: a name (`ESTIMATORS` or ``"best"``), or an estimator with settings of its own.
        token_budget: packed rows per batch, prompts included; None: as many as fit the free memory, at most
            `batches.ROWS`. If memory runs out, half of it is tried once.
        progress: show a progress bar on stderr; default: if stderr is a terminal.

    Returns:
        one `TokenScores` per rollout, in the order given. Where the chain of thought or the answer is empty nothing is
        estimated, all scores are 0 and ``skipped`` says why; one warning counts such rollouts.

    Raises:
        ValueError: an unknown estimator; a budget below 1; a rollout has more tokens than the model's context or a
            token id outside its vocabulary; the model cannot use the attention, or something else mixes positions.
        NonFiniteLossError: a rollout's loss or scores are NaN or infinite; its ``rollout`` is the index.
    """
    chosen = make_estimator(estimator) if isinstance(estimator, str) else estimator
    if token_budget is not None and token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, got {token_budget}")
    rollouts = tuple(rollouts)
    model = prepared(model, rollouts)
    reasons = [_reason_to_skip(rollout) for rollout in rollouts]
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
        next(scored) if reason is None else _unscored(chosen, rollout, reason)
        for rollout, reason in zip(rollouts, reasons, strict=True)
    ]
    for index, item in enumerate(results):
        if not bool(item.scores.isfinite().all()):
            raise NonFiniteLossError(index, item.loss_unmasked, f"or its scores are not finite ({chosen.name})")
    return results


def optimize_masks(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    config: MaskConfig | None = None,
    *,
    progress: bool | None = None,
    record_every: int | None = None,
    token_budget: int | None = None,
    likelihood: MakeLikelihood | None = None,
) -> list[TokenScores]:
    """:func:`estimate_saliency` with the paper's :class:`Mask`: which tokens must be re-enabled for the answer.

    Args:
        model, rollouts, progress, token_budget: see :func:`estimate_saliency`.
        config, record_every, likelihood: see :class:`Mask`; default: the paper's numbers, no trajectory.

    Returns:
        one `TokenScores` per rollout with H as its ``mask``; of a skipped rollout H is ``config.init``.

    Raises:
        ValueError, NonFiniteLossError: as :func:`estimate_saliency`.
    """
    estimator = Mask(config or MaskConfig(), record_every, likelihood)
    return estimate_saliency(model, rollouts, estimator, token_budget=token_budget, progress=progress)


def _reason_to_skip(rollout: Rollout) -> str | None:
    if not rollout.cot_ids:
        return "empty chain of thought"
    return None if rollout.answer_ids else "empty answer"


def _unscored(estimator: Estimator, rollout: Rollout, reason: str) -> TokenScores:
    zeros = torch.zeros(len(rollout.cot_ids))
    mask = torch.full_like(zeros, estimator.config.init) if isinstance(estimator, Mask) else None
    return TokenScores(estimator.name, rollout, zeros, zeros, skipped=reason, mask=mask)
