"""Cases of attention with a key bias: how to make their tensors, run them on a backend and compare the results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from atman_kernels import AttentionPlan, SharedPrefix, attention, attention_varlen, backend
from tests.oracle import assert_as_exact_as_reference

NAMES = ("o", "lse", "dq", "dk", "dv", "dkey_bias")
LAYOUTS = ("contiguous", "heads_first", "dim_first", "interleaved", "embedded", "broadcast")


class Case(NamedTuple):
    """One attention problem. ``lengths_k`` None: as the queries; ``prefix``: (start, length) per sequence."""

    lengths: tuple[int, ...]
    heads: tuple[int, int] = (2, 1)
    head_dim: int = 16
    bias: Literal["absent", "finite", "removed"] = "finite"
    causal: bool = True
    window: int | None = None
    lengths_k: tuple[int, ...] | None = None
    prefix: tuple[tuple[int, int], ...] = ()
    layout: Literal["packed", "dense", "permuted"] = "packed"
    lse_gradient: bool = True

    def __str__(self) -> str:
        lengths = "+".join(map(str, self.lengths))
        parts = [self.layout, lengths, f"h{self.heads[0]}/{self.heads[1]}", f"d{self.head_dim}", self.bias]
        parts += [] if self.causal else ["full"]
        parts += [f"w{self.window}"] if self.window else []
        parts += ["k" + "+".join(map(str, self.lengths_k))] if self.lengths_k else []
        parts += ["prefix"] if self.prefix else []
        return "-".join(parts)


class Operands(NamedTuple):
    """Inputs and output gradients of a case, in the dtype under test."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_bias: Tensor | None
    prefix: SharedPrefix | None
    do: Tensor
    dlse: Tensor | None

    def as_float64(self, device: str | None = None) -> Operands:
        """The same numbers in double precision, where they are or on another device."""

        def wide(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, torch.float64)

        prefix = self.prefix and self.prefix._replace(k=wide(self.prefix.k), v=wide(self.prefix.v))
        tensors = (wide(x) for x in (self.q, self.k, self.v, self.key_bias))
        return Operands(*tensors, prefix, wide(self.do), wide(self.dlse))


def make_operands(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Operands:
    """Random tensors of a case; the same numbers for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    lengths_k = case.lengths if case.lengths_k is None else case.lengths_k
    heads_q, heads_kv = case.heads
    if case.layout == "packed":
        rows: tuple[int, ...] = (sum(case.lengths),)
        keys: tuple[int, ...] = (sum(lengths_k),)
    else:
        rows, keys = (len(case.lengths), case.lengths[0]), (len(lengths_k), lengths_k[0])
    if case.layout == "permuted":
        # (B, H, T, D) in memory, as Hugging Face holds it.
        q, k, v, do = (
            normal(n[0], heads, n[1], case.head_dim).transpose(1, 2)
            for n, heads in ((rows, heads_q), (keys, heads_kv), (keys, heads_kv), (rows, heads_q))
        )
    else:
        q, do = normal(*rows, heads_q, case.head_dim), normal(*rows, heads_q, case.head_dim)
        k, v = normal(*keys, heads_kv, case.head_dim), normal(*keys, heads_kv, case.head_dim)
    key_bias = None
    if case.bias != "absent":
        key_bias = torch.randn(keys, generator=generator).to(device) * 2
    if key_bias is not None and case.bias == "removed":
        # Every third key, and all keys of the first sequence.
        flat = key_bias.view(-1)
        flat[::3] = -torch.inf
        flat[: lengths_k[0]] = -torch.inf
    prefix = None
    if case.prefix:
        start, length = zip(*case.prefix, strict=True)
        n_prefix = max(s + n for s, n in case.prefix)
        prefix = SharedPrefix(
            normal(n_prefix, heads_kv, case.head_dim), normal(n_prefix, heads_kv, case.head_dim), start, length
        )
    lse_shape = (heads_q, rows[0]) if case.layout == "packed" else (rows[0], heads_q, rows[1])
    dlse = torch.randn(lse_shape, generator=generator).to(device) if case.lse_gradient else None
    return Operands(q, k, v, key_bias, prefix, do, dlse)


def restrided(x: Tensor, layout: str) -> Tensor:
    """The numbers of x, (..., T, H, D), in another layout, NaN between them; "broadcast": those of one head for all."""
    if layout == "heads_first":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "dim_first":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "broadcast":
        return x[..., :1, :].expand_as(x)
    *batch, rows, heads, dim = x.shape
    if layout == "interleaved":
        view = x.new_full((*batch, rows, heads, 2 * dim + 1), math.nan)[..., 1::2]
    elif layout == "embedded":
        view = x.new_full((*batch, rows + 2, heads + 1, dim + 5), math.nan)[..., 1:-1, :heads, 2:-3]
    else:
        return x
    return view.copy_(x)


def run(
    name: Literal["triton", "cpu", "reference"], case: Case, x: Operands, *, deterministic: bool = True
) -> dict[str, Tensor]:
    """Outputs and all gradients of a case on a backend, by the public functions and autograd."""
    q, k, v = (t.detach().requires_grad_() for t in (x.q, x.k, x.v))
    key_bias = None if x.key_bias is None else x.key_bias.detach().requires_grad_()
    bounds = {"causal": case.causal, "window": case.window, "return_lse": True}
    with backend(name, deterministic=deterministic):
        if case.layout == "packed":
            start, length = (None, None) if x.prefix is None else (x.prefix.start, x.prefix.length)
            plan = AttentionPlan(case.lengths, case.lengths_k, start, length, device=q.device)
            o, lse = attention_varlen(q, k, v, key_bias, plan=plan, prefix=x.prefix, **bounds)
        else:
            o, lse = attention(q, k, v, key_bias, **bounds)
        wanted = [q, k, v] + ([] if key_bias is None else [key_bias])
        outputs, weights = ([o], [x.do]) if x.dlse is None else ([o, lse], [x.do, x.dlse])
        grads = torch.autograd.grad(outputs, wanted, weights)
    return dict(zip(NAMES, [o.detach(), lse.detach(), *grads], strict=False))


def assert_exact(case: Case, name: Literal["triton", "cpu"], dtype: torch.dtype, device: str = "cpu") -> None:
    """Assert the pass criterion on every output and gradient, with all fresh memory poisoned by NaN."""
    assert_operands_exact(case, name, make_operands(case, dtype, device))


def assert_operands_exact(
    case: Case, name: Literal["triton", "cpu"], operands: Operands, terms: Mapping[str, float] | None = None
) -> None:
    """:func:`assert_exact` on tensors of any strides; ``terms`` of each result as in the pass criterion."""
    oracle = run("reference", case, operands.as_float64())
    reference = run("reference", case, operands)
    with poisoned_memory():
        actual = run(name, case, operands)
    for key, value in actual.items():
        assert_as_exact_as_reference(key, value, reference[key], oracle[key], terms[key] if terms else 0.0)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN inside, so that a row which a kernel fails to write is seen."""
    # Enforced, it would keep backend(deterministic=False) from choosing its backward.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(False)
