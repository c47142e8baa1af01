"""Leave-one-out and AtMan: suppress one token, or one concept, at a time and see how much the answer's loss rises.

Whatever happens to chain-of-thought token v changes rows v and later only. Those rows are recomputed against the
unaltered run's keys and values of everything before v, which is a nested range of one shared prefix: the variants of
a T-token rollout cost about T / 2 forwards instead of T. It works from an unbiased run only: a prefix has no bias.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atmanrl.rollout import Rollout
from atmanrl.saliency.batches import Batch, in_batches, prepared
from atmanrl.saliency.packing import Segment
from atmanrl.saliency.scores import Passes, TokenScores, scored_in_nats

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
    found = suffix_losses(model, rollouts, suffixes, bias=bias, token_budget=token_budget, progress=progress, what=what)
    losses = iter(found.tolist())
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
) -> list[Tensor]:
    """Mean rise of the answer's loss, in nats, when another token stands in a token's place, for each token in turn.

    The substitutes are drawn from the chain of thought's other distinct tokens. This measures the
    effect of the token's content. Leave-one-out measures the effect of its presence. One rollout costs about
    draws * T / 2 forwards.

    Args:
        model: see :func:`prepared`; where it is sharded every rank must call.
        rollouts, token_budget, progress: see :func:`suffix_losses`.
        draws: substitutes per token.
        seed: of the draws.

    Returns:
        (T,) float64 per rollout; 0 where the chain of thought has one distinct token.
    """
    model = prepared(model, rollouts)
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


@dataclass(frozen=True)
class Suffix:
    """A rollout altered from one of its chain-of-thought tokens on.

    Attributes:
        rollout: its index.
        start: the first token that is altered, 0..T-1.
        suppressed: tokens whose key columns get a bias, all at ``start`` or later.
        token: id in place of the token at ``start``; None keeps it.
    """

    rollout: int
    start: int
    suppressed: tuple[int, ...] = ()
    token: int | None = None


def suffix_rows(rollout: Rollout, start: int) -> int:
    """Rows that recomputing from chain-of-thought token ``start`` takes."""
    return len(rollout.completion_ids) - 1 - start


def suffix_losses(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    suffixes: Sequence[Suffix],
    *,
    bias: float = 0.0,
    token_budget: int | None = None,
    progress: bool = False,
    what: str = "variants",
) -> Tensor:
    """Mean negative log-likelihood of the answer under each suffix, (n,) float64 nats on the CPU.

    Equals a full forward per variant up to rounding.

    Args:
        model: see :func:`prepared`; borrowed frozen.
        rollouts: each with a chain of thought and an answer.
        suffixes: in any order; those of neighbouring rollouts share batches.
        bias: of the suppressed columns, natural-log units; -inf hides them.
        token_budget: see :func:`in_batches`; the rows of the unaltered runs count as those before the suffixes.
        progress: show a bar on stderr, labelled ``what``.
    """
    runs = [rollout.prompt_ids + rollout.completion_ids[:-1] for rollout in rollouts]
    order = sorted(range(len(suffixes)), key=lambda number: suffixes[number].rollout)

    def segment(suffix: Suffix) -> Segment:
        rollout, run = rollouts[suffix.rollout], runs[suffix.rollout]
        return Segment(
            rollout,
            before=run,
            sequence=run,
            seen=len(rollout.prompt_ids) + suffix.start,
            biased=[token - suffix.start for token in suffix.suppressed],
            targets=rollout.answer_ids,
            first=suffix.token,
        )

    def compute(batch: Batch) -> list[float]:
        with torch.no_grad():
            nll = batch.likelihood(batch.packed.key_bias(batch.filled(bias)))
        batch.passed()
        means: list[float] = batch.packed.mean_per_rollout(nll.double()).tolist()
        return means

    found = in_batches(
        model,
        [segment(suffixes[number]) for number in order],
        compute,
        token_budget=token_budget,
        forward_only=True,
        progress=progress,
        what=what,
    )
    losses = torch.empty(len(suffixes), dtype=torch.float64)
    losses[order] = torch.tensor(list(found), dtype=torch.float64)
    return losses
