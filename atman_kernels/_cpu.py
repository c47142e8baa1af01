"""The C++ kernel behind the operators (csrc/), on CPU tensors in float32, float16 and bfloat16.

Sums are fp32. bfloat16 products use the processor's bf16 dot instructions where it has them (``avx512_bf16``); p and
ds are then rounded to bfloat16 where they are operands, but not for lse, delta or dkey_bias. Elsewhere, and in float16,
the inputs are converted to fp32.

The environment variable ATMAN_CPU_ISA names the instruction set to use (one of ``isas()``) instead of the best one.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from atman_kernels.problem import AttentionProblem, Gradients, Statistics, StatisticsProblem

_C: Any
try:
    # Not `from atman_kernels import _C`: that would import the package's public functions from below.
    _C = import_module("atman_kernels._C")
except ImportError:
    _C = None

# Tensors that stand first in a problem, before its tables.
_N_TENSORS = 6
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_isa = os.environ.get("ATMAN_CPU_ISA", "")


def supports(q: Tensor, *, forced: bool) -> bool:
    """Whether the C++ kernel computes for this tensor; where it does not, the reference does.

    Args:
        q: any operand of the call.
        forced: ``backend("cpu")`` is active, so that falling back is an error.

    Raises:
        ValueError: forced, and q is not a CPU tensor in float32, float16 or bfloat16.
        RuntimeError: forced, and the extension was not built.
    """
    if q.device.type != "cpu" or q.dtype not in _DTYPES:
        if forced:
            raise ValueError(
                f"the C++ kernel computes on CPU tensors in float32, float16 or bfloat16, got {q.dtype} on {q.device}"
            )
        return False
    if _C is None:
        if forced:
            raise RuntimeError(f"the C++ kernel is not built; {_HOW_TO_BUILD}")
        _warn_once()
        return False
    return True


def isas() -> list[str]:
    """Instruction sets that this build has and this processor runs, best first; empty if the extension is missing."""
    return [] if _C is None else list(_C.isas())


def attention_forward(o: Tensor, lse: Tensor, x: AttentionProblem, *, distance: Tensor | None = None) -> None:
    """Write o (B, Tq, Hq, D) and lse (B, Hq, Tq); see ``atman_kernels.ops``.

    With ``distance`` (B, Hq, Tq), of causal attention, also each row's sum_s p[t,s] (t - s), 0 in a row without a key.

    Raises:
        ValueError: the tensors disagree in shape or dtype, or a sequence lies outside of them.
        MemoryError: no memory for the packed tiles.
    """
    _C.attention_forward(
        o, lse, *x[:_N_TENSORS], x.sequences, x.sm_scale, x.causal, x.window,
        torch.get_num_threads(), _isa, distance=distance,
    )  # fmt: skip


def attention_backward(
    gradients: Gradients, do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, x: AttentionProblem
) -> None:
    """Write the gradients that are not None; errors as for :func:`attention_forward`.

    With float16 or bfloat16 inputs and ``dkey_bias``, delta is summed from unrounded p and dp in a pass of its own: the
    rounded o would cost the cancelling sum over a column several digits.
    """
    _C.attention_backward(
        *gradients, do, dlse, o, lse, *x[:_N_TENSORS], x.sequences, x.sm_scale, x.causal,
        x.window, torch.get_num_threads(), _isa,
    )  # fmt: skip


def attention_statistics(out: Statistics, x: StatisticsProblem) -> None:
    """Write the outputs that are not None; rows as uint8. See ``atman_kernels.statistics``.

    Raises:
        ValueError: the tensors disagree in shape or dtype, or a sequence lies outside of them.
        MemoryError: no memory for the packed keys.
    """
    _C.attention_statistics(
        *out, *x[:_N_TENSORS], x.sequences, x.sm_scale, x.attention_window, x.window, *x.horizon,
        torch.get_num_threads(), _isa,
    )  # fmt: skip


_HOW_TO_BUILD = "install the package (pip install .) or build it in place (see CONTRIBUTING.md)"


@cache
def _warn_once() -> None:
    warnings.warn(
        f"atman_kernels: the C++ kernel is not built, the slow reference computes instead; {_HOW_TO_BUILD}",
        RuntimeWarning,
        stacklevel=2,
    )
