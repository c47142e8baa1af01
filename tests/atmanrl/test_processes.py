"""How processes part at the end of a run, with a group of one in this process."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from atmanrl.training.run import part_from_others


def gloo_threads() -> int:
    names = []
    for task in Path("/proc/self/task").iterdir():
        # One may end between the listing and the reading.
        with suppress(OSError):
            names.append(task.joinpath("comm").read_text().strip())
    return sum(name in ("pt_gloo_runloop", "gloo_tcp_loop") for name in names)


def test_gloos_threads_end_with_a_trainer_that_refers_to_itself(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    trainer = nn.Module()
    trainer.wrapped = DistributedDataParallel(nn.Linear(4, 4))
    trainer.callbacks = [trainer]
    trainer.wrapped(torch.ones(1, 4)).sum().backward()
    assert gloo_threads() > 0
    del trainer
    part_from_others()
    # A thread that has been joined leaves /proc a moment later.
    deadline = time.monotonic() + 10
    while gloo_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gloo_threads() == 0
    assert not dist.is_initialized()


def test_one_process_parts_from_nobody() -> None:
    assert not dist.is_initialized()
    part_from_others()
    assert not dist.is_initialized()
