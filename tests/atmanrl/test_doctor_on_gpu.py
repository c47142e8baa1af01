"""On a GPU, ``atmanrl doctor`` says which of the kernels are trusted, and keeps it for the processes to come."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("triton")

from atman_kernels import smoke, trust
from atmanrl import doctor


@pytest.mark.parametrize(
    "failures", [{}, {trust.FUSED: "fused backward d64 bf16: dq is off by 3"}], ids=["good", "bad"]
)
def test_doctor_names_what_is_trusted_and_what_computes_instead(
    failures: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    # Not on every device.
    checks = {f"{path} d64 bf16": None for path in (trust.ATTENTION, trust.FUSED)}
    monkeypatch.setattr(smoke, "smoke_checks", lambda device: checks)
    monkeypatch.setattr(smoke, "failing_paths", lambda checks, device: failures)
    monkeypatch.setattr(doctor, "_devices", lambda: "some GPU")
    monkeypatch.setattr(doctor, "_candidates", lambda built: [])
    output = io.StringIO()
    assert doctor.doctor(Console(file=output, width=200)) == bool(failures)
    printed = output.getvalue()
    assert "attention: trusted" in printed
    assert "statistics: not on this device" in printed
    expected = "FAILED, the deterministic backward computes instead; fused backward d64 bf16: dq is off by 3"
    assert (f"fused backward: {expected}" if failures else "fused backward: trusted") in printed
    trust.failed.cache_clear()
    if failures:
        with pytest.warns(RuntimeWarning, match="fused backward failed its smoke test"):
            assert trust.failed(trust.FUSED, torch.device("cuda", 0))
    assert not trust.failed(trust.ATTENTION, torch.device("cuda", 0))
    trust.failed.cache_clear()
