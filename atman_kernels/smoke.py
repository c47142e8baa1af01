"""Half a minute on a new device or after an update: are the Triton kernels right here?

Every direction at head_dim 64 and 128 in both 16-bit dtypes, on a ragged batch with a bias and a shared prefix, held
against the definition in ``reference.py``. A GPU compiles some sixty kernels for it, all cores at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from atman_kernels.attention import attention_varlen, backend
from atman_kernels.plan import AttentionPlan, SharedPrefix
from atman_kernels.processes import PASSED, Check, run_checks
from atman_kernels.statistics import attention_statistics
from atman_kernels.trust import ATTENTION, FUSED, STATISTICS

LENGTHS = (70, 1, 129, 33)
PREFIX = (20, 0, 20, 7)
HEADS = (4, 2)


class _Batch(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    key_bias: Tensor
    prefix: SharedPrefix
    do: Tensor
    plan: AttentionPlan

    def wide(self) -> _Batch:
        prefix = self.prefix._replace(k=self.prefix.k.double(), v=self.prefix.v.double())
        q, k, v, key_bias = (x.double() for x in (self.q, self.k, self.v, self.key_bias))
        return _Batch(q, k, v, key_bias, prefix, self.do.double(), self.plan)


def _batch(head_dim: int, dtype: torch.dtype, device: str) -> _Batch:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    total = sum(LENGTHS)
    q, do = normal(total, HEADS[0], head_dim), normal(total, HEADS[0], head_dim)
    k, v = normal(total, HEADS[1], head_dim), normal(total, HEADS[1], head_dim)
    key_bias = torch.randn(total, generator=generator).to(device) * 2
    prefix = SharedPrefix(*(normal(max(PREFIX), HEADS[1], head_dim) for _ in range(2)))
    plan = AttentionPlan(LENGTHS, None, [0] * len(LENGTHS), PREFIX, device=device)
    return _Batch(q, k, v, key_bias, prefix, do, plan)


def _attention(x: _Batch) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v, x.key_bias)]
    o, lse = attention_varlen(*leaves, plan=x.plan, prefix=x.prefix, return_lse=True)
    gradients = torch.autograd.grad(o, leaves, x.do)
    return {"o": o.detach(), "lse": lse.detach(), **dict(zip(("dq", "dk", "dv", "dkey_bias"), gradients, strict=True))}


def _require_close(found: dict[str, Tensor], expected: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Raise where a result is further from the exact one than twice the reference in the same dtype, plus rounding."""
    wrong = []
    for name, value in found.items():
        error, allowed = ((x.double() - exact[name]).abs().max().item() for x in (value, expected[name]))
        rounding = torch.finfo(value.dtype).eps * exact[name].abs().max().item()
        if not error <= 2 * allowed + rounding:
            wrong.append(f"{name} is off by {error:.2g}, the reference in this dtype by {allowed:.2g}")
    if wrong:
        raise AssertionError("; ".join(wrong))


def attention_is_exact(deterministic: bool, head_dim: int, dtype: torch.dtype, device: str) -> None:
    """Outputs and all gradients of the Triton kernels, with the deterministic or with the fused backward."""
    x = _batch(head_dim, dtype, device)
    with backend("reference"):
        expected, exact = _attention(x), _attention(x.wide())
    with backend("triton", deterministic=deterministic):
        found = _attention(x)
    _require_close(found, expected, exact)


def statistics_are_exact(head_dim: int, dtype: torch.dtype, device: str) -> None:
    """The statistics of the Triton kernels."""
    x = _batch(head_dim, dtype, device)

    def statistics(x: _Batch, lse: Tensor) -> dict[str, Tensor]:
        found = attention_statistics(x.q, x.k, lse, plan=x.plan, key_bias=x.key_bias, prefix=x.prefix)
        return found._replace(received_count=found.received_count.double())._asdict()

    with backend("reference"):
        exact_lse = _attention(x.wide())["lse"]
        expected, exact = statistics(x, exact_lse.float()), statistics(x.wide(), exact_lse)
    with backend("triton"):
        found = statistics(x, exact_lse.float())
    _require_close(found, expected, exact)


def smoke_checks(device: str, head_dims: tuple[int, ...] = (128, 64)) -> dict[str, Check]:
    """Named checks, each "<path> d<head_dim> <dtype>"; the fused backward only where the device has one."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if device == "cpu":
        # The interpreter cannot multiply bfloat16.
        del dtypes["bf16"]
    fused = device == "cpu" or torch.cuda.get_device_capability()[0] in (9, 10)
    found: dict[str, Check] = {}
    for head_dim in head_dims:
        for name, dtype in dtypes.items():
            found[f"{ATTENTION} d{head_dim} {name}"] = partial(attention_is_exact, True, head_dim, dtype)
            if fused:
                found[f"{FUSED} d{head_dim} {name}"] = partial(attention_is_exact, False, head_dim, dtype)
            found[f"{STATISTICS} d{head_dim} {name}"] = partial(statistics_are_exact, head_dim, dtype)
    return found


def failing_paths(checks: Mapping[str, Check], device: str, seconds_each: float = 120.0) -> dict[str, str]:
    """Run smoke checks in processes of their own: the paths that failed, each with its first failing check and why."""
    outcomes: dict[str, str] = {}
    workers = min(len(checks), max(1, (os.cpu_count() or 1) - 1))
    run_checks(checks, device, workers=workers, seconds_each=seconds_each, ended=outcomes.__setitem__)
    found: dict[str, str] = {}
    for name in checks:
        path = next(path for path in (ATTENTION, FUSED, STATISTICS) if name.startswith(path))
        if (outcome := outcomes.get(name, "did not run")) != PASSED:
            found.setdefault(path, f"{name}: {outcome}")
    return found
