"""Rollouts: prompt | chain of thought | marker | answer, as token ids."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Rollout:
    """One sampled completion, split on tokens.

    Attributes:
        prompt_ids: token ids of the prompt, never masked; rollouts with equal prompts share its keys and values.
        cot_ids: token ids of the chain of thought; each gets one number of the mask.
        answer_ids: token ids of the answer's value; the loss is their mean negative log-likelihood.
        marker_ids: token ids between chain of thought and answer ("The final answer is"); not masked, not in the loss.

    Any iterable of integers is accepted and kept as a tuple. An empty chain of thought or answer is allowed (a
    completion may lack them): nothing is optimised for such a rollout and its saliency reward is 0.

    Raises:
        ValueError: for an empty prompt or a negative token id.
    """

    prompt_ids: tuple[int, ...]
    cot_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    marker_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "cot_ids", "answer_ids", "marker_ids"):
            ids = as_ids(name, getattr(self, name))
            object.__setattr__(self, name, ids)
        if not self.prompt_ids:
            raise ValueError("prompt_ids is empty: the first chain-of-thought token needs something to follow")

    @property
    def completion_ids(self) -> tuple[int, ...]:
        """Chain of thought, marker and answer in a row."""
        return self.cot_ids + self.marker_ids + self.answer_ids

    def __len__(self) -> int:
        """Tokens of prompt and completion together."""
        return len(self.prompt_ids) + len(self.completion_ids)


def as_ids(name: str, values: Iterable[int]) -> tuple[int, ...]:
    # operator.index takes Python and NumPy integers and one-element integer tensors, and refuses floats.
    ids = tuple(operator.index(i) for i in values)
    if ids and min(ids) < 0:
        raise ValueError(f"{name} holds the negative token id {min(ids)} at position {ids.index(min(ids))}")
    return ids
