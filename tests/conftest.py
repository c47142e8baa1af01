"""Settings that must precede the first import of the package, and the skipping of tests that need a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import sys

import pytest

# Beside others each process of the tests has one thread; it must be known before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import settings

from tests.random_cases import PROFILE

# What launchers, terminals and batch systems leave in the environment, and tests and their child processes would obey.
LEFT_OVER = re.compile(
    r"(ACCELERATE|FSDP|TORCHELASTIC|MASTER|OMPI|PMI|MV2)_.*|((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE))"
    r"|COLUMNS|LINES|NO_COLOR|FORCE_COLOR|TTY_.*|GLIBC_TUNABLES|MALLOC_.*"
)
for name in filter(LEFT_OVER.fullmatch, list(os.environ)):
    del os.environ[name]

# No test needs the network; the trainer's telemetry would look for it from a thread of every process that trains.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

# Without a GPU the kernels are tested in Triton's interpreter, which has to be chosen before they are decorated.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("random cases", PROFILE)
settings.load_profile("random cases")

# An extension built elsewhere, in the place of the package's own: `make sanitize`.
if extension := os.environ.get("ATMAN_EXTENSION"):
    spec = importlib.util.spec_from_file_location("atman_kernels._C", extension)
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
