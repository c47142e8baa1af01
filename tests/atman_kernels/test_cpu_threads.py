"""The C++ kernel and threads: as many as PyTorch is told to use, its own ones, and Python goes on meanwhile."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch

from atman_kernels import _cpu, attention, backend
from tests.atman_kernels.test_cpu_binding import arguments

pytestmark = pytest.mark.skipif(not _cpu.isas(), reason="the C++ extension is not built")

# Threads of the process: at the start, after calls with one thread, after a parallel operation of PyTorch with three,
# and after calls with three.
_COUNTING = """
import os, torch
from atman_kernels import attention, backend

q = torch.randn(1, 600, 4, 16, requires_grad=True)
counts = []

def count():
    counts.append(len(os.listdir("/proc/self/task")))

def call():
    with backend("cpu"):
        o = attention(q, q, q)
    torch.autograd.grad(o.sum(), q)
    count()

torch.set_num_threads(1)
torch.autograd.grad(q.exp().sum(), q)
count()
call()
torch.set_num_threads(3)
torch.randn(1 << 20).exp()
count()
call()
print(*counts)
"""


def test_calls_use_the_threads_that_pytorch_has_and_no_others() -> None:
    done = subprocess.run([sys.executable, "-c", _COUNTING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    at_start, alone, pool, shared = map(int, done.stdout.split())
    assert alone == at_start
    assert pool == at_start + 2
    assert shared == pool


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_call_asks_for_the_number_of_threads_that_pytorch_is_set_to(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Recorder:
        def __getattr__(self, name: str) -> object:
            kernel = getattr(_C, name)

            def call(*arguments: object, **named: object) -> object:
                asked.append(arguments[-2])
                return kernel(*arguments, **named)

            return call

    _C = _cpu._C
    monkeypatch.setattr(_cpu, "_C", Recorder())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        q = torch.randn(1, 9, 1, 8, requires_grad=True)
        with backend("cpu"):
            torch.autograd.grad(attention(q, q, q).sum(), q)
    finally:
        torch.set_num_threads(before)
    assert asked == [threads, threads]


def test_other_python_threads_run_during_a_call() -> None:
    """The interpreter is told not to change threads by itself: who sees the call from outside was let in by it."""
    x = arguments([(1000, 1000)], heads=(2, 2), head_dim=64)
    computing = seen = False

    def compute() -> None:
        nonlocal computing
        calls = 0
        # One look is enough, and on a busy machine it need not come in the first call.
        while not seen and calls < 1000:
            calls += 1
            computing = True
            _cpu._C.attention_forward(**x)
            computing = False

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e6)
    try:
        worker = threading.Thread(target=compute)
        worker.start()
        while worker.is_alive() and not seen:
            seen = computing
            time.sleep(1e-4)
        worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert seen
