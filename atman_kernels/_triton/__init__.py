"""The Triton kernels behind the operators (CUDA and ROCm; CPU tensors under the interpreter)."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor


def require_runnable(device: torch.device, dtype: torch.dtype) -> None:
    """Raise where the Triton kernels cannot compute on this device in this dtype.

    Raises:
        ValueError: for float64.
        RuntimeError: if Triton is not installed, or for CPU tensors unless TRITON_INTERPRET=1 was set before the
            first import of Triton.
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


def attention_forward(
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    sequences: Tensor,
    tiles_q: Tensor,
    tiles_k: Tensor,
    sm_scale: float,
    causal: bool,
    window: int | None,
) -> None:
    """Fill ``o`` and ``lse``, contiguous, for every row that belongs to a sequence; see ``atman_kernels.ops``."""
    from atman_kernels._triton import forward, launch

    with torch.cuda.device_of(q):
        for each in forward.forward_launches(
            launch.device_family(q.device),
            o, lse, q, k, v, key_bias, prefix_k, prefix_v, sequences, tiles_q, tiles_k, sm_scale, causal, window,
        ):  # fmt: skip
            each.run()


def attention_backward(
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dkey_bias: Tensor | None,
    do: Tensor,
    dlse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    sequences: Tensor,
    tiles_q: Tensor,
    tiles_k: Tensor,
    sm_scale: float,
    causal: bool,
    window: int | None,
    fused: bool = False,
) -> None:
    """Fill those of the contiguous outputs that are not None; see ``atman_kernels.ops`` and ``backward`` for fused."""
    from atman_kernels._triton import backward, launch

    with torch.cuda.device_of(q):
        for each in backward.backward_launches(
            launch.device_family(q.device),
            dq, dk, dv, dkey_bias, do, dlse, o, lse, q, k, v, key_bias, prefix_k, prefix_v,
            sequences, tiles_q, tiles_k, sm_scale, causal, window, fused=fused,
        ):  # fmt: skip
            each.run()


def attention_statistics(
    distance: Tensor | None,
    windowed: Tensor,
    received: Tensor,
    received_count: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    key_bias: Tensor | None,
    prefix_k: Tensor | None,
    rows: Tensor | None,
    sequences: Tensor,
    tiles_q: Tensor,
    tiles_k: Tensor,
    sm_scale: float,
    attention_window: int | None,
    window: int,
    horizon: tuple[int, int],
) -> None:
    """Fill the contiguous outputs that are not None; see ``atman_kernels.statistics_ops``."""
    from atman_kernels._triton import launch, statistics

    with torch.cuda.device_of(q):
        for each in statistics.statistics_launches(
            launch.device_family(q.device),
            distance, windowed, received, received_count, q, k, lse, key_bias, prefix_k, rows,
            sequences, tiles_q, tiles_k, sm_scale, attention_window, window, horizon,
        ):  # fmt: skip
            each.run()
