"""The Triton kernels behind torch.library: registration, compilation, what is launched and what is refused."""

from __future__ import annotations

import importlib.util
import weakref
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from atman_kernels import (
    AttentionPlan,
    _triton,
    attention,
    attention_statistics,
    attention_varlen,
    backend,
    ops,
)
from atman_kernels._triton import backward, forward, launch
from atman_kernels.problem import NO_WINDOW, AttentionProblem, Gradients
from tests.atman_kernels.grid import Case, make_operands

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASE = Case((9, 5), heads=(2, 1), prefix=((0, 10), (0, 5)))


def _operands(requires_grad: bool) -> tuple:
    x = make_operands(CASE, torch.float32, DEVICE)
    plan = AttentionPlan(CASE.lengths, prefix_start=(0, 0), prefix_length=(10, 5), device=DEVICE)
    q, k, v, bias = (t[None].requires_grad_(requires_grad) for t in (x.q, x.k, x.v, x.key_bias))
    tables = (plan.sequences, plan.tiles_q, plan.tiles_k)
    return x, (q, k, v, bias, x.prefix.k, x.prefix.v, *tables, 0.25, True, NO_WINDOW, True, "triton")


def test_forward_operator_is_registered_soundly() -> None:
    _, operands = _operands(requires_grad=True)
    torch.library.opcheck(ops.attention_forward, operands)


@pytest.mark.parametrize("need", [(True, True, True, True), (False, False, False, True)], ids=["all", "key_bias"])
def test_backward_operator_is_registered_soundly(need: tuple[bool, ...]) -> None:
    x, operands = _operands(requires_grad=False)
    o, lse = ops.attention_forward(*operands)
    torch.library.opcheck(
        ops.attention_backward,
        (x.do[None], x.dlse[None], o, lse, *operands, *need),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("packed", [False, True], ids=["attention", "attention_varlen"])
def test_forward_and_backward_compile_into_one_graph(packed: bool) -> None:
    case = Case((33, 33), heads=(2, 1))
    x = make_operands(case, torch.float32, DEVICE)
    plan = AttentionPlan(case.lengths, device=DEVICE)

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_bias: torch.Tensor) -> torch.Tensor:
        if packed:
            return (attention_varlen(q, k, v, key_bias, plan=plan) * x.do).sum()
        return (attention(q[None], k[None], v[None], key_bias[None]) * x.do).sum()

    inputs = [t.requires_grad_() for t in (x.q, x.k, x.v, x.key_bias)]
    with backend("triton"):
        eager = torch.autograd.grad(loss(*inputs), inputs)
        compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def _backward_launches(case: Case, needed: str, dtype: torch.dtype = torch.float16) -> list:
    """The launches of a backward that computes the gradients named in ``needed``."""
    x = make_operands(case, dtype)
    q, k, v, bias, do = (t[None] for t in (x.q, x.k, x.v, x.key_bias, x.do))
    plan = AttentionPlan(case.lengths)
    o, lse = torch.empty_like(q), torch.zeros(1, q.shape[2], q.shape[1])
    gradients = Gradients(
        *(
            torch.empty_like(t) if f"d{name}" in needed.split() else None
            for name, t in zip(("q", "k", "v", "key_bias"), (q, k, v, bias), strict=True)
        )
    )
    tables = (plan.sequences, plan.tiles_q, plan.tiles_k)
    problem = AttentionProblem(q, k, v, bias, None, None, *tables, 1.0, True, NO_WINDOW)
    return backward.backward_launches("sm_90", gradients, do, None, o, lse, problem)


