"""What only a GPU can show: bfloat16 and float16 over the whole grid of sizes, 1000 equal backwards, no idle memory."""

from __future__ import annotations

import pytest
import torch

from tests.atman_kernels.grid import Case, assert_exact, make_operands, run

pytestmark = pytest.mark.gpu

LENGTHS = (1, 17, 63, 64, 65, 111, 257, 1000)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("bias", ["absent", "finite", "removed"])
def test_all_lengths_are_as_exact_as_pytorch(
    bias: str, head_dim: int, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    prefix = tuple((3 * i, 50 * (i % 3)) for i in range(len(LENGTHS)))
    assert_exact(Case(LENGTHS, heads, head_dim, bias), "triton", dtype, "cuda")
    assert_exact(Case(LENGTHS, heads, head_dim, bias, prefix=prefix, window=100), "triton", dtype, "cuda")


def test_a_thousand_backwards_are_bitwise_equal() -> None:
    case = Case((500, 130, 257), heads=(8, 2), head_dim=128)
    operands = make_operands(case, torch.bfloat16, "cuda")
    first = run("triton", case, operands)
    for _ in range(1000):
        again = run("triton", case, operands)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_peak_memory_of_a_backward_is_linear_in_the_sequence() -> None:
    case = Case((16384,), heads=(8, 2), head_dim=64, lse_gradient=False)
    operands = make_operands(case, torch.bfloat16, "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run("triton", case, operands)
    in_and_out = sum(x.nbytes for x in (operands.q, operands.k, operands.v))
    assert torch.cuda.max_memory_allocated() - before < 4 * in_and_out
