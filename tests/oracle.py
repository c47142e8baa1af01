"""The one pass criterion for outputs and gradients: at most twice the error of the same-dtype PyTorch reference."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative rounding of one operation per dtype, allowed on top of the reference's own error.
_ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_as_exact_as_reference(
    name: str, actual: Tensor, reference: Tensor, oracle: Tensor, terms: float = 0.0
) -> None:
    """Assert that ``actual`` is as near to the oracle as PyTorch is in the same dtype.

    Args:
        name: what is compared, for the message.
        actual: the result under test, any shape and dtype.
        reference: the same computed by ``atman_kernels.reference`` in the dtype of the inputs.
        oracle: the same computed by the reference in float64.
        terms: the largest sum of magnitudes behind an element, for cases so small that the reference's error may be 0
            where the terms cancel.

    Passes if max|actual - oracle| <= 2 max|reference - oracle| + rounding * max|oracle| + eps * terms, with eps that of
    the result's dtype, and infinities agree exactly.
    """
    assert actual.shape == oracle.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    finite = oracle.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{name}: NaN or infinity where the oracle has none, or the reverse"
    assert torch.equal(actual.double()[~finite], oracle[~finite]), f"{name}: infinities differ"
    if not finite.any():
        return
    exact = oracle[finite]
    error = (actual.double()[finite] - exact).abs().max().item()
    allowed = 2 * (reference.double()[finite] - exact).abs().max().item()
    allowed += _ROUNDING[actual.dtype] * exact.abs().max().item() + torch.finfo(actual.dtype).eps * terms
    assert error <= allowed, f"{name}: error {error:.3e} against float64, allowed {allowed:.3e}"
