"""What the Triton path allocates, counted without running a kernel: nothing that grows faster than the sequence."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from atman_kernels import AttentionPlan, ops
from atman_kernels._triton import launch
from atman_kernels.problem import NO_WINDOW
from tests.atman_kernels.grid import Case, make_operands

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32 = 4
HEADS_Q, HEADS_KV, HEAD_DIM = 6, 2, 16


class _Allocations(TorchDispatchMode):
    """Collects the bytes of every storage that an operation creates inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        results = result if isinstance(result, (list, tuple)) else [result]
        for x in results:
            if isinstance(x, Tensor) and x.numel() and x.untyped_storage().data_ptr() not in known:
                known.add(x.untyped_storage().data_ptr())
                self.sizes.append(x.untyped_storage().nbytes())
        return result


class Counted(NamedTuple):
    """Sizes of the tensors that a forward and a backward allocated, and the bytes of their outputs."""

    forward: list[int]
    backward: list[int]
    forward_outputs: int
    backward_outputs: int


def _count(length: int, *, need: tuple[bool, bool, bool, bool] = (True, True, True, True)) -> Counted:
    case = Case((length,), (HEADS_Q, HEADS_KV), HEAD_DIM)
    x = make_operands(case, torch.float16, DEVICE)
    plan = AttentionPlan((length,), device=DEVICE)
    q, k, v, do = (t[None] for t in (x.q, x.k, x.v, x.do))
    tables = (plan.sequences, plan.tiles_q, plan.tiles_k)
    operands = (q, k, v, x.key_bias[None], None, None, *tables, 0.25, True, NO_WINDOW, True, "triton")
    with _Allocations() as forward:
        o, lse = ops._forward(*operands)
    with _Allocations() as backward:
        gradients = ops._backward(do, None, o, lse, *operands, *need)
    sizes = [sum(t.nbytes for t in tensors) for tensors in ((o, lse), gradients)]
    return Counted(forward.sizes, backward.sizes, *sizes)


@pytest.fixture(autouse=True)
def _without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.Launch, "run", lambda self: None)


def _aligned(length: int) -> int:
    """Numbers per head of a scratch in which the one sequence may start at any multiple of four."""
    return length + 4


@pytest.mark.parametrize("length", [256, 4096])
def test_memory_beyond_inputs_and_outputs_is_a_few_numbers_per_row(length: int) -> None:
    counted = _count(length)
    assert sum(counted.forward) == counted.forward_outputs
    # lse and delta of every query head, and dkey_bias of every kv head.
    assert sum(counted.backward) - counted.backward_outputs == FP32 * (
        2 * HEADS_Q * _aligned(length) + HEADS_KV * length
    )


def test_a_backward_for_the_bias_alone_allocates_no_dq_dk_dv() -> None:
    length = 4096
    smallest_gradient = length * HEADS_KV * HEAD_DIM * torch.float16.itemsize
    row_terms = FP32 * 2 * HEADS_Q * _aligned(length)
    counted = _count(length, need=(False, False, False, True))
    assert counted.backward_outputs == FP32 * length
    assert max(counted.backward) < smallest_gradient
    assert sum(counted.backward) == row_terms + FP32 * (HEADS_KV * length + length)
