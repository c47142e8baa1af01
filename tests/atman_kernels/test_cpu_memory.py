"""The C++ kernel's memory: nothing of order rows x keys, and a clear error where there is none."""

from __future__ import annotations

import subprocess
import sys

import pytest

from atman_kernels import _cpu
from benchmarks.cpu import peak_memory_ratio

pytestmark = pytest.mark.skipif(not _cpu.isas(), reason="the C++ extension is not built")

# One query row against so many keys that its packed tiles need over 80 MB, with 32 MB left to the process.
_TOO_LITTLE = """
import resource, torch
from pathlib import Path
from atman_kernels import attention, backend

torch.set_num_threads(1)
q, k = torch.randn(1, 1, 1, 256), torch.randn(1, 40_000, 1, 256)
with backend("cpu"):
    attention(q, k[:, :9], k[:, :9])
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 32 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        attention(q, k, k)
    except MemoryError as error:
        print(error)
    print(attention(q, k[:, :9], k[:, :9]).shape)
"""


@pytest.mark.slow
def test_peak_memory_of_forward_and_backward_is_near_that_of_the_tensors() -> None:
    # The scores of one call, 8 x 8192 x 8192 in fp32, would be 16 times the tensors.
    assert peak_memory_ratio(8192, head_dim=64, threads=2) < 1.3


def test_lack_of_memory_is_an_error_that_says_how_much_was_needed_and_the_next_call_works() -> None:
    done = subprocess.run([sys.executable, "-c", _TOO_LITTLE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    message, shape = done.stdout.splitlines()
    words = message.split()
    assert message == f"attention needs {words[2]} bytes of scratch memory, which could not be had"
    assert int(words[2]) >= 2 * 40_000 * 256 * 4
    assert shape == "torch.Size([1, 1, 1, 256])"
