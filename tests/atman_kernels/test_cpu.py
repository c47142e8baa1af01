"""The C++ kernel: every instruction set, any number of threads, and only the gradients that are asked for."""

from __future__ import annotations

import pytest
import torch

from atman_kernels import _cpu, attention, backend
from tests.atman_kernels.grid import Case, Operands, assert_exact, assert_operands_exact, make_operands, run

pytestmark = pytest.mark.skipif(not _cpu.isas(), reason="the C++ extension is not built")

CASES = [
    Case((1,), heads=(1, 1), head_dim=80),
    Case((17, 64, 0), heads=(4, 2), head_dim=1),
    Case((63, 65), heads=(2, 2), head_dim=64, bias="absent"),
    Case((111, 1), heads=(3, 1), head_dim=33),
    Case((130,), heads=(2, 1), head_dim=128, bias="removed"),
    Case((40, 17), heads=(2, 2), head_dim=256, causal=False),
    # More keys than a row block keeps.
    Case((700,), heads=(2, 1)),
    Case((620,), heads=(1, 1), window=300),
    Case((33, 65, 17), heads=(2, 1), head_dim=32, prefix=((0, 40), (0, 140), (3, 0))),
    Case((30, 140), heads=(2, 1), lengths_k=(140, 64), window=33, bias="removed"),
    Case((64, 64), heads=(2, 1), head_dim=96, layout="permuted"),
    # Decoding: few queries at the end of many keys, with and without a prefix.
    Case((1, 2), heads=(4, 1), head_dim=128, lengths_k=(513, 64)),
    Case((1, 2, 5), heads=(8, 2), head_dim=64, lengths_k=(1, 40, 300), prefix=((0, 200), (0, 200), (50, 77))),
]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture
def threads() -> int:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("isa", _cpu.isas())
def test_every_instruction_set_is_as_exact_as_pytorch(
    isa: str, case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cpu, "_isa", isa)
    assert_exact(case, "cpu", dtype)


