"""Operands and results of one operator call, in the form that the kernels of every backend take."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# The window of an attention without one, from here to the kernels of every backend: it hides nothing. No sequence is as
# long, and window plus position fits 32 bits.
NO_WINDOW = 2**30
# Rounded to fp32, an lse up to this moves the p of its row by at most 2^-19. Where it is larger, p = exp(score - lse)
# does not sum to 1, and p is normalised by the row's own sum again.
LARGEST_LSE = 64.0


class AttentionProblem(NamedTuple):
    """The operands of a forward or backward.

    Attributes:
        q: (B, Tq, Hq, D); k, v: (B, Tk, Hkv, D), any strides with a unit stride along D.
        key_bias: (B, Tk) fp32, or None.
        prefix_k, prefix_v: (P, Hkv, D), or None.
        sequences, tiles_q, tiles_k: tables of an :class:`atman_kernels.plan.AttentionPlan`.
        sm_scale, causal, window: as in :func:`atman_kernels.attention`, but the window is a number up to NO_WINDOW.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_bias: Tensor | None
    prefix_k: Tensor | None
    prefix_v: Tensor | None
    sequences: Tensor
    tiles_q: Tensor
    tiles_k: Tensor
    sm_scale: float
    causal: bool
    window: int

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Operands and tables, in their order."""
        return self[:9]


class Gradients(NamedTuple):
    """What a backward fills, shaped like the operand each is the gradient of; None where it is not needed."""

    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    dkey_bias: Tensor | None


class StatisticsProblem(NamedTuple):
    """The operands of the attention statistics; those not explained here as in :class:`AttentionProblem`.

    Attributes:
        lse: (B, Hq, Tq) of the attention whose statistics are wanted.
        rows: (B, Tq) bool, the chosen query rows, or None for all.
        attention_window: keys that a row of the attention sees, NO_WINDOW for all.
        window, horizon: as in :func:`atman_kernels.attention_statistics`.
    """

    q: Tensor
    k: Tensor
    lse: Tensor
    key_bias: Tensor | None
    prefix_k: Tensor | None
    rows: Tensor | None
    sequences: Tensor
    tiles_q: Tensor
    tiles_k: Tensor
    sm_scale: float
    attention_window: int
    window: int
    horizon: tuple[int, int]


class Statistics(NamedTuple):
    """What the attention statistics fill; ``distance`` is None where it is not needed.

    Attributes:
        distance: (n_seq, Hq); windowed_distance: (B, Hq, Tq); received: (B, Hq, Tk).
        received_count: (B, Tk) int32.
    """

    distance: Tensor | None
    windowed_distance: Tensor
    received: Tensor
    received_count: Tensor
