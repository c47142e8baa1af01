"""Every backend computes the definition: outputs and all gradients against float64 over a covering grid of cases."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.atman_kernels.grid import Case, assert_exact

needs_extension = pytest.mark.skipif(
    importlib.util.find_spec("atman_kernels._C") is None, reason="the C++ extension is not built"
)
BACKENDS = ["triton", pytest.param("cpu", marks=needs_extension)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CASES = [
    Case((1,), heads=(1, 1)),
    Case((17, 64), heads=(4, 2), head_dim=32),
    Case((63, 65), heads=(2, 2), head_dim=64, bias="absent"),
    Case((111, 1, 0, 17), heads=(3, 1), head_dim=80),
    Case((64, 130), heads=(2, 1), head_dim=128, bias="removed"),
    Case((65,), heads=(1, 1), head_dim=96, causal=False),
    Case((17, 40), heads=(2, 2), head_dim=256, causal=False, bias="removed"),
    Case((257,), heads=(2, 1), window=100, lse_gradient=False),
    Case((130, 65), heads=(2, 1), window=1, bias="removed"),
    Case((1000,), heads=(1, 1), lse_gradient=False),
    # A window in the place of none.
    Case((40, 7), heads=(2, 1), window=2**31 - 1),
    Case((40, 7), heads=(2, 1), lengths_k=(60, 7), window=2**63 - 2, lse_gradient=False),
    # Bottom-right alignment: more keys than rows, fewer keys than rows, and either missing.
    Case((1, 40, 7, 2), heads=(2, 1), lengths_k=(111, 65, 0, 64)),
    Case((70, 0, 65), heads=(2, 2), lengths_k=(17, 33, 64)),
    Case((40, 17), heads=(2, 1), head_dim=32, lengths_k=(130, 17), causal=False, bias="absent"),
    Case((30, 65), heads=(2, 1), lengths_k=(140, 64), window=33),
    # One prompt before several rollouts, nested ranges, a sequence without prefix, and no own keys.
    Case((33, 65, 17), heads=(2, 1), head_dim=32, prefix=((0, 40), (0, 40), (0, 40))),
    Case((17, 40, 64), heads=(2, 2), prefix=((3, 1), (0, 100), (5, 0)), bias="removed"),
    Case((40, 9), heads=(4, 1), prefix=((0, 64), (0, 65)), window=50, bias="absent"),
    Case((70, 5), heads=(2, 1), lengths_k=(20, 0), prefix=((2, 33), (0, 7))),
    Case((33,), heads=(2, 1), prefix=((0, 70),), causal=False),
    Case((65, 65), heads=(4, 2), head_dim=64, layout="dense"),
    Case((64, 64, 64), heads=(2, 1), head_dim=80, layout="permuted", bias="absent"),
    Case((5, 5), lengths_k=(70, 70), heads=(2, 2), layout="permuted", window=64),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_outputs_and_gradients_are_as_exact_as_pytorch(name: str, case: Case, dtype: torch.dtype) -> None:
    assert_exact(case, name, dtype, "cpu" if name == "cpu" else DEVICE)


# The interpreter cannot multiply bfloat16.
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "name", [pytest.param("triton", marks=pytest.mark.gpu), pytest.param("cpu", marks=needs_extension)]
)
def test_outputs_and_gradients_are_as_exact_as_pytorch_in_bfloat16(name: str, case: Case) -> None:
    assert_exact(case, name, torch.bfloat16, "cpu" if name == "cpu" else "cuda")
