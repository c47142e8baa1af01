"""Norm, rotary embedding and SwiGLU with their backward passes, each written to be one pass over memory.

On the CPU they run eagerly on blocks of rows that stay in cache; on a GPU torch.compile makes one kernel of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y = weight * (x * rstd), rstd = (mean(x^2) + eps)^(-1/2), rounded where Hugging Face's norms round.

    Args:
        x: (..., D) in the model's dtype; weight: (D,).

    Returns:
        y like x, and rstd (..., 1) in float32.
    """
    wide = x.float()
    rstd = torch.rsqrt(torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps))
    return (wide * rstd).to(x.dtype).mul_(weight), rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """dx = rstd * (g - xhat * mean(g * xhat)) with g = weight * dy and xhat = x * rstd."""
    gradient = dy.float() * weight.float()
    normed = x.float() * rstd
    along = (gradient * normed).mean(-1, keepdim=True)
    return gradient.addcmul_(normed, along, value=-1).mul_(rstd).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (rows, H, D) by cos and sin (rows, 1, D), the first half of sin negated.

    With -sin it is its own backward.
    """
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return silu(gate).mul_(up)


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup) of silu(gate) * up, from its inputs alone."""
    return torch.ops.aten.silu_backward(dy * up, gate), silu(gate).mul_(dy)


class Pointwise(NamedTuple):
    """The functions of this module as they run on one device."""

    rms_norm: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] = rms_norm
    rms_norm_backward: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = rms_norm_backward
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = rotate
    swiglu: Callable[[Tensor, Tensor], Tensor] = swiglu
    swiglu_backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = swiglu_backward

    @classmethod
    def on(cls, device: torch.device) -> Pointwise:
        """Compiled for any number of rows on a GPU, as they stand elsewhere."""
        if device.type != "cuda":
            return cls()
        return cls(
            torch.compile(rms_norm, dynamic=True),
            torch.compile(rms_norm_backward, dynamic=True),
            torch.compile(rotate, dynamic=True),
            torch.compile(swiglu, dynamic=True),
            torch.compile(swiglu_backward, dynamic=True),
        )