@pytest.mark.parametrize(
    "case", [Case((700, 30), heads=(2, 1), head_dim=24), Case((900,), heads=(1, 1), window=200)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_outputs_do_not_depend_on_the_number_of_threads(case: Case, dtype: torch.dtype, threads: int) -> None:
    operands = make_operands(case, dtype)
    results = []
    for n in (1, 2, 3, 8):
        torch.set_num_threads(n)
        results.append(run("cpu", case, operands))
        assert all(torch.equal(results[-1][name], results[0][name]) for name in ("o", "lse"))


@pytest.mark.parametrize("n", [3, 8])
def test_gradients_of_a_sequence_split_over_threads_are_exact(n: int, threads: int) -> None:
    torch.set_num_threads(n)
    for dtype in (torch.float32, torch.bfloat16):
        assert_exact(Case((700,), heads=(2, 1), head_dim=24, prefix=((0, 150),)), "cpu", dtype)


def test_repeated_backwards_are_bitwise_equal_for_a_given_number_of_threads(threads: int) -> None:
    case = Case((600, 17, 130), heads=(4, 2), head_dim=32)
    operands = make_operands(case, torch.float32)
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        first = run("cpu", case, operands)
        for _ in range(3):
            again = run("cpu", case, operands)
            assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_sequence_does_not_depend_on_its_companions(threads: int) -> None:
    torch.set_num_threads(1)
    together = Case((150, 60, 33), heads=(2, 1))
    x = make_operands(together, torch.float32)
    whole = run("cpu", together, x)
    rows = slice(150, 210)
    alone = run(
        "cpu",
        Case((60,), heads=(2, 1)),
        Operands(x.q[rows], x.k[rows], x.v[rows], x.key_bias[rows], None, x.do[rows], x.dlse[:, rows]),
    )
    for name, value in alone.items():
        assert torch.equal(value, whole[name][:, rows] if name == "lse" else whole[name][rows]), name


@pytest.mark.parametrize("wanted", ["q", "k", "v", "key_bias", "q key_bias", "k v"])
def test_gradients_asked_for_alone_equal_those_asked_for_together(wanted: str) -> None:
    torch.manual_seed(0)
    tensors = {"q": torch.randn(1, 200, 4, 16), "k": torch.randn(1, 200, 2, 16), "v": torch.randn(1, 200, 2, 16)}
    tensors["key_bias"] = torch.randn(1, 200)
    do = torch.randn(1, 200, 4, 16)

    def gradients(names: list[str]) -> dict[str, torch.Tensor]:
        inputs = {name: x.clone().requires_grad_(name in names) for name, x in tensors.items()}
        with backend("cpu"):
            o = attention(**inputs)
        return dict(zip(names, torch.autograd.grad(o, [inputs[name] for name in names], do), strict=True))

    together = gradients(list(tensors))
    for name, gradient in gradients(wanted.split()).items():
        torch.testing.assert_close(gradient, together[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [300, 1500])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_dkey_bias_of_16_bit_inputs_is_nearly_as_exact_as_of_fp32(dtype: torch.dtype, length: int) -> None:
    """The rounded o takes no part: delta comes from unrounded p and dp."""
    case = Case((length,), heads=(2, 1), head_dim=64, lse_gradient=False)
    x = make_operands(case, dtype)
    as_float = Operands(x.q.float(), x.k.float(), x.v.float(), x.key_bias, None, x.do.float(), None)
    exact = run("reference", case, x.as_float64())["dkey_bias"]
    error_of_float = (run("cpu", case, as_float)["dkey_bias"] - exact).abs().max()
    error = (run("cpu", case, x)["dkey_bias"] - exact).abs().max()
    assert error <= 4 * error_of_float


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("lse_gradient", [False, True], ids=["o only", "o and lse"])
@pytest.mark.parametrize("window", [None, 1], ids=["causal", "window 1"])
def test_a_row_that_sees_a_single_key_sends_it_the_gradient_of_lse_alone(
    window: int | None, lse_gradient: bool, dtype: torch.dtype
) -> None:
    """The first sequence has one key, of the second all but one are removed; window 1 leaves a row its own."""
    case = Case((1, 300), heads=(4, 2), head_dim=24, window=window, lse_gradient=lse_gradient)
    x = make_operands(case, dtype)
    x.key_bias[1:120] = x.key_bias[121:] = -torch.inf
    gradients = run("cpu", case, x)
    expected = torch.zeros_like(gradients["dkey_bias"])
    if lse_gradient:
        expected[0] = x.dlse[:, 0].sum()
        expected[120] = x.dlse[:, 120].sum() if window else x.dlse[:, 120:].sum()
        torch.testing.assert_close(gradients["dkey_bias"], expected)
    else:
        assert not any(gradients[name].count_nonzero() for name in ("dq", "dk", "dkey_bias"))
    assert_exact(case, "cpu", dtype)
    torch.testing.assert_close(gradients["dv"][0, 0], x.do[0, :2].sum(0), rtol=1e-2, atol=1e-6)


def test_operands_beyond_float_range_do_not_become_nan() -> None:
    """Scores of +-1e4: p is one-hot, every exponent far below the range of exp."""
    q = torch.full((1, 70, 1, 16), 100.0)
    k = torch.randn(1, 70, 1, 16).sign() * torch.linspace(1, 100, 70)[None, :, None, None]
    v = torch.randn(1, 70, 1, 16)
    with backend("cpu"):
        o, lse = attention(q, k, v, return_lse=True)
    with backend("reference"):
        expected, expected_lse = attention(q, k, v, return_lse=True)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_nan_in_a_query_reaches_its_row_only() -> None:
    x = make_operands(Case((70,)), torch.float32)
    x.q[20, 1, 3] = torch.nan
    o = run("cpu", Case((70,)), x)["o"]
    assert o[20, 1].isnan().all()
    assert o.isnan().sum() == o.shape[-1]


@pytest.mark.parametrize("isa", _cpu.isas())
@pytest.mark.parametrize("length", [12, 130, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_keep_their_digits_where_one_key_has_nearly_all_the_weight(isa, length, dtype, monkeypatch):
    """There ds = p (dp - delta) cancels: a delta from p that do not sum to 1 would be all of it."""
    monkeypatch.setattr(_cpu, "_isa", isa)
    case = Case((length, 40), heads=(4, 2), head_dim=16, lse_gradient=False)
    x = make_operands(case, dtype)
    assert_operands_exact(case, "cpu", x._replace(q=x.q * 20))
