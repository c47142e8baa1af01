"""Everything that needs a GPU, in one command: smoke test, checks, timings, tuning, profiles, tables.

    python -m benchmarks.gpu [--seconds 570] [--results DIR]
    python -m benchmarks.gpu --rehearse DIR          every step on a CPU, with tiny shapes in Triton's interpreter

Runs from a source tree with torch and triton installed, without network, test framework or compiled extension. The
results are at most eight files in one folder, which may lie outside the tree. Each stage keeps its results as it goes,
and a later call goes on where the last one stopped: half an hour is three calls. ATMAN_COMMIT=... states the commit
where the tree has no history.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from atman_kernels._triton.launch import BLOCK_SIZES_FILE, BLOCK_SIZES_VARIABLE
from benchmarks.device import ROOT, Device, device_of_command, kept_results, save

SECONDS = 570.0
# What a stage that watches its own time needs to end in order.
MARGIN = 15.0
# Characters of a tool's report that are kept.
REPORT = 20000
PROFILED = ("forward_kernel", "backward_queries_kernel", "backward_keys_kernel")
_SECTIONS = ("SpeedOfLight", "Occupancy", "WarpStateStats", "LaunchStats")


class Stage(NamedTuple):
    """A command, the share of the whole time it may take, and what it needs installed.

    Attributes:
        timed: it takes --seconds and --results, and may have more to do when it has returned.
        keeps: it takes --results only.
        restarts: how often it is called again if it ends in an error, which a kernel that broke the process leaves.
        environment: variables beyond those of this process.
        report: what it prints is kept.
        least: seconds without which it is not begun.
    """

    name: str
    command: tuple[str, ...]
    share: float
    timed: bool = True
    keeps: bool = False
    restarts: int = 0
    needs: tuple[str, ...] = ("torch",)
    environment: Mapping[str, str] = {}
    report: bool = False
    least: float = MARGIN


def _python(statement: str, device: Device) -> tuple[str, ...]:
    """Runs a function of gpu_checks with the device's dtype and name."""
    code = f"from tests.atman_kernels.gpu_checks import *; {statement}({device.dtype}, {device.name!r})"
    return sys.executable, "-c", f"import torch; {code}"


def _tools(device: Device) -> list[Stage]:
    """NVIDIA's profiler and sanitizer, or in a rehearsal without them what they would look at."""
    small, profiled = _python("small_ragged_step", device), _python("profiled_step", device)
    found = []
    ncu = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin:/opt/nvidia/nsight-compute")
    names = "regex:^(" + "|".join(PROFILED) + ")$"
    profile = ("--target-processes", "all", "--kernel-name", names, "--launch-count", str(len(PROFILED)))
    profile += (*(part for section in _SECTIONS for part in ("--section", section)), "--csv", "--page", "details")
    if ncu:
        profiled = (ncu, *profile, *profiled)
    if ncu or device.rehearsal is not None:
        found.append(Stage("profile of three kernels", profiled, 0.12, timed=False, report=True))
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer:
        small = (sanitizer, "--error-exitcode", "1", *small)
    if sanitizer or device.rehearsal is not None:
        # Cached memory hides an access beyond a tensor that stays within the allocator's block.
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        found.append(Stage("sanitizer", small, 0.12, timed=False, report=True, environment=uncached))
    return found


def stages(device: Device) -> list[Stage]:
    """The stages in order: what cannot be known without a GPU first, slow tools and whole training steps last."""
    module = (sys.executable, "-m")
    checks, timing = (*module, "benchmarks.checks"), (*module, "benchmarks.timing")
    check = ("--check",) if device.rehearsal is not None else ()
    found = [
        Stage("smoke test", (*checks, "--smoke"), 0.1, least=1.0),
        Stage("checks", checks, 0.25),
        Stage("failed checks with the newer assembler", (*checks, "--ptxas"), 0.1),
        Stage("benchmarks of the committed block sizes", timing, 0.25, restarts=2),
        Stage("tuning", (*module, "benchmarks.tune"), 0.25, restarts=2),
        Stage("checks of the tuned block sizes", checks, 0.2),
        Stage("benchmarks of the tuned block sizes", timing, 0.25, restarts=2),
        Stage(
            "tables",
            (*module, "benchmarks.tables", "--pages", "benchmarks.md", *check),
            0.05,
            timed=False,
            keeps=True,
        ),
        *_tools(device),
    ]
    if device.rehearsal is not None:
        return found
    # Starts no arm after so many seconds; one cut off goes on in the next call.
    masks = (*module, "benchmarks.masks", "--seconds", "60")
    needs = ("transformers", "einops")
    found.append(Stage("mask steps", masks, 0.2, timed=False, keeps=True, restarts=2, needs=needs))
    update = (*module, "benchmarks.update")
    trained = ("trl", "datasets", "einops")
    found.append(Stage("update", update, 0.4, timed=False, keeps=True, needs=trained))
    lora = (*update, "--lora", "16")
    found.append(Stage("update, LoRA", lora, 0.3, timed=False, keeps=True, needs=(*trained, "peft")))
    return found


