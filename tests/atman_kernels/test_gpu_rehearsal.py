"""`make gpu` cannot fail by a mere slip on the first GPU machine: every step of it is walked on a CPU."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from atman_kernels._triton.launch import BLOCK_SIZES_FILE, BLOCK_SIZES_VARIABLE, kernels_label
from atman_kernels.processes import HUNG, run_checks
from benchmarks import checks, device, gpu, timing, tune
from benchmarks.cases import TARGET_CASES, AttentionCase, attention_cases
from benchmarks.device import Device
from benchmarks.peers import PEERS
from tests.atman_kernels import gpu_checks
from tests.atman_kernels.gpu_checks import REHEARSAL


@pytest.fixture(autouse=True)
def _of_one_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that run in this process neither follow the repository nor leave their block sizes to other tests."""
    monkeypatch.setenv("ATMAN_COMMIT", "abc1234")
    monkeypatch.setenv(BLOCK_SIZES_VARIABLE, "")


def _read(directory: Path, kind: str) -> dict:
    (path,) = directory.glob(f"{kind}*_rehearsal_*.json")
    return json.loads(path.read_text())


# What a GPU machine may lack, and the compiled extension.
ABSENT = ("pytest", "transformers", "trl", "accelerate", "datasets", "peft", "einops", "matplotlib", "atman_kernels._C")
# NVIDIA's tools as far as a rehearsal needs them: they say how they were called and run what they are given.
_TOOL = """#!{python}
import os, subprocess, sys
at = sys.argv.index({python!r})
print(os.path.basename(sys.argv[0]), sys.argv[1:at], "uncached", os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"))
sys.stdout.flush()
sys.exit(subprocess.run(sys.argv[at:]).returncode)
"""


def _tools(directory: Path) -> Path:
    directory.mkdir()
    for name in ("ncu", "compute-sanitizer"):
        (directory / name).write_text(_TOOL.format(python=sys.executable))
        (directory / name).chmod(stat.S_IRWXU)
    return directory


