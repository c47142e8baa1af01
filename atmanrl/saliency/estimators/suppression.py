"""Leave-one-out and AtMan: suppress one token, or one concept, at a time and see how much the answer's loss rises."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from atmanrl.rollout import Rollout
from atmanrl.saliency.estimators.interface import Passes, TokenScores, scored_in_nats
from atmanrl.saliency.estimators.suffixes import Suffix, suffix_losses, suffix_rows

Groups = tuple[tuple[int, ...], ...]
"""Sets of chain-of-thought tokens that are suppressed together."""


@dataclass(frozen=True)
class Suppression:
    """score_v = L(v suppressed) - L in nats, L the mean negative log-likelihood of the answer; one variant per token.

    A suppressed column gets ``log_factor`` added to its scores in every layer, head and row, which multiplies its
    attention weight by exp(log_factor) before the softmax normalises it again. AtMan multiplies the score itself, so
    that what a factor does depends on the score's sign and size; in log space it does not.

    Each variant recomputes the rows from its first suppressed token on (:func:`suffix_losses`): about T / 2 forwards
    for T tokens in all, exactly what T full forwards give.

    Attributes:
        log_factor: natural-log groups, negative; -inf hides the columns: leave-one-out.
        similarity: also suppress the chain of thought's tokens whose input embeddings have at least this cosine
            similarity to the token's ("conceptual suppression"); None: the token alone. Prompt and answer are never
            suppressed.

    Raises:
        ValueError: for a ``log_factor`` that is not negative, or a similarity outside [-1, 1].

    Source: AtMan (arXiv 2301.08110), section 3; its default factor keeps 0.1.
    """

    log_factor: float = -math.inf
    similarity: float | None = None

    def __post_init__(self) -> None:
        if not self.log_factor < 0:
            raise ValueError(f"log_factor must be negative, got {self.log_factor}")
        if self.similarity is not None and not -1 <= self.similarity <= 1:
            raise ValueError(f"similarity must lie in [-1, 1], got {self.similarity}")

    @property
    def name(self) -> str:
        """ "leave-one-out" where columns are hidden, else "atman"; with "-concept" where similar ones go along."""
        base = "leave-one-out" if self.log_factor == -math.inf else "atman"
        return base if self.similarity is None else f"{base}-concept"

    def passes(self, rollout: Rollout) -> Passes:
        """1 + (sum_v (R - v) + R - T + 1) / R with R rows: the unaltered run, the variants, the unaltered loss.

        An upper bound with ``similarity``, as if each concept began with the first token.
        """
        starts = [0 if self.similarity is not None else token for token in range(len(rollout.cot_ids))]
        rows = [suffix_rows(rollout, start) for start in (*starts, len(rollout.cot_ids) - 1)]
        return Passes(1 + sum(rows) / suffix_rows(rollout, 0))

    def __call__(
        self, model: PreTrainedModel, rollouts: Sequence[Rollout], *, token_budget: int | None, progress: bool
    ) -> list[TokenScores]:
        """See `Estimator`."""
        groups = [
            single_tokens(rollout) if self.similarity is None else similar_tokens(model, rollout, self.similarity)
            for rollout in rollouts
        ]
        effects = suppression_effects(
            model,
            rollouts,
            groups,
            bias=self.log_factor,
            token_budget=token_budget,
            progress=progress,
            what=self.name,
        )
        return [
            scored_in_nats(self.name, rollout, torch.tensor(rises), loss_unmasked=base)
            for rollout, (base, rises) in zip(rollouts, effects, strict=True)
        ]


def suppression_effects(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    groups: Sequence[Groups],
    *,
    bias: float = -math.inf,
    token_budget: int | None = None,
    progress: bool = False,
    what: str = "leave-one-out",
) -> list[tuple[float, list[float]]]:
    """The answer's loss, and its rise when the tokens of one group are suppressed together, for each group in turn.

    Args:
        groups: per rollout, sets of chain-of-thought tokens; they may overlap.
        model, bias, token_budget, progress, what: see :func:`suffix_losses`.

    Returns:
        (loss in nats, rises in nats) per rollout.
    """
    suffixes: list[Suffix] = []
    for index, (rollout, sets) in enumerate(zip(rollouts, groups, strict=True)):
        # The last token's row exists in any case, so the unaltered loss takes the fewest rows from there.
        suffixes.append(Suffix(index, len(rollout.cot_ids) - 1))
        suffixes += [Suffix(index, min(tokens), tokens) for tokens in sets]
    losses = iter(
        suffix_losses(
            model, rollouts, suffixes, bias=bias, token_budget=token_budget, progress=progress, what=what
        ).tolist()
    )
    effects = []
    for sets in groups:
        base = next(losses)
        effects.append((base, [next(losses) - base for _ in sets]))
    return effects


def substitution_effects(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    *,
    draws: int = 4,
    seed: int = 0,
    token_budget: int | None = None,
    progress: bool = False,
) -> list[torch.Tensor]:
    """Mean rise of the answer's loss, in nats, when another token stands in a token's place, for each token in turn.

    The substitutes are drawn from the chain of thought's other distinct tokens. It asks whether the answer rests on
    what the token says, where leave-one-out asks whether it rests on the token's being there. One rollout costs about
    draws * T / 2 forwards.

    Args:
        model, rollouts, token_budget, progress: see :func:`suffix_losses`.
        draws: substitutes per token.
        seed: of the draws.

    Returns:
        (T,) float64 per rollout; 0 where the chain of thought has one distinct token.
    """
    generator = random.Random(seed)
    suffixes: list[Suffix] = []
    for index, rollout in enumerate(rollouts):
        suffixes.append(Suffix(index, len(rollout.cot_ids) - 1))
        kinds = sorted(set(rollout.cot_ids))
        for place, token in enumerate(rollout.cot_ids):
            others = [kind for kind in kinds if kind != token] or [token]
            suffixes += [Suffix(index, place, token=generator.choice(others)) for _ in range(draws)]
    losses = suffix_losses(
        model, rollouts, suffixes, token_budget=token_budget, progress=progress, what="substitution"
    ).split([1 + draws * len(rollout.cot_ids) for rollout in rollouts])
    return [each[1:].view(-1, draws).mean(1) - each[0] for each in losses]


def single_tokens(rollout: Rollout) -> Groups:
    """Each chain-of-thought token alone."""
    return tuple((token,) for token in range(len(rollout.cot_ids)))


def similar_tokens(model: PreTrainedModel, rollout: Rollout, threshold: float) -> Groups:
    """For each chain-of-thought token, itself and those whose input embeddings are at least so similar (cosine)."""
    embedding = model.get_input_embeddings()
    distinct, place = torch.tensor(rollout.cot_ids).unique(return_inverse=True)
    with torch.no_grad():
        vectors = torch.nn.functional.normalize(embedding(distinct.to(model.device)).double(), dim=-1)
        close = (vectors @ vectors.t() >= threshold).cpu()
    close.fill_diagonal_(True)
    members = [close[kind][place].nonzero()[:, 0].tolist() for kind in range(len(distinct))]
    return tuple(tuple(members[kind]) for kind in place.tolist())
