"""The attention problems that are timed, most telling first: what mask optimisation and training run on a GPU."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from atman_kernels import AttentionPlan, SharedPrefix
from atman_kernels.flops import attention_backward_flops, attention_forward_flops, visible_pairs


class AttentionCase(NamedTuple):
    """Causal attention over packed sequences, each after the same ``prefix`` keys; a key bias with a gradient."""

    name: str
    lengths: tuple[int, ...]
    heads: tuple[int, int] = (24, 8)
    head_dim: int = 128
    prefix: int = 0

    @property
    def key(self) -> str:
        """Name of the case in results."""
        prefix = f"+{self.prefix}" if self.prefix else ""
        return f"{self.name}{prefix} {self.heads[0]}/{self.heads[1]} d{self.head_dim}"

    @property
    def sm_scale(self) -> float:
        """1 / sqrt(head_dim)."""
        return 1.0 / math.sqrt(self.head_dim)

    def plan(self, device: str) -> AttentionPlan:
        """The layout of the packed tensors."""
        n_seq = len(self.lengths)
        return AttentionPlan(self.lengths, None, [0] * n_seq, [self.prefix] * n_seq, device=device)

    def flops(self, direction: str) -> int:
        """Operations of "forward" or "forward+backward" on visible pairs; the backward gives dq, dk, dv, dkey_bias."""
        own, prefix = visible_pairs(self.plan("cpu").sequences, causal=True, window=None)
        forward = attention_forward_flops(own + prefix, self.heads[0], self.head_dim)
        if direction == "forward":
            return forward
        return forward + attention_backward_flops(
            own, prefix, self.heads[0], self.head_dim, need_dq=True, need_dk=True, need_dv=True
        )


class Inputs(NamedTuple):
    """Packed tensors of a case: q (T, Hq, D), k, v (T, Hkv, D), key_bias (T,) fp32, do like q."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_bias: Tensor
    do: Tensor
    prefix: SharedPrefix | None

    @property
    def differentiable(self) -> list[Tensor]:
        """What gradients are taken of."""
        return [self.q, self.k, self.v, self.key_bias]


def make_inputs(case: AttentionCase, dtype: torch.dtype, device: str) -> Inputs:
    """Random inputs of a case that require gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    n_rows, (heads_q, heads_kv) = sum(case.lengths), case.heads
    q, k, v = (normal(n_rows, heads, case.head_dim).requires_grad_() for heads in (heads_q, heads_kv, heads_kv))
    prefix = None
    if case.prefix:
        prefix = SharedPrefix(*(normal(case.prefix, heads_kv, case.head_dim) for _ in range(2)))
    key_bias = normal(n_rows, dtype=torch.float32).requires_grad_()
    return Inputs(q, k, v, key_bias, normal(n_rows, heads_q, case.head_dim), prefix)


# Those for which docs/benchmarks.md states what is aimed at.
TARGET_CASES = tuple(f"64x{n} 24/8 d128" for n in (1024, 2048, 4096))


def mask_case(heads: tuple[int, int] = (24, 8), head_dim: int = 128) -> AttentionCase:
    """A mask optimisation's batch: 64 chains of 150 to 250 tokens and answers of 8 behind prompts of 150."""
    generator = torch.Generator().manual_seed(0)
    lengths = tuple(torch.randint(158, 259, (64,), generator=generator).tolist())
    return AttentionCase("masks", lengths, heads, head_dim, prefix=150)


def attention_cases() -> list[AttentionCase]:
    """All cases, most telling first.

    64 equal sequences of 256 .. 4096 tokens with and without prefix, a mask optimisation's, ragged ones, one of 16384.
    """
    generator = torch.Generator().manual_seed(0)
    ragged = tuple(torch.randint(64, 2048, (64,), generator=generator).tolist())
    shapes = [(f"64x{n}", (n,) * 64) for n in (1024, 2048, 4096, 512, 256)]
    shapes += [("ragged", ragged), ("1x16384", (16384,))]
    found = []
    for heads, head_dim in (((24, 8), 128), ((32, 32), 128), ((24, 8), 64), ((32, 32), 64)):
        of_these = [AttentionCase(name, lengths, heads, head_dim) for name, lengths in shapes]
        of_these.insert(len(TARGET_CASES), mask_case(heads, head_dim))
        of_these += [AttentionCase(name, lengths, heads, head_dim, prefix=512) for name, lengths in shapes[:2]]
        found += of_these
    return found
