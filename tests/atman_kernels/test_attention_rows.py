"""Attention over any part of each batch row: padded batches and cache slots are one code path with packed batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from atman_kernels import AttentionPlan, attention, backend
from atman_kernels.attention import attention_rows
from tests.atman_kernels.grid import poisoned_memory
from tests.atman_kernels.test_attention_all_backends import BACKENDS, DEVICE
from tests.oracle import assert_as_exact_as_reference

ROWS, KEYS = 70, 150
# One batch row each: everything, left padding, a cache slot with unwritten keys, right padding, nothing at all.
Q_START, Q_LENGTH = [0, 41, 0, 3, 70], [70, 29, 70, 60, 0]
K_START, K_LENGTH = [0, 121, 5, 3, 150], [150, 29, 90, 60, 0]


def operands(dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    # (B, H, T, D) in memory, as Hugging Face holds it.
    shapes = [(5, 4, ROWS, 16), (5, 2, KEYS, 16), (5, 2, KEYS, 16), (5, 4, ROWS, 16)]
    q, k, v, do = (torch.randn(s, generator=generator).to(device, dtype).transpose(1, 2) for s in shapes)
    bias = torch.randn((5, KEYS), generator=generator).to(device)
    bias[:, 7::11] = -torch.inf
    return [q, k, v, bias if dtype != torch.float64 else bias.double(), do]


def run(forward, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, do: Tensor) -> dict[str, Tensor]:
    x = [t.detach().requires_grad_() for t in (q, k, v, bias)]
    o, lse = forward(*x)
    grads = torch.autograd.grad(o, x, do)
    return dict(zip(("o", "lse", "dq", "dk", "dv", "dkey_bias"), [o.detach(), lse.detach(), *grads], strict=True))


def one_row_at_a_time(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    o, lse = torch.zeros_like(q), q.new_full((5, 4, ROWS), -torch.inf, dtype=bias.dtype)
    for b in range(5):
        rows = slice(Q_START[b], Q_START[b] + Q_LENGTH[b])
        keys = slice(K_START[b], K_START[b] + K_LENGTH[b])
        own = (q[b : b + 1, rows], k[b : b + 1, keys], v[b : b + 1, keys], bias[b : b + 1, keys])
        o_b, lse_b = attention(*own, window=window, return_lse=True)
        o[b, rows], lse[b, :, rows] = o_b[0], lse_b[0]
    return o, lse


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
@pytest.mark.parametrize("window", [None, 20])
def test_each_row_computes_as_if_it_stood_alone_and_the_rest_is_zero(name: str, window: int | None) -> None:
    device = "cpu" if name in ("cpu", "reference") else DEVICE
    table = [torch.tensor(x, device=device) for x in (Q_START, Q_LENGTH, K_START, K_LENGTH)]
    plan = AttentionPlan.from_rows(*table, max_q=ROWS, max_k=KEYS, covers=False)
    with backend("reference"):
        separately = lambda *x: one_row_at_a_time(*x, window=window)  # noqa: E731
        oracle = run(separately, *operands(torch.float64, device))
        reference = run(separately, *operands(torch.float32, device))
    with backend(name), poisoned_memory():
        actual = run(
            lambda *x: attention_rows(*x, plan=plan, window=window),
            *operands(torch.float32, device),
        )
    for key, value in actual.items():
        assert_as_exact_as_reference(key, value, reference[key], oracle[key])
    for b in range(5):
        assert (actual["o"][b, : Q_START[b]] == 0).all()
        assert (actual["dkey_bias"][b, : K_START[b]] == 0).all()
        assert (actual["dkey_bias"][b, K_START[b] + K_LENGTH[b] :] == 0).all()
