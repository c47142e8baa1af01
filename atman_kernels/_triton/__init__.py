"""The Triton kernels behind the operators (CUDA and ROCm; CPU tensors under the interpreter)."""

import torch


def require_runnable(device: torch.device) -> None:
    """Raise where Triton cannot run on this device."""
    raise NotImplementedError("the Triton kernels are not bound yet")
