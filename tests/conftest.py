"""Settings that must precede the first import of Triton, and the skipping of tests that need a GPU."""

from __future__ import annotations

import os

import pytest
import torch

# Without a GPU the kernels are tested in Triton's interpreter, which has to be chosen before they are decorated.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
