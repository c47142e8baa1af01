"""Configuration dataclasses; importing them loads no torch."""

from __future__ import annotations

from dataclasses import dataclass


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
        sparsity: weight of an L1 term on the enabled part of the mask, 0 in the paper.
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

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not self.init < self.upper:
            raise ValueError(f"init must lie below upper ({self.upper}), got {self.init}")
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}")
