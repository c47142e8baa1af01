"""The Triton kernels behind the operators (CUDA and ROCm; CPU tensors under the interpreter)."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from atman_kernels.problem import AttentionProblem, Gradients, Statistics, StatisticsProblem

# Of a finite bias. A row whose largest score is beyond has p = exp(score - lse) with a factor of its own, up to e: fp32
# numbers are 2 apart there. Further on base 2 overflows.
LARGEST_BIAS = 2.0**24


def require_runnable(device: torch.device, dtype: torch.dtype) -> None:
    """Raise where the Triton kernels cannot compute on this device in this dtype.

    Raises:
        ValueError: for float64.
        RuntimeError: if Triton is not installed, on devices other than CUDA's (and ROCm's), and for CPU tensors unless
            TRITON_INTERPRET=1 was set before the first import of Triton.
    """
    if dtype == torch.float64:
        raise ValueError('the "triton" backend computes in float32, float16 and bfloat16; float64 needs "reference"')
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError('the "triton" backend needs the triton package, which is not installed')
    import triton

    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise RuntimeError(
            'the "triton" backend runs on CPU tensors only in Triton\'s interpreter:'
            " set TRITON_INTERPRET=1 in the environment before starting Python, or move the tensors to a GPU"
        )
    if device.type not in ("cpu", "cuda"):
        raise RuntimeError(f'the "triton" backend computes on CUDA and ROCm devices, not on {device}')


def attention_forward(o: Tensor, lse: Tensor, x: AttentionProblem) -> None:
    """Fill ``o`` and ``lse``, contiguous, for every row that belongs to a sequence; see ``atman_kernels.ops``."""
    from atman_kernels._triton import forward, launch

    with torch.cuda.device_of(x.q):
        for each in forward.forward_launches(launch.device_family(x.q.device), o, lse, x):
            each.run()


def attention_backward(
    gradients: Gradients,
    do: Tensor,
    dlse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    x: AttentionProblem,
    *,
    fused: bool = False,
) -> None:
    """Fill the contiguous gradients that are not None; see ``atman_kernels.ops`` and ``backward`` for fused."""
    from atman_kernels._triton import backward, launch

    family = launch.device_family(x.q.device)
    with torch.cuda.device_of(x.q):
        for each in backward.backward_launches(family, gradients, do, dlse, o, lse, x, fused=fused):
            each.run()


def attention_statistics(out: Statistics, x: StatisticsProblem) -> None:
    """Fill the contiguous outputs that are not None; ``rows`` as uint8. See ``atman_kernels.statistics``."""
    from atman_kernels._triton import launch, statistics

    with torch.cuda.device_of(x.q):
        for each in statistics.statistics_launches(launch.device_family(x.q.device), out, x):
            each.run()