@pytest.mark.parametrize(
    ("needed", "kernels", "flags"),
    [
        (
            "dq dk dv dkey_bias",
            ["queries", "keys", "sum"],
            {"DQ", "EXACT_DELTA", "DK", "DV", "DKEY_BIAS"},
        ),
        ("dkey_bias", ["queries", "keys", "sum"], {"EXACT_DELTA", "DKEY_BIAS"}),
        ("dq", ["queries"], {"DQ"}),
        ("dk dv", ["queries", "keys"], {"DK", "DV"}),
        ("dv", ["queries", "keys"], {"DV"}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_only_the_products_of_needed_gradients_are_compiled(needed: str, kernels: list[str], flags: set[str]) -> None:
    launches = _backward_launches(Case((100,), heads=(4, 2)), needed)
    found = [launch.kernel.__name__ for launch in launches]
    assert len(found) == len(kernels)
    assert all(kernel in name for kernel, name in zip(kernels, found, strict=True))
    needs = [launch.arguments["needs"]._asdict() for launch in launches if "needs" in launch.arguments]
    products = {"DQ", "EXACT_DELTA", "DK", "DV", "DKEY_BIAS"}
    assert {name for each in needs for name, value in each.items() if name in products and value} == flags


def _described(launches: list) -> list:
    """Everything that a launch depends on, tensors by their memory."""

    def plain(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.data_ptr(), value.shape, value.stride()
        if isinstance(value, TensorDescriptor):
            return value.base.data_ptr(), value.shape, value.strides, value.block_shape
        if isinstance(value, tl.constexpr):
            return value.value
        if isinstance(value, tuple):
            return type(value), [plain(member) for member in value]
        return value

    return [
        (each.kernel, each.programs, {name: plain(value) for name, value in each.arguments.items()}, each.num_warps)
        for each in launches
    ]


def test_launches_kept_from_an_equal_call_are_those_that_would_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where other arguments share a tensor, or one begins at another alignment."""
    plan = AttentionPlan([40])
    build = forward._build
    built = []
    monkeypatch.setattr(launch, "_templates", OrderedDict())
    monkeypatch.setattr(forward, "_build", lambda *arguments: built.append(build(*arguments)) or built[-1])

    def make(shared: bool, shifted: bool) -> tuple:
        q, k, v = (torch.zeros(1 + 40 * 2 * 16)[int(shifted) : 1280 + shifted].view(1, 40, 2, 16) for _ in range(3))
        tiles = plan.tiles_q, plan.tiles_q if shared else plan.tiles_k.clone()
        problem = AttentionProblem(
            q, k, v, torch.zeros(1, 40), None, None, plan.sequences, *tiles, 1.0, True, NO_WINDOW
        )
        return torch.empty_like(q), torch.empty(1, 2, 40), problem

    seen = []
    for shared, shifted, new in [
        (False, False, 1),
        (False, False, 0),
        (True, False, 1),
        (False, True, 1),
        (True, False, 0),
    ]:
        o, lse, problem = make(shared, shifted)
        seen.append((o, lse, problem))
        before = len(built)
        found = forward.forward_launches("sm_90", o, lse, problem)
        assert len(built) - before == new
        blocks = forward.block_sizes("sm_90", "forward", 16, torch.float32)
        assert _described(found) == _described(build("sm_90", blocks, o, lse, problem))


def test_kept_launches_hold_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_templates", OrderedDict())
    x = torch.zeros(1, 40, 2, 16, dtype=torch.float16)
    alive = weakref.ref(x)
    plan = AttentionPlan([40])
    tables = plan.sequences, plan.tiles_q, plan.tiles_k
    problem = AttentionProblem(x, x, x, None, None, None, *tables, 1.0, True, NO_WINDOW)
    assert forward.forward_launches("sm_90", torch.empty_like(x), torch.empty(1, 2, 40), problem)
    assert launch._templates
    del x, problem
    assert alive() is None


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    x = torch.zeros(1, 4, 1, 16)
    with backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        attention(x, x, x)


def test_other_devices_are_named() -> None:
    with backend("triton"), pytest.raises(RuntimeError, match="CUDA and ROCm devices, not on xpu"):
        _triton.require_runnable(torch.device("xpu"), torch.float16)


def test_devices_that_triton_does_not_compile_for_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match=r"8\.0 or higher, cuda:0 has 7\.5"):
        launch.device_family.__wrapped__(torch.device("cuda:0"))


@pytest.mark.parametrize(("architecture", "runs"), [("gfx942:sramecc+:xnack-", True), ("gfx90a:sramecc+", False)])
def test_amd_devices_without_block_sizes_of_their_own_are_named(
    architecture: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.version, "hip", "6.3")
    properties = SimpleNamespace(gcnArchName=architecture)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    family = launch.device_family.__wrapped__
    if runs:
        assert family(torch.device("cuda:0")) == "gfx942"
        return
    with pytest.raises(RuntimeError, match="gfx942, cuda:0 is gfx90a"):
        family(torch.device("cuda:0"))


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    x = torch.zeros(1, 4, 1, 16)
    with backend("triton"), pytest.raises(RuntimeError, match="triton package, which is not installed"):
        attention(x, x, x)


def test_float64_is_refused_by_name() -> None:
    x = torch.zeros(1, 4, 1, 16, dtype=torch.float64)
    with backend("triton"), pytest.raises(ValueError, match='float64 needs "reference"'):
        attention(x, x, x)


@pytest.mark.parametrize("value", [2.0**24 + 2, -1e9, 3e38, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("statistics", [False, True], ids=["attention", "statistics"])
def test_finite_biases_that_base_2_cannot_hold_are_refused_by_value(value: float, statistics: bool) -> None:
    x, bias, plan = torch.zeros(4, 1, 16), torch.tensor([0.0, 1.0, value, -torch.inf]), AttentionPlan([4])

    def call() -> object:
        if statistics:
            return attention_statistics(x, x, torch.zeros(1, 4), plan=plan, key_bias=bias)
        return attention_varlen(x, x, x, bias, plan=plan)

    with backend("triton"), pytest.raises(ValueError, match=r"finite key_bias up to 16777216, got .* at \(0, 2\)"):
        call()


def test_the_largest_finite_bias_is_computed() -> None:
    q, k, v = (torch.randn(1, 4, 1, 16) for _ in range(3))
    bias = torch.tensor([[-(2.0**24), 0.0, 2.0**24, -torch.inf]])
    with backend("triton"):
        o = attention(q, k, v, bias)
    with backend("reference"):
        torch.testing.assert_close(o, attention(q, k, v, bias))
