"""The C++ kernel's memory: nothing of order rows x keys."""

from __future__ import annotations

import pytest

from atman_kernels import _cpu
from benchmarks.cpu import peak_memory_ratio


@pytest.mark.slow
@pytest.mark.skipif(not _cpu.isas(), reason="the C++ extension is not built")
def test_peak_memory_of_forward_and_backward_is_near_that_of_the_tensors() -> None:
    # The scores of one call, 8 x 4096 x 4096 in fp32, would be 7 times the tensors.
    assert peak_memory_ratio(4096, head_dim=64, threads=2) < 1.5
