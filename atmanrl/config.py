"""Configuration dataclasses; importing them loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

AnswerLoss = Literal["value", "all"]


@dataclass(frozen=True)
class MaskConfig:
    """How one mask is optimised; the defaults are the paper's (AtManRL, arXiv 2604.16158).

    The trainable number of a CoT token is H; the bias its key column gets is ``scale * min(H, upper)``, natural-log
    units. AdamW updates H alone, for a fixed number of steps.

    Attributes:
        steps: optimiser steps.
        lr: step size of AdamW.
        betas: AdamW's moment decays.
        eps: AdamW's denominator offset.
        weight_decay: decoupled weight decay; alone it restores 1 - (1 - lr * weight_decay) ** steps of the mask.
        init: H at the start, negative: every CoT token suppressed.
        scale: factor from the clamped H to the bias.
        upper: upper clamp of H; 0 means a token is at most fully enabled.
        sparsity: nats that restoring one token completely costs: the loss gains
            ``sparsity * sum_v |min(H_v, upper) / init - 1|``, the L1 norm of what was restored. 0 in the paper.
        answer_loss: which tokens the loss averages over: "value", the answer's, or "all", the marker's as well.

    Raises:
        ValueError: for a value outside its range, with the value.
    """

    steps: int = 200
    lr: float = 1e-3
    betas: tuple[float, float] = (0.6, 0.9999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    init: float = -0.4
    scale: float = 10.0
    upper: float = 0.0
    sparsity: float = 0.0
    answer_loss: AnswerLoss = "value"

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        # Recipes are YAML, where a pair arrives as a list.
        object.__setattr__(self, "betas", tuple(self.betas))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, got {self.eps}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if not (self.init < 0 and self.init < self.upper):
            raise ValueError(f"init must be negative and below upper ({self.upper}), got {self.init}")
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}")
        if not self.sparsity >= 0:
            raise ValueError(f"sparsity must not be negative, got {self.sparsity}")
        if self.answer_loss not in get_args(AnswerLoss):
            raise ValueError(f"answer_loss must be one of {get_args(AnswerLoss)}, got {self.answer_loss!r}")
