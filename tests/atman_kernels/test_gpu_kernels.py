"""The checks that need a GPU; ``test_gpu_rehearsal`` runs each without one, on sizes for Triton's interpreter."""

from __future__ import annotations

import pytest

from tests.atman_kernels.gpu_checks import CHECKS


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_on_the_gpu(name: str) -> None:
    CHECKS[name]("cuda")
