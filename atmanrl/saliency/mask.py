"""The paper's mask: one trainable number per CoT token, its effective bias, its loss and its optimiser."""

from __future__ import annotations

import torch
from torch import Tensor

from atmanrl.config import MaskConfig


class TrainableMask:
    """H of a packed batch, one number per CoT token of all rollouts, and the AdamW that updates it.

    AdamW acts on each number alone and the loss is a sum over rollouts, so a rollout's mask does not depend on which
    others share the tensor.

    Args:
        n_tokens: CoT tokens of all rollouts.
        config: initial value, clamp, scale and optimiser.
        device: where H lies.
        dtype: float32, or float64 for a float64 model.

    Source: AtManRL (arXiv 2604.16158), section 3.
    """

    def __init__(self, n_tokens: int, config: MaskConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        self.config = config
        self.values = torch.full((n_tokens,), config.init, device=device, dtype=dtype, requires_grad=True)
        self._optimizer = torch.optim.AdamW(
            [self.values],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )

    def bias(self) -> Tensor:
        """``scale * min(H, upper)``, (n_tokens,), natural-log units."""
        return self.config.scale * self.values.clamp(max=self.config.upper)

    def penalty(self) -> Tensor | None:
        """``sparsity * sum_v |min(H_v, upper) / init - 1|`` in nats, a scalar; None where sparsity is 0.

        The sum runs over single tokens, so a token stays restored only where that lowers its rollout's loss by more
        than ``sparsity``, however long the chain of thought is.
        """
        if not self.config.sparsity:
            return None
        restored = 1 - self.values.clamp(max=self.config.upper) / self.config.init
        return self.config.sparsity * restored.abs().sum()

    def select(self, kept: Tensor) -> TrainableMask:
        """The numbers where ``kept`` (n_tokens,) bool is True, with their optimiser state."""
        chosen = TrainableMask(int(kept.sum()), self.config, device=self.values.device, dtype=self.values.dtype)
        with torch.no_grad():
            chosen.values.copy_(self.values[kept])
        chosen._optimizer.state[chosen.values] = {
            name: value[kept] if value.dim() else value.clone()
            for name, value in self._optimizer.state[self.values].items()
        }
        return chosen

    def step(self, losses: Tensor) -> None:
        """One AdamW update of H down the gradient of the summed per-rollout ``losses`` (n,) and the penalty."""
        objective = losses.sum()
        penalty = self.penalty()
        if penalty is not None:
            objective = objective + penalty.to(objective.dtype)
        (self.values.grad,) = torch.autograd.grad(objective, [self.values])
        self._optimizer.step()
