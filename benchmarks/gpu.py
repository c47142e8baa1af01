"""Everything that needs a GPU, in one command within ten minutes: tests, tuning, benchmarks, tables.

    python -m benchmarks.gpu [--seconds 600]

Runs from a source tree with torch and triton installed, without network and without the compiled extension. Each stage
keeps its results as it goes, and a later call goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.timing import RESULTS, provenance, results_file, save

ROOT = Path(__file__).parent.parent


class Stage(NamedTuple):
    """A command, the share of the whole time it may take, and what it needs installed."""

    name: str
    command: tuple[str, ...]
    share: float
    needs: str = "torch"


def stages() -> list[Stage]:
    """The stages in order; seconds are appended to those that stop by themselves."""
    tests = ("-m", "pytest", "-q", "-m", "gpu or not slow", "-p", "no:cacheprovider")
    files = [str(path) for pattern in ("test_triton*.py", "test_attention_all_backends.py", "test_gpu*.py")
             for path in sorted((ROOT / "tests" / "atman_kernels").glob(pattern))]  # fmt: skip
    found = [Stage("tests", (sys.executable, *tests, *files), 0.35, needs="pytest")]
    if sanitizer := shutil.which("compute-sanitizer"):
        small = ("-c", "from benchmarks.gpu import smallest_case; smallest_case()")
        found.append(Stage("sanitizer", (sanitizer, "--error-exitcode", "1", sys.executable, *small), 0.1))
    found.append(Stage("tuning", (sys.executable, "-m", "benchmarks.tune", "--seconds"), 0.2))
    update = (sys.executable, "-m", "benchmarks.update")
    found.append(Stage("update", update, 0.4, needs="trl"))
    found.append(Stage("update, LoRA", (*update, "--lora", "16"), 0.3, needs="trl"))
    found.append(Stage("benchmarks", (sys.executable, "-m", "benchmarks.timing", "--seconds"), 0.4))
    found.append(Stage("tables", (sys.executable, "-m", "benchmarks.tables"), 0.05))
    return found


def smallest_case() -> None:
    """Forward and backward over ragged sequences with a prefix, for tools that slow a kernel down a thousandfold."""
    from benchmarks.cases import AttentionCase, make_inputs
    from benchmarks.peers import PEERS

    case = AttentionCase("small", (70, 1, 33), heads=(2, 1), head_dim=64, prefix=9)
    x = make_inputs(case, torch.bfloat16, "cuda")
    torch.autograd.grad(PEERS["atman"](case, x)(), x.differentiable, x.do)
    torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=570, help="time for all stages together")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA GPU; what it measures stays not yet measured", file=sys.stderr)
        return 1
    deadline = time.monotonic() + arguments.seconds
    facts = provenance()
    path = results_file("stages", facts)
    content = json.loads(path.read_text()) if path.exists() else {**facts, "stages": {}}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    for stage in stages():
        if importlib.util.find_spec(stage.needs) is None:
            content["stages"][stage.name] = f"left out: {stage.needs} is not installed"
            continue
        if content["stages"].get(stage.name) == "passed":
            continue
        seconds = min(stage.share * arguments.seconds, deadline - time.monotonic())
        if seconds <= 5:
            print("stopped in time; run again to go on")
            break
        timed = stage.command[-1] == "--seconds"
        command = (*stage.command, str(0.9 * seconds)) if timed else stage.command
        print(f"== {stage.name}, at most {seconds:.0f} s", flush=True)
        try:
            code = subprocess.run(command, cwd=ROOT, env=environment, timeout=max(seconds, 30)).returncode
            # Stages that stop by themselves may have more to do; the others are done once they pass.
            content["stages"][stage.name] = "passed" if code == 0 and not timed else f"exit status {code}"
        except subprocess.TimeoutExpired:
            content["stages"][stage.name] = f"cut off after {seconds:.0f} s"
        save(path, content)
    for name, outcome in content["stages"].items():
        print(f"{name}: {outcome}")
    print(f"results are in {RESULTS}")
    return 0 if content["stages"].get("tests") == "passed" else 1


if __name__ == "__main__":
    sys.exit(main())