def run_stage(stage: Stage, seconds: float, device: Device) -> tuple[str, str]:
    """Run one stage for at most ``seconds``: "passed" or how it ended, and what of its report is kept."""
    command = list(stage.command)
    if stage.timed or stage.keeps:
        command += ["--results", str(device.results)]
    if stage.timed:
        command += ["--seconds", str(max(seconds - MARGIN, 1.0))]
        if device.rehearsal is not None:
            command += ["--rehearse", str(device.rehearsal)]
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **stage.environment, "PYTHONPATH": os.pathsep.join(path)}
    environment.pop("TRITON_INTERPRET", None)
    if device.rehearsal is not None:
        environment["TRITON_INTERPRET"] = "1"
    if not stage.timed and (tuned := device.tuned_block_sizes()).exists():
        environment[BLOCK_SIZES_VARIABLE] = str(tuned.resolve())
    with tempfile.TemporaryFile("w+") as report:
        output = report if stage.report else None
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True, stdout=output, stderr=output
        ) as process:
            try:
                code = process.wait(seconds)
                outcome = "passed" if code == 0 else f"exit status {code}"
            except subprocess.TimeoutExpired:
                # With the processes it started, which would keep the GPU busy.
                os.killpg(process.pid, signal.SIGKILL)
                outcome = f"cut off after {seconds:.0f} s"
        report.seek(0)
        return outcome, report.read()[-REPORT:]


def main() -> int:
    device, deadline, _ = device_of_command("benchmarks.gpu", __doc__, SECONDS)
    # The stages are told of the tuned block sizes as they come.
    os.environ.pop(BLOCK_SIZES_VARIABLE, None)
    device = Device(device.rehearsal and device.rehearsal.resolve(), device.directory.resolve())
    in_all = deadline - time.monotonic()
    path, _ = kept_results("gpu", device, BLOCK_SIZES_FILE)

    def note(kind: str, name: str, value: str) -> dict[str, Any]:
        # Stages keep their results in this file too.
        _, content = kept_results("gpu", device, BLOCK_SIZES_FILE)
        content.setdefault(kind, {})[name] = value
        save(path, content)
        return dict(content)

    for stage in stages(device):
        if missing := [name for name in stage.needs if importlib.util.find_spec(name) is None]:
            note("stages", stage.name, f"left out: {', '.join(missing)} not installed")
            continue
        before = kept_results("gpu", device, BLOCK_SIZES_FILE)[1].get("stages", {}).get(stage.name)
        # What may have more to do is called again: it returns at once where it has not.
        if before == "passed" and not stage.timed and stage.name != "tables":
            continue
        seconds = min(stage.share * in_all, deadline - time.monotonic())
        if seconds <= min(stage.least, MARGIN):
            print("stopped in time; run again to go on")
            break
        print(f"== {stage.name}, at most {seconds:.0f} s", flush=True)
        end = time.monotonic() + seconds
        for _ in range(1 + stage.restarts):
            outcome, report = run_stage(stage, end - time.monotonic(), device)
            note("stages", stage.name, outcome)
            if stage.report:
                print(report, flush=True)
                note("reports", stage.name, report)
            if not outcome.startswith("exit") or end - time.monotonic() <= MARGIN:
                break
    outcomes = kept_results("gpu", device, BLOCK_SIZES_FILE)[1].get("stages", {})
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome}")
    print(f"results are in {device.results}")
    if (tuned := device.tuned_block_sizes()).exists():
        print(f"to keep the tuned block sizes: cp {tuned} {BLOCK_SIZES_FILE.relative_to(ROOT)}")
    return 0 if all(outcomes.get(name) == "passed" for name in ("smoke test", "checks")) else 1


if __name__ == "__main__":
    sys.exit(main())
