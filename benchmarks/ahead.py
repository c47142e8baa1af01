"""Compiles our programs on other cores before their turn comes to be timed, into the cache that a launch reads."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from types import TracebackType
from typing import Literal, NamedTuple

import torch

from atman_kernels._triton.backward import backward_launches
from atman_kernels._triton.forward import forward_launches
from atman_kernels._triton.launch import Launch, block_size_table, device_family
from atman_kernels.problem import NO_WINDOW, AttentionProblem, Gradients
from benchmarks.cases import AttentionCase
from benchmarks.compiled import TARGETS, compile_launch, count
from benchmarks.device import Device

# The timer and the rest of its machine.
CORES_LEFT = 2

Shape = tuple[int, int, int, int]


class Program(NamedTuple):
    """The kernels of one direction of a case.

    Attributes:
        biased: with a key bias and its gradient.
        only: the kernel that is wanted; those behind it are left out. "": all.
        tried: (kernel of the block-size table, shape) in place of the table's shape.
    """

    case: AttentionCase
    direction: Literal["forward", "backward", "fused"]
    biased: bool = True
    only: str = ""
    tried: tuple[str, Shape] | None = None


def launches(program: Program, family: str, dtype: torch.dtype, torch_device: str) -> list[Launch]:
    """The launches of a program; with ``only``, those up to it, the forward's before the backward's."""
    case, head_dim = program.case, program.case.head_dim
    if program.tried is not None:
        kernel, shape = program.tried
        block_size_table()[family][kernel][str(dtype.itemsize)][str(head_dim)] = list(shape)
    n_rows, (heads_q, heads_kv) = sum(case.lengths), case.heads

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=torch_device).normal_()

    q, k, v, do = (normal(1, n_rows, heads, head_dim) for heads in (heads_q, heads_kv, heads_kv, heads_q))
    bias = normal(1, n_rows, dtype=torch.float32) if program.biased else None
    prefix = [normal(case.prefix, heads_kv, head_dim) if case.prefix else None for _ in range(2)]
    plan = case.plan(torch_device)
    o, lse = torch.empty_like(q), torch.empty(1, heads_q, n_rows, device=torch_device)
    tables = (plan.sequences, plan.tiles_q, plan.tiles_k)
    problem = AttentionProblem(q, k, v, bias, *prefix, *tables, case.sm_scale, True, NO_WINDOW)
    found = []
    if program.direction == "forward" or program.only:
        found += forward_launches(family, o, lse, problem)
    if program.direction != "forward":
        gradients = Gradients(*(None if t is None else torch.empty_like(t) for t in (q, k, v, bias)))
        fused = program.direction == "fused"
        found += backward_launches(family, gradients, do, None, o, lse, problem, fused=fused)
    names = [each.kernel.__name__ for each in found]
    return found[: names.index(program.only) + 1] if program.only else found


def compile_program(program: Program, family: str) -> bool:
    """Put the program's kernels into Triton's cache on disk; False if the last one does nothing but trap.

    Tensors are without storage. With ``only``, that kernel alone is compiled.
    """
    found = launches(program, family, torch.bfloat16, "meta")
    compiled = [compile_launch(each, family) for each in (found[-1:] if program.only else found)]
    return not program.only or count(compiled[-1]).matrix_instructions > 0


class Ahead:
    """Compiles programs in the given order, all but two cores at work, while the block runs.

    Nothing is compiled where the device's family is not exactly a compiler's target, or in a rehearsal.
    """

    def __init__(self, device: Device, programs: Sequence[Program]) -> None:
        self._compilations: dict[Program, Future[bool]] = {}
        self._pool: ProcessPoolExecutor | None = None
        if device.rehearsal is not None or not programs:
            return
        family = device_family(torch.device(device.name))
        if family in TARGETS and family == "sm_{}{}".format(*torch.cuda.get_device_capability()):
            workers = max(1, (os.cpu_count() or 1) - CORES_LEFT)
            self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
            for each in dict.fromkeys(programs):
                self._compilations[each] = self._pool.submit(compile_program, each, family)

    def wait(self, program: Program, deadline: float) -> bool:
        """Wait for a program: whether there is something to be timed."""
        if (compilation := self._compilations.get(program)) is None:
            return True
        try:
            return compilation.result(max(deadline - time.monotonic(), 0.0))
        except TimeoutError:
            return False
        except Exception:
            # Whatever the compiler threw, this program is not for this device.
            return False

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._pool is not None:
            processes = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
