"""Checks in processes that may crash or hang: each costs its own outcome, and the others go on."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait

PASSED = "passed"
# How the outcome of a check begins that was ended because it took too long.
HUNG = "did not return"
# A new process may import for so long before it takes its first check.
_SECONDS_TO_START = 120.0

Check = Callable[[str], object]


def run_checks(
    checks: Mapping[str, Check],
    device: str,
    *,
    workers: int,
    seconds_each: float,
    deadline: float = float("inf"),
    started: Callable[[str], object] = lambda name: None,
    ended: Callable[[str, str], object],
    alone: bool = False,
) -> None:
    """Call every check with ``device`` in parallel processes, which hides the compilation of their kernels.

    A process that dies or hangs ends one check, "the process died" or "did not return", and another process goes on
    with the rest. A check that raises ends its process too: after an illegal access on a GPU nothing works in it.

    Args:
        checks: functions of a device, at the top level of a module (or partials of such), by name.
        device: "cuda" or "cpu".
        workers: processes at a time.
        seconds_each: a check that takes longer is ended.
        deadline: of ``time.monotonic``; checks that run then are ended without an outcome.
        started: called with a check's name before it runs.
        ended: called with its name and outcome: "passed", or the first line of what went wrong.
        alone: every check has a process of its own.
    """
    waiting = list(checks)
    pool = [_Worker(device) for _ in range(min(workers, len(waiting)))]
    try:
        while pool and time.monotonic() < deadline:
            wait([worker.connection for worker in pool], timeout=0.2)
            for worker in list(pool):
                found = worker.poll(seconds_each)
                if found is None:
                    continue
                if worker.name is None and found != PASSED and waiting:
                    # It could not even start, which is nobody's fault: the next check stands for all.
                    worker.name = waiting.pop(0)
                if worker.name is not None:
                    ended(worker.name, found)
                if found != PASSED or (alone and worker.name is not None):
                    worker.end()
                    pool.remove(worker)
                    if waiting:
                        pool.append(_Worker(device))
                elif waiting:
                    name = waiting.pop(0)
                    started(name)
                    worker.begin(name, checks[name])
                else:
                    worker.end()
                    pool.remove(worker)
    finally:
        for worker in pool:
            worker.end()


class _Worker:
    """A process that runs one check at a time; ``name`` of the one it runs, None while it starts."""

    def __init__(self, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, device))
        self.process.start()
        # The end of the process is then the end of the connection.
        other.close()
        self.name: str | None = None
        self.since = time.monotonic()

    def begin(self, name: str, check: Check) -> None:
        self.name, self.since = name, time.monotonic()
        try:
            self.connection.send(check)
        except OSError:
            # It has died meanwhile; the next poll says so.
            return

    def poll(self, seconds: float) -> str | None:
        """The outcome of the check, or of starting; None while there is none."""
        if self.connection.poll():
            try:
                return str(self.connection.recv())
            except (EOFError, OSError):
                self.process.join(5.0)
                return f"the process died with exit status {self.process.exitcode}"
        limit = seconds if self.name is not None else max(seconds, _SECONDS_TO_START)
        if time.monotonic() - self.since > limit:
            return f"{HUNG} within {limit:.0f} s"
        return None

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, device: str) -> None:
    connection.send(PASSED)
    while True:
        try:
            check = connection.recv()
        except EOFError:
            return
        connection.send(_outcome(check, device))


def _outcome(check: Check, device: str) -> str:
    try:
        check(device)
        if device == "cuda":
            import torch

            # Raises what the device could not do.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception as error:
        traceback.print_exc()
        lines = f"{type(error).__name__}: {error}".splitlines()
        return lines[0][:300]
    return PASSED
