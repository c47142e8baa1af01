"""The GPU's correctness checks without a test framework, on all cores and resumable.

    python -m benchmarks.checks --seconds 200       those of tests/atman_kernels/gpu_checks.py
    python -m benchmarks.checks --smoke             half a minute: every kernel once, at the sizes that matter
    python -m benchmarks.checks --ptxas             those that failed, with the newer assembler in Triton's wheel

Each outcome is kept as it comes; a later call runs those that have not passed. A check that crashes its process or
hangs costs itself alone, and one that hung is not tried again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import triton

from atman_kernels._triton.launch import BLOCK_SIZES_FILE, block_sizes_in_use, kernels_label
from atman_kernels.processes import HUNG, PASSED, Check, run_checks
from atman_kernels.smoke import smoke_checks
from benchmarks.device import Device, device_of_command, kept_results, save
from tests.atman_kernels.gpu_checks import CHECKS, REHEARSAL

SECONDS_EACH = 150.0
STARTS = 2
# An assembler that Triton takes for newer GPUs than Hopper only; TRITON_PTXAS_PATH makes it the one for all.
NEWER_PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas-blackwell"


def run_kept(checks: Mapping[str, Check], section: str, device: Device, deadline: float) -> dict[str, str]:
    """Run the checks that have not passed, and keep each outcome in this section of the run's file; all outcomes."""
    path, content = kept_results("gpu", device, BLOCK_SIZES_FILE)
    label = kernels_label(block_sizes_in_use())
    outcomes = content.setdefault(section, {}).setdefault(label, {})
    starts = content.setdefault("started", {}).setdefault(f"{section} {label}", {})

    def started(name: str) -> None:
        starts[name] = starts.get(name, 0) + 1
        save(path, content)

    def ended(name: str, outcome: str) -> None:
        outcomes[name] = outcome
        starts.pop(name, None)
        save(path, content)
        print(f"{name}: {outcome}", flush=True)

    for name in checks:
        # Twice it did not come to an end before its call was ended.
        if starts.get(name, 0) >= STARTS:
            ended(name, HUNG)
    workers = min(16, max(1, (os.cpu_count() or 1) - 1)) if device.rehearsal is None else 1
    # The second time each has a process of its own, and less of the device is taken by others.
    for at_a_time, alone in ((workers, False), (max(1, workers // 4), True)):
        missing = {
            name: check
            for name, check in checks.items()
            if outcomes.get(name) != PASSED and not outcomes.get(name, "").startswith(HUNG)
        }
        if missing and time.monotonic() < deadline:
            run_checks(
                missing, device.name, workers=at_a_time, seconds_each=SECONDS_EACH, deadline=deadline,
                started=started, ended=ended, alone=alone,
            )  # fmt: skip
    return {name: outcomes[name] for name in checks if name in outcomes}


def with_newer_ptxas(checks: Mapping[str, Check], device: Device, deadline: float) -> int:
    """Run the checks that failed with the newer assembler; 1 if none of them passes with it."""
    _, content = kept_results("gpu", device, BLOCK_SIZES_FILE)
    label = kernels_label(block_sizes_in_use())
    kept = [content.get(section, {}).get(label, {}) for section in ("smoke", "checks")]
    failed = [name for outcomes in kept for name, outcome in outcomes.items() if outcome != PASSED]
    if not failed:
        print("no check has failed")
        return 0
    if not NEWER_PTXAS.exists():
        print(f"there is no {NEWER_PTXAS}")
        return 1
    os.environ["TRITON_PTXAS_PATH"] = str(NEWER_PTXAS)
    outcomes = run_kept({name: checks[name] for name in failed}, "newer_ptxas", device, deadline)
    passed = sum(outcome == PASSED for outcome in outcomes.values())
    print(f"{passed} of {len(failed)} failed checks pass with {NEWER_PTXAS.name}")
    return 0 if passed else 1


def main() -> int:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--smoke", action="store_true", help="only the smoke test")
        parser.add_argument("--ptxas", action="store_true", help="the failed checks, with the newer assembler")

    device, deadline, arguments = device_of_command("benchmarks.checks", __doc__, add=add)
    rehearsed = device.rehearsal is not None
    smoke = smoke_checks(device.name, (16,) if rehearsed else (128, 64))
    checks = REHEARSAL if rehearsed else CHECKS
    if arguments.ptxas:
        return with_newer_ptxas({**smoke, **checks}, device, deadline)
    chosen, section = (smoke, "smoke") if arguments.smoke else (checks, "checks")
    outcomes = run_kept(chosen, section, device, deadline)
    passed = sum(outcome == PASSED for outcome in outcomes.values())
    print(f"{passed} of {len(chosen)} checks passed, {len(outcomes) - passed} failed")
    return 0 if passed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
