"""Two processes on this machine, none of which is left behind."""

from __future__ import annotations

import subprocess
import sys

import pytest

TWO = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    # By default they look for one another under the machine's name, which nobody need be able to resolve.
    *("--local-addr", "127.0.0.1"),
]
SECONDS = 240


def error_of(process: subprocess.Popen[str]) -> str:
    """What a started process, its stderr piped, writes to it until its end, which is awaited."""
    try:
        # Read while it runs: a pipe that nobody reads stops the one who writes.
        return process.communicate(timeout=SECONDS)[1]
    except subprocess.TimeoutExpired:
        # Killed, a launcher would leave its processes behind.
        process.terminate()
        pytest.fail(f"did not end within {SECONDS} s\n{process.communicate()[1][-8000:]}", pytrace=False)


def run_to_its_end(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Status and stderr of a command."""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        error = error_of(process)
    return subprocess.CompletedProcess(command, process.returncode, stderr=error)
