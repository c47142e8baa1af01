"""Everything that needs a GPU, in one command within ten minutes: checks, tuning, benchmarks, tables.

    python -m benchmarks.gpu [--seconds 570]
    python -m benchmarks.gpu --rehearse DIR          every step on a CPU, with tiny shapes in Triton's interpreter

Runs from a source tree with torch and triton installed, without network, test framework or compiled extension. Each
stage keeps its results as it goes, and a later call goes on where the last one stopped.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.device import Device, device_of_command, kept_results, save

ROOT = Path(__file__).parent.parent
SECONDS = 570.0
# What a stage that watches its own time needs to end in order.
MARGIN = 15.0


class Stage(NamedTuple):
    """A command, the share of the whole time it may take, and what it needs installed.

    ``timed``: it takes --seconds, and may have more to do when it has returned. ``restarts``: how often it is called
    again if it ends in an error, which a kernel that broke the process leaves behind.
    """

    name: str
    command: tuple[str, ...]
    share: float
    timed: bool = True
    restarts: int = 0
    needs: tuple[str, ...] = ("torch",)


def stages(device: Device) -> list[Stage]:
    """The stages in order: what cannot be known without a GPU first, slow tools and whole training steps last."""
    module = (sys.executable, "-m")
    found = [
        Stage("checks", (*module, "benchmarks.checks"), 0.3),
        Stage("benchmarks of the committed block sizes", (*module, "benchmarks.timing"), 0.25, restarts=2),
        Stage("tuning", (*module, "benchmarks.tune"), 0.2, restarts=2),
        Stage("tables", (*module, "benchmarks.tables", "--pages", "benchmarks.md"), 0.05, timed=False),
    ]
    small = "import torch; from tests.atman_kernels.gpu_checks import small_ragged_step as step; step({}, {!r})"
    small = small.format(device.dtype, device.name)
    if device.rehearsal is not None:
        found[-1] = found[-1]._replace(command=(*found[-1].command, "--check"))
        found.append(Stage("sanitizer's case", (sys.executable, "-c", small), 0.1, timed=False))
        return found
    if sanitizer := shutil.which("compute-sanitizer"):
        command = (sanitizer, "--error-exitcode", "1", sys.executable, "-c", small)
        found.append(Stage("sanitizer", command, 0.1, timed=False))
    # Starts no arm after so many seconds; one cut off goes on in the next call.
    found.append(
        Stage(
            "mask steps",
            (*module, "benchmarks.masks", "--seconds", "60"),
            0.2,
            timed=False,
            needs=("transformers", "einops"),
        )
    )
    update = (*module, "benchmarks.update")
    trained = ("trl", "datasets", "einops")
    found.append(Stage("update", update, 0.4, timed=False, needs=trained))
    found.append(Stage("update, LoRA", (*update, "--lora", "16"), 0.3, timed=False, needs=(*trained, "peft")))
    return found


def run_stage(stage: Stage, seconds: float, device: Device) -> str:
    """Run one stage for at most ``seconds``: "passed" or how it ended."""
    command = list(stage.command)
    if stage.timed:
        command += ["--seconds", str(max(seconds - MARGIN, 1.0))]
        if device.rehearsal is not None:
            command += ["--rehearse", str(device.rehearsal)]
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    environment.pop("TRITON_INTERPRET", None)
    if device.rehearsal is not None:
        environment["TRITON_INTERPRET"] = "1"
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True) as process:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            # With the processes it started, which would keep the GPU busy.
            os.killpg(process.pid, signal.SIGKILL)
            return f"cut off after {seconds:.0f} s"
    return "passed" if code == 0 else f"exit status {code}"


def main() -> int:
    device, deadline = device_of_command("benchmarks.gpu", __doc__, SECONDS)
    in_all = deadline - time.monotonic()
    path, content = kept_results("stages", device, stages={})
    for stage in stages(device):
        if missing := [name for name in stage.needs if importlib.util.find_spec(name) is None]:
            content["stages"][stage.name] = f"left out: {', '.join(missing)} not installed"
            continue
        # What may have more to do is called again: it returns at once where it has not.
        if content["stages"].get(stage.name) == "passed" and not stage.timed and stage.name != "tables":
            continue
        seconds = min(stage.share * in_all, deadline - time.monotonic())
        if seconds <= MARGIN:
            print("stopped in time; run again to go on")
            break
        print(f"== {stage.name}, at most {seconds:.0f} s", flush=True)
        end = time.monotonic() + seconds
        for _ in range(1 + stage.restarts):
            content["stages"][stage.name] = run_stage(stage, end - time.monotonic(), device)
            save(path, content)
            if not content["stages"][stage.name].startswith("exit") or end - time.monotonic() <= MARGIN:
                break
    for name, outcome in content["stages"].items():
        print(f"{name}: {outcome}")
    print(f"results are in {device.results}")
    return 0 if content["stages"].get("checks") == "passed" else 1


if __name__ == "__main__":
    sys.exit(main())