@pytest.mark.slow
def test_every_stage_passes_and_leaves_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch, triton and numpy alone, in a tree without history, and with NVIDIA's tools."""
    site, results = tmp_path / "site", tmp_path / "results"
    site.mkdir()
    (site / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(site)}
    environment["PATH"] = f"{_tools(tmp_path / 'bin')}{os.pathsep}{os.environ['PATH']}"
    # Time enough for every stage also on a machine that is busy with other things.
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", str(results), "--seconds", "3600"]
    ran = subprocess.run(command, cwd=gpu.ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    content = _read(results, "gpu")
    assert content["commit"] == "abc1234"
    assert set(content["stages"].values()) == {"passed"}
    assert [stage.name for stage in gpu.stages(Device(results))] == list(content["stages"])
    tuned_label = kernels_label(Device(results).tuned_block_sizes())
    for section, names in (("smoke", None), ("checks", set(REHEARSAL))):
        for label, outcomes in content[section].items():
            assert set(outcomes.values()) == {"passed"}
            assert names is None or set(outcomes) == names
            assert label in (content["kernels"], tuned_label)
    assert tuned_label in content["checks"]
    # No more than comes back from a machine that is lent.
    assert len(list(results.rglob("*"))) <= 8 - len(("masks", "update", "update-lora16"))

    profile, sanitized = content["reports"]["profile of three kernels"], content["reports"]["sanitizer"]
    assert "--launch-count" in profile
    assert "backward_keys_kernel" in profile
    assert "uncached None" in profile
    assert sanitized.startswith("compute-sanitizer")
    assert "uncached 1" in sanitized

    (committed,) = results.glob(f"attention_*_k{content['kernels']}.json")
    rows = json.loads(committed.read_text())["results"]
    assert {row["peer"] for row in rows} == set(PEERS)
    assert all("ms" in row for row in rows if row["peer"].startswith(("atman", "eager", "sdpa_math")))
    searched = _read(results, "tuning")["timings"]
    assert {name for timings in searched.values() for times in timings.values() for name in times} == {
        "packed",
        "masks",
    }
    assert all(
        isinstance(ms, float) for shapes in searched.values() for times in shapes.values() for ms in times.values()
    )

    # Called again, the benchmarks find every number there and measure nothing.
    monkeypatch.setattr(timing, "measure", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(sys, "argv", ["timing", "--rehearse", str(results)])
    assert timing.main() == 0


@pytest.mark.slow
def test_a_check_that_aborts_or_hangs_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("passes", "aborts", "raises", "hangs")
    found = {name: getattr(gpu_checks, name) for name in names} | {"passes too": gpu_checks.passes}
    monkeypatch.setattr(checks, "REHEARSAL", found)
    monkeypatch.setattr(checks, "SECONDS_EACH", 20.0)
    monkeypatch.setattr(sys, "argv", ["checks", "--rehearse", str(tmp_path)])
    assert checks.main() == 1
    ((label, outcomes),) = _read(tmp_path, "gpu")["checks"].items()
    assert outcomes.pop("passes") == outcomes.pop("passes too") == "passed"
    assert outcomes.pop("aborts") == "the process died with exit status -6"
    assert outcomes.pop("raises") == "AssertionError: wrong on cpu"
    assert outcomes.pop("hangs").startswith(HUNG)
    assert not outcomes

    # What aborted may have been the machine's fault, but what hung is not tried again.
    monkeypatch.setattr(checks, "REHEARSAL", {"hangs": gpu_checks.hangs, "aborts": gpu_checks.passes})
    assert checks.main() == 1
    assert _read(tmp_path, "gpu")["checks"][label]["aborts"] == "passed"

    # The newer assembler is given to those that failed, and to no other.
    monkeypatch.setattr(checks, "REHEARSAL", dict.fromkeys(found, gpu_checks.passes) | {"passes": gpu_checks.aborts})
    monkeypatch.setattr(sys, "argv", ["checks", "--ptxas", "--rehearse", str(tmp_path)])
    monkeypatch.setenv("TRITON_PTXAS_PATH", "")
    assert checks.main() == 0
    assert os.environ["TRITON_PTXAS_PATH"].endswith("ptxas-blackwell")
    assert _read(tmp_path, "gpu")["newer_ptxas"][label] == {"raises": "passed", "hangs": "passed"}


def test_a_check_whose_call_was_ended_twice_is_not_tried_a_third_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def is_ended(given: dict, *_: object, started, **__: object) -> None:
        for name in given:
            tried.append(name)
            started(name)
        raise KeyboardInterrupt

    monkeypatch.setattr(checks, "run_checks", is_ended)
    for _ in range(checks.STARTS):
        with pytest.raises(KeyboardInterrupt):
            checks.run_kept({"one": gpu_checks.passes}, "checks", Device(tmp_path), float("inf"))
    assert checks.run_kept({"one": gpu_checks.passes}, "checks", Device(tmp_path), float("inf")) == {"one": HUNG}
    assert tried == ["one", "one"]


def test_a_check_that_cannot_start_a_process_is_an_outcome_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atman_kernels.processes._serve", _dies)
    outcomes: dict[str, str] = {}
    two = {"one": gpu_checks.passes, "two": gpu_checks.passes}
    run_checks(two, "cpu", workers=2, seconds_each=60.0, ended=outcomes.__setitem__)
    assert outcomes == dict.fromkeys(two, "the process died with exit status 3")


def _dies(*_: object) -> None:
    sys.exit(3)


def test_all_stages_together_end_within_ten_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def takes_all_its_time(stage: gpu.Stage, seconds: float, device: Device) -> tuple[str, str]:
        nonlocal now
        now += seconds
        return f"cut off after {seconds:.0f} s", ""

    monkeypatch.setattr(gpu, "run_stage", takes_all_its_time)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now)
    monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse", str(tmp_path)])
    assert gpu.main() == 1
    assert 0 < now <= gpu.SECONDS < 600


def test_a_stage_that_hangs_is_ended_and_its_report_kept(tmp_path: Path) -> None:
    code = "import time; print('so far', flush=True); time.sleep(60)"
    stage = gpu.Stage("hangs", (sys.executable, "-c", code), 1.0, timed=False, report=True)
    assert gpu.run_stage(stage, 3.0, Device(tmp_path)) == ("cut off after 3 s", "so far\n")


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
    first, second, *_ = timing.FIRST
    assert calls[: timing.STARTS + 1] == [first, first, second]
    unavailable = [row for row in _read(tmp_path, "attention")["results"] if "unavailable" in row]
    assert [(row["peer"], row["unavailable"]) for row in unavailable] == [(first, "did not return")]


def test_a_stage_that_ends_in_an_error_is_called_again_while_time_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = iter(["passed", "exit status 1", "passed"])
    two = [gpu.Stage("smoke test", (), 0.5), gpu.Stage("checks", (), 0.5, restarts=2)]
    monkeypatch.setattr(gpu, "stages", lambda device: two)
    monkeypatch.setattr(gpu, "run_stage", lambda stage, seconds, device: (next(outcomes), ""))
    monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse", str(tmp_path)])
    assert gpu.main() == 0


def test_results_of_other_kernels_or_block_sizes_have_another_name(tmp_path: Path) -> None:
    table = json.loads(BLOCK_SIZES_FILE.read_text())
    (tmp_path / "same.json").write_text(json.dumps(table, indent=1))
    table["sm_90"]["forward"]["2"]["128"] = [64, 64, 4, 2]
    (tmp_path / "other.json").write_text(json.dumps(table))
    committed = kernels_label(BLOCK_SIZES_FILE)
    assert kernels_label(tmp_path / "same.json") == committed
    assert kernels_label(tmp_path / "other.json") != committed
    paths = {
        device.results_file("checks", {"device": "a b", "commit": "c", "kernels": label}, tmp_path)
        for label in (committed, kernels_label(tmp_path / "other.json"))
    }
    assert len(paths) == 2


def test_what_one_wants_to_know_first_is_timed_first_and_flex_last() -> None:
    order = timing.in_order(attention_cases())
    assert len(order) == len(set(order)) == 2 * len(PEERS) * len(attention_cases())
    first = order[: 2 * len(timing.FIRST) * len(TARGET_CASES)]
    assert {each.case.key for each in first} == set(TARGET_CASES)
    assert [each.peer for each in first[: len(timing.FIRST)]] == list(timing.FIRST)
    assert [each.peer for each in order if each.peer in timing.LAST] == [
        each.peer for each in order[-2 * len(attention_cases()) :]
    ]


def test_the_workload_of_a_mask_optimisation_is_timed_and_tuned_for() -> None:
    (case,) = (case for case in attention_cases() if case.key == "masks+150 24/8 d128")
    assert len(case.lengths) == 64
    assert min(case.lengths) >= 158
    assert max(case.lengths) <= 258
    assert case in tune.workloads(128, Device()).values()


def test_tuning_goes_outward_from_the_committed_shapes_for_all_kernels_alike() -> None:
    table = json.loads(BLOCK_SIZES_FILE.read_text())["sm_90"]
    steps = tune.steps_outward(table, tune.HEAD_DIMS, list(tune.candidates()))
    assert len(set(steps)) == len(steps)
    for head_dim in tune.HEAD_DIMS:
        own = [step for step in steps if step.head_dim == head_dim]
        committed = {name: tuple(table[name]["2"][str(head_dim)]) for name in tune.KERNELS}
        assert {step.search: step.shape for step in own[: len(tune.KERNELS)]} == committed
        distances = [tune.distance(step.shape, committed[step.search]) for step in own]
        assert distances == sorted(distances)


def test_the_fastest_shape_is_that_of_both_workloads_together() -> None:
    timings = {
        "(64, 64, 4, 2)": {"packed": 2.0, "masks": 2.0},
        "(32, 64, 4, 2)": {"packed": 1.0, "masks": 5.0},
        "(32, 32, 4, 2)": {"packed": 0.1, "masks": "did not return"},
        "(64, 32, 4, 2)": {},
    }
    assert tune.fastest(timings) == (64, 64, 4, 2)
    assert tune.fastest({}) is None


def test_an_arm_of_the_mask_benchmark_that_fails_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = pytest.importorskip("benchmarks.masks")

    def measure(model, problem, arms, *, steps):
        yield masks.Measurement("fast", 1.0)
        raise RuntimeError("captured what cannot be captured")

    monkeypatch.setattr(masks, "measure", measure)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=7))
    monkeypatch.setattr(masks, "random_model", lambda *_, **__: model)
    monkeypatch.setattr(masks, "random_problem", lambda *_, **__: [])
    monkeypatch.setattr(masks, "necessary_per_step", lambda *_: 1)
    monkeypatch.setattr(masks, "matrix_rate", lambda *_: 1.0)
    row = masks.compare("llama-30m", "fast-captured", steps=1, device=torch.device("cpu"))
    assert row["arms"]["fast"] == asdict(masks.Measurement("fast", 1.0))
    assert row["arms"]["fast-captured"]["skipped"] == "RuntimeError: captured what cannot be captured"
