"""Chance: what every other estimator must beat."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from atmanrl.rollout import Rollout
from atmanrl.saliency.estimators.interface import Passes, TokenScores


@dataclass(frozen=True)
class Random:
    """score_v uniform in 0..1: what every other estimator must beat.

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
