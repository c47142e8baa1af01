"""The GPU's correctness checks without a test framework, on all cores and resumable.

    python -m benchmarks.checks --seconds 200

Runs the checks of ``tests/atman_kernels/gpu_checks.py`` in parallel processes, which hides the compilation of their
kernels, and keeps each outcome in results/ as it comes; a later call runs those that have not passed.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from benchmarks.device import Device, device_of_command, kept_results, save, tuned
from tests.atman_kernels.gpu_checks import CHECKS, REHEARSAL

PASSED = "passed"
TASKS_PER_PROCESS = 8


def outcome(name: str, device: Device) -> str:
    """Run one check: "passed", or the last line of what went wrong."""
    checks = CHECKS if device.rehearsal is None else REHEARSAL
    try:
        checks[name](device.name)
        device.release()
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return PASSED


def run_all(names: list[str], device: Device, deadline: float, path: Path, content: dict[str, Any]) -> None:
    """Run the named checks until the deadline, keeping every outcome; what did not end is left out."""
    # Each holds a context on the GPU.
    workers = min(16, max(1, (os.cpu_count() or 1) - 1)) if device.rehearsal is None else 1
    # A process that met an illegal access can do nothing more, so none lives long. The pool's own max_tasks_per_child
    # hangs where tasks wait (python/cpython#115634).
    size = TASKS_PER_PROCESS * workers
    for batch in [names[first : first + size] for first in range(0, len(names), size)]:
        if time.monotonic() < deadline:
            _run_in_new_processes(batch, workers, device, deadline, path, content)


def _run_in_new_processes(
    names: list[str], workers: int, device: Device, deadline: float, path: Path, content: dict[str, Any]
) -> None:
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    running: dict[Future[str], str] = {pool.submit(outcome, name, device): name for name in names}
    while running and time.monotonic() < deadline:
        ended, _ = wait(running, timeout=1.0, return_when="FIRST_COMPLETED")
        for future in ended:
            name = running.pop(future)
            try:
                content["checks"][name] = future.result()
            except BrokenProcessPool as error:
                content["checks"][name] = f"the process died: {error}"
            print(f"{name}: {content['checks'][name]}", flush=True)
        if ended:
            save(path, content)
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=not running, cancel_futures=True)
    if running:
        for process in processes:
            process.terminate()


def main() -> int:
    device, deadline = device_of_command("benchmarks.checks", __doc__)
    path, content = kept_results(f"checks{tuned()}", device, checks={})
    names = list(CHECKS if device.rehearsal is None else REHEARSAL)
    # Twice: what fails behind a check that broke its process may pass in another one.
    for _ in range(2):
        missing = [name for name in names if content["checks"].get(name) != PASSED]
        if missing and time.monotonic() < deadline:
            run_all(missing, device, deadline, path, content)
    passed = sum(content["checks"].get(name) == PASSED for name in names)
    failed = [name for name in names if content["checks"].get(name, PASSED) != PASSED]
    print(f"{passed} of {len(names)} checks passed, {len(failed)} failed; outcomes are in {path}")
    return 0 if passed == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
