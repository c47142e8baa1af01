"""A path of the GPU's kernels that failed its smoke test is named once and passed over; the next one computes."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from atman_kernels import _triton, ops, smoke, trust
from tests.atman_kernels import gpu_checks

DEVICE = torch.device("cuda", 0)
ON_GPU = SimpleNamespace(device=DEVICE, dtype=torch.bfloat16, is_cuda=True)


@pytest.fixture(autouse=True)
def _a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(_triton, "require_runnable", lambda device, dtype: None)
    trust.failed.cache_clear()


def test_what_was_never_tested_is_trusted_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.kernels_for("", ON_GPU) is _triton
        trust.keep({}, DEVICE)
        assert ops.kernels_for("", ON_GPU) is _triton


@pytest.mark.parametrize(("path", "other"), [(trust.ATTENTION, trust.STATISTICS), (trust.STATISTICS, trust.ATTENTION)])
def test_a_path_that_failed_is_named_and_the_reference_computes(path: str, other: str) -> None:
    trust.keep({path: "d64 bf16: dk is off by 3"}, DEVICE)
    with pytest.warns(RuntimeWarning, match=f"{path} failed its smoke test .*dk is off by 3.*the reference computes"):
        assert ops.kernels_for("", ON_GPU, path) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.kernels_for("", ON_GPU, path) is None
        assert ops.kernels_for("", ON_GPU, other) is _triton
        assert ops.kernels_for("triton", ON_GPU, path) is _triton


def test_another_version_or_device_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    trust.keep({trust.ATTENTION: "wrong"}, DEVICE)
    monkeypatch.setattr(trust, "version", lambda package: "99.0")
    trust.failed.cache_clear()
    assert not trust.failed(trust.ATTENTION, DEVICE)


@pytest.mark.slow
def test_each_path_is_judged_by_its_own_checks() -> None:
    """One that takes its process with it included."""
    checks = {
        "attention d64 bf16": gpu_checks.passes,
        "fused backward d64 bf16": gpu_checks.aborts,
        "fused backward d128 bf16": gpu_checks.passes,
        "statistics d64 bf16": gpu_checks.raises,
    }
    assert smoke.failing_paths(checks, "cpu") == {
        trust.FUSED: "fused backward d64 bf16: the process died with exit status -6",
        trust.STATISTICS: "statistics d64 bf16: AssertionError: wrong on cpu",
    }
