"""`make gpu` cannot fail by a mere slip on the first GPU machine: every step of it is walked on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import checks, gpu, timing
from benchmarks.cases import AttentionCase
from benchmarks.device import Device
from benchmarks.peers import PEERS
from tests.atman_kernels.gpu_checks import REHEARSAL


def _read(directory: Path, kind: str) -> dict:
    (path,) = directory.glob(f"{kind}*_rehearsal_*.json")
    return json.loads(path.read_text())


# What a GPU machine may lack, and the compiled extension.
ABSENT = ("pytest", "transformers", "trl", "accelerate", "datasets", "peft", "einops", "matplotlib", "atman_kernels._C")


@pytest.mark.slow
def test_every_stage_passes_and_leaves_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch, triton and numpy alone."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(site)}
    # Time enough for every stage also on a machine that is busy with other things.
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", str(tmp_path), "--seconds", "3600"]
    result = subprocess.run(command, cwd=gpu.ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert set(_read(tmp_path, "stages")["stages"].values()) == {"passed"}
    # More than one process runs, so that the change to the next is rehearsed as well.
    assert len(REHEARSAL) > checks.TASKS_PER_PROCESS
    assert _read(tmp_path, "checks")["checks"] == dict.fromkeys(REHEARSAL, "passed")
    rows = _read(tmp_path, "attention")["results"]
    assert {row["peer"] for row in rows} == set(PEERS)
    assert all("ms" in row for row in rows if row["peer"].startswith(("atman", "eager", "sdpa_math")))
    searched = _read(tmp_path, "tuning")["timings"]
    assert all(isinstance(ms, float) for timings in searched.values() for ms in timings.values())

    # Called again, the benchmarks find every number there and measure nothing.
    monkeypatch.setattr(timing, "measure", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(sys, "argv", ["timing", "--rehearse", str(tmp_path)])
    assert timing.main() == 0


def test_all_stages_together_end_within_ten_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def takes_all_its_time(stage: gpu.Stage, seconds: float, device: Device) -> str:
        nonlocal now
        now += seconds
        return f"cut off after {seconds:.0f} s"

    monkeypatch.setattr(gpu, "run_stage", takes_all_its_time)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now)
    monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse", str(tmp_path)])
    assert gpu.main() == 1
    assert 0 < now <= gpu.SECONDS < 600
    assert len(_read(tmp_path, "stages")["stages"]) == len(gpu.stages(Device(tmp_path)))


def test_a_stage_that_hangs_is_ended(tmp_path: Path) -> None:
    stage = gpu.Stage("hangs", (sys.executable, "-c", "import time; time.sleep(60)"), 1.0, timed=False)
    assert gpu.run_stage(stage, 0.5, Device(tmp_path)) == "cut off after 0 s"


def test_a_benchmark_that_does_not_return_is_passed_over_the_third_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def hangs_at_first(case: AttentionCase, peer: str, direction: str, device: Device) -> dict[str, object]:
        calls.append(peer)
        if len(calls) <= timing.STARTS:
            raise KeyboardInterrupt
        return {"case": case.key, "peer": peer, "direction": direction, "ms": 1.0, "tflops": 1.0, "peak_mib": 0.0}

    monkeypatch.setattr(timing, "measure", hangs_at_first)
    monkeypatch.setattr(sys, "argv", ["timing", "--rehearse", str(tmp_path)])
    for _ in range(timing.STARTS):
        with pytest.raises(KeyboardInterrupt):
            timing.main()
    assert timing.main() == 0
    first, second, *_ = PEERS
    assert calls[: timing.STARTS + 1] == [first, first, second]
    unavailable = [row for row in _read(tmp_path, "attention")["results"] if "unavailable" in row]
    assert [(row["peer"], row["unavailable"]) for row in unavailable] == [(first, "did not return")]


def test_a_stage_that_ends_in_an_error_is_called_again_while_time_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = iter(["exit status 1", "passed"])
    monkeypatch.setattr(gpu, "stages", lambda device: [gpu.Stage("checks", (), 1.0, restarts=2)])
    monkeypatch.setattr(gpu, "run_stage", lambda stage, seconds, device: next(outcomes))
    monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse", str(tmp_path)])
    assert gpu.main() == 0
