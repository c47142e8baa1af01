"""Attention statistics: every backend equals the sums over the attention map and touches what the windows need."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atman_kernels import AttentionPlan, _cpu, attention_statistics, attention_varlen, backend
from atman_kernels.attention import attention_rows
from atman_kernels.problem import NO_WINDOW, Statistics, StatisticsProblem
from atman_kernels.statistics import attention_with_distance, mean_of_chosen_rows, statistics_of_rows
from tests.atman_kernels.definition import largest_terms
from tests.atman_kernels.grid import LAYOUTS, Case, Operands, make_operands, poisoned_memory, restrided
from tests.oracle import assert_as_exact_as_reference
from tests.random_cases import random_cases

needs_extension = pytest.mark.skipif(not _cpu.isas(), reason="the C++ extension is not built")
BACKENDS = ["triton", pytest.param("cpu", marks=needs_extension)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Settings(NamedTuple):
    """What a case adds to an attention problem; ``rows``: share of the rows chosen, None for no selection."""

    case: Case
    window: int = 10
    horizon: tuple[int, int] = (10, 100)
    rows: float | None = 0.6

    def __str__(self) -> str:
        return f"{self.case}-W{self.window}-{self.horizon[0]}..{self.horizon[1]}-rows{self.rows}"


CASES = [
    Settings(Case((1,), heads=(1, 1)), horizon=(0, 0)),
    Settings(Case((17, 64), heads=(4, 2), head_dim=32)),
    Settings(Case((63, 65), heads=(2, 2), head_dim=64, bias="absent"), window=1, rows=None),
    Settings(Case((111, 1, 0, 17), heads=(3, 1), head_dim=80), horizon=(1, 5)),
    Settings(Case((64, 130), heads=(2, 1), head_dim=128, bias="removed"), window=70),
    Settings(Case((257,), heads=(2, 1), head_dim=96), horizon=(0, 1000)),
    Settings(Case((300,), heads=(2, 1), window=100), horizon=(50, 150)),
    Settings(Case((300,), heads=(2, 1), window=5), horizon=(10, 50)),
    Settings(Case((40,), heads=(2, 1), head_dim=256), rows=0.0),
    Settings(Case((400,), heads=(1, 1), bias="absent")),
    # Bottom-right alignment, and prefixes of several kinds.
    Settings(Case((1, 40, 7, 2), heads=(2, 1), lengths_k=(111, 65, 0, 64))),
    Settings(Case((70, 0, 65), heads=(2, 2), lengths_k=(17, 33, 64)), horizon=(0, 30)),
    Settings(Case((33, 65, 17), heads=(2, 1), head_dim=32, prefix=((0, 40), (0, 140), (3, 0))), window=60),
    Settings(Case((40, 9), heads=(4, 1), prefix=((0, 64), (0, 65)), window=50, bias="absent")),
]


def _plan(case: Case, device: str) -> AttentionPlan:
    start, length = zip(*case.prefix, strict=True) if case.prefix else (None, None)
    return AttentionPlan(case.lengths, case.lengths_k, start, length, device=device)


def _chosen(share: float | None, n_rows: int, device: str) -> Tensor | None:
    if share is None:
        return None
    return (torch.rand(n_rows, generator=torch.Generator().manual_seed(1)) < share).to(device)


def statistics_of(name: str, given: Settings, x: Operands) -> dict[str, Tensor]:
    case, device = given.case, x.q.device
    plan = _plan(case, str(device))
    with backend(name):
        _, lse = attention_varlen(
            x.q, x.k, x.v, x.key_bias, plan=plan, prefix=x.prefix, window=case.window, return_lse=True
        )
        return attention_statistics(
            x.q,
            x.k,
            lse,
            plan=plan,
            key_bias=x.key_bias,
            prefix=x.prefix,
            window=given.window,
            horizon=given.horizon,
            rows=_chosen(given.rows, x.q.shape[0], str(device)),
            attention_window=case.window,
        )._asdict()


def _assert_exact(name: str, given: Settings, dtype: torch.dtype, device: str, *, small: bool = False) -> None:
    """The pass criterion; in a ``small`` case the reference may be exact by luck, and the rounding of scores counts."""
    x = make_operands(given.case, dtype, device)
    oracle = statistics_of("reference", given, x.as_float64())
    reference = statistics_of("reference", given, x)
    with poisoned_memory():
        actual = statistics_of(name, given, x)
    assert torch.equal(actual.pop("received_count"), oracle["received_count"])
    # What the kernels sum: the rounding of window - sum is the window's.
    for found in (actual, reference, oracle):
        found["windowed_distance"] = given.window - found["windowed_distance"]
    # p = exp(score - lse) has the absolute rounding of both as its relative one.
    scores = 2 * largest_terms(given.case, x.as_float64("cpu"))["lse"] if small else 0.0
    for key, value in actual.items():
        terms = scores * oracle[key].abs().max().item() if oracle[key].numel() else 0.0
        assert_as_exact_as_reference(key, value, reference[key], oracle[key], terms)


@pytest.mark.parametrize("given", CASES, ids=str)
@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_statistics_are_the_sums_over_the_attention_map(name: str, given: Settings) -> None:
    """Written once more from the definition, without the package: softmax in float64, then row and column sums."""
    case = given.case
    x = make_operands(case, torch.float32, DEVICE if name != "cpu" else "cpu")
    found = statistics_of(name, given, x)
    wide = x.as_float64()
    chosen = _chosen(given.rows, x.q.shape[0], "cpu")
    low, high = given.horizon
    q_start = k_start = 0
    lengths_k = case.lengths_k or case.lengths
    for i, (n_rows, n_keys) in enumerate(zip(case.lengths, lengths_k, strict=True)):
        start, n_prefix = case.prefix[i] if case.prefix else (0, 0)
        for head in range(case.heads[0]):
            head_kv = head // (case.heads[0] // case.heads[1])
            keys = wide.k[k_start : k_start + n_keys, head_kv].cpu()
            bias = torch.zeros(n_prefix + n_keys, dtype=torch.float64)
            if wide.key_bias is not None:
                bias[n_prefix:] = wide.key_bias[k_start : k_start + n_keys].cpu()
            if n_prefix:
                keys = torch.cat([wide.prefix.k[start : start + n_prefix, head_kv].cpu(), keys])
            scores = wide.q[q_start : q_start + n_rows, head].cpu() @ keys.T / case.head_dim**0.5 + bias
            distance = torch.arange(n_rows)[:, None] + len(keys) - n_rows - torch.arange(len(keys))
            hidden = distance < 0 if case.window is None else (distance < 0) | (distance >= case.window)
            p = scores.masked_fill(hidden, -torch.inf).softmax(1).nan_to_num(0.0)
            rows = torch.ones(n_rows, dtype=torch.bool)
            if chosen is not None:
                rows = chosen[q_start : q_start + n_rows]
            mean = (p * distance).sum(1)[rows].mean().nan_to_num(0.0)
            torch.testing.assert_close(found["distance"][i, head].cpu().double(), mean, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                found["windowed_distance"][q_start : q_start + n_rows, head].cpu().double(),
                (p * distance.clamp(max=given.window)).sum(1),
                rtol=1e-4,
                atol=1e-4,
            )
            for key in range(n_keys):
                column = distance[:, n_prefix + key]
                near = rows & (column >= low) & (column <= high)
                expected = p[near, n_prefix + key].mean().nan_to_num(0.0)
                assert found["received"][k_start + key, head].item() == pytest.approx(expected.item(), 1e-4, 1e-6)
                assert found["received_count"][k_start + key] == near.sum()
        q_start, k_start = q_start + n_rows, k_start + n_keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("given", CASES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_statistics_are_as_exact_as_pytorch(name: str, given: Settings, dtype: torch.dtype) -> None:
    _assert_exact(name, given, dtype, "cpu" if name == "cpu" else DEVICE)


@pytest.mark.parametrize("given", CASES, ids=str)
@pytest.mark.parametrize(
    "name", [pytest.param("triton", marks=pytest.mark.gpu), pytest.param("cpu", marks=needs_extension)]
)
def test_statistics_are_as_exact_as_pytorch_in_bfloat16(name: str, given: Settings) -> None:
    _assert_exact(name, given, torch.bfloat16, "cpu" if name == "cpu" else "cuda")


@st.composite
def any_settings(draw: st.DrawFn, longest: int, head_dims: st.SearchStrategy[int]) -> Settings:
    length = st.integers(0, longest)
    lengths, lengths_k = zip(*draw(st.lists(st.tuples(length, length), min_size=1, max_size=3)), strict=True)
    case = Case(
        lengths,
        heads=draw(st.sampled_from([(1, 1), (2, 2), (6, 2)])),
        head_dim=draw(head_dims),
        window=draw(st.none() | st.integers(1, longest)),
        lengths_k=lengths_k,
        prefix=draw(st.just(()) | st.tuples(*[st.tuples(st.integers(0, 20), length)] * len(lengths))),
    )
    low = draw(st.integers(0, 60))
    horizon = (low, low + draw(st.integers(0, longest)))
    return Settings(case, draw(st.integers(1, longest)), horizon, draw(st.none() | st.floats(0, 1)))


@needs_extension
@random_cases(40)
@given(any_settings(200, st.integers(1, 70) | st.sampled_from([96, 256])), st.sampled_from(_cpu.isas() or [""]))
def test_any_shape_on_every_instruction_set_agrees_with_the_reference(given: Settings, isa: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cpu, "_isa", isa)
        _assert_exact("cpu", given, torch.float32, "cpu", small=True)


@random_cases(6)
@given(any_settings(70, st.sampled_from([1, 3, 16, 24])))
def test_any_shape_on_the_triton_kernels_agrees_with_the_reference(given: Settings) -> None:
    _assert_exact("triton", given, torch.float32, DEVICE, small=True)


@pytest.mark.parametrize("name", BACKENDS)
def test_one_probability_is_as_exact_as_its_score(name: str) -> None:
    """Found by the random cases: ``received`` is a single p, whose error was just above twice the reference's."""
    case = Case((42, 42, 42), heads=(1, 1), head_dim=3, lengths_k=(42, 6, 6))
    given = Settings(case, window=1, horizon=(3, 3), rows=None)
    _assert_exact(name, given, torch.float32, "cpu" if name == "cpu" else DEVICE, small=True)


@needs_extension
@pytest.mark.parametrize("isa", _cpu.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_the_attention_finds_every_rows_distance_on_its_way(
    dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With o and lse bit for bit as without it, and as exact as PyTorch's sum over the map."""
    monkeypatch.setattr(_cpu, "_isa", isa)
    for problem in CASES:
        case = problem.case
        x = make_operands(case, dtype)
        plan = _plan(case, "cpu")
        bias = None if x.key_bias is None else x.key_bias[None]
        o, lse = attention_varlen(
            x.q, x.k, x.v, x.key_bias, plan=plan, prefix=x.prefix, window=case.window, return_lse=True
        )
        with poisoned_memory():
            found = attention_with_distance(
                x.q[None], x.k[None], x.v[None], bias, plan=plan, prefix=x.prefix, window=case.window
            )
        assert torch.equal(found[0][0], o)
        assert torch.equal(found[1][0], lse)
        # No row is that long: min(d, window) is d.
        unbounded = problem._replace(window=10**6)
        reference, oracle = (
            statistics_of("reference", unbounded, operands)["windowed_distance"].T for operands in (x, x.as_float64())
        )
        assert_as_exact_as_reference(str(case), found[2][0], reference, oracle)


@needs_extension
def test_means_over_chosen_rows_are_those_of_the_statistics() -> None:
    for problem in CASES:
        x = make_operands(problem.case, torch.float32)
        plan = _plan(problem.case, "cpu")
        bias = None if x.key_bias is None else x.key_bias[None]
        _, _, distance = attention_with_distance(
            x.q[None], x.k[None], x.v[None], bias, plan=plan, prefix=x.prefix, window=problem.case.window
        )
        rows = _chosen(problem.rows, x.q.shape[0], "cpu")
        means = mean_of_chosen_rows(distance, plan, None if rows is None else rows[None])
        torch.testing.assert_close(means, statistics_of("cpu", problem, x)["distance"], rtol=1e-5, atol=1e-5)


def test_a_nan_stays_in_its_sequence_and_out_of_rows_that_were_not_chosen() -> None:
    plan = AttentionPlan((2, 3))
    values = torch.tensor([[[1.0, torch.nan, 2.0, torch.nan, 4.0]]])
    rows = torch.tensor([[True, True, True, False, True]])
    found = mean_of_chosen_rows(values, plan, rows)
    assert torch.equal(found.nan_to_num(-1.0), torch.tensor([[-1.0], [3.0]]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_layouts_change_no_number(name: str, layout: str) -> None:
    """Queries, keys and prefix keys in every layout, NaN between their numbers, against contiguous copies of them."""
    given = Settings(Case((17, 3), heads=(4, 2), prefix=((0, 20), (2, 9))), window=4, horizon=(1, 8))
    x = make_operands(given.case, torch.float32, "cpu" if name == "cpu" else DEVICE)
    q, k, prefix_k = (restrided(t, layout) for t in (x.q, x.k, x.prefix.k))
    strided = x._replace(q=q, k=k, prefix=x.prefix._replace(k=prefix_k))
    copied = x._replace(q=q.contiguous(), k=k.contiguous(), prefix=x.prefix._replace(k=prefix_k.contiguous()))
    found, expected = (statistics_of(name, given, operands) for operands in (strided, copied))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_padded_batches_give_what_each_row_gives_alone(name: str) -> None:
    lengths, total = (40, 23), 45
    x = make_operands(Case((total, total), heads=(2, 1), layout="dense", bias="absent"), torch.float32)
    length = torch.tensor(lengths)
    plan = AttentionPlan.from_rows(
        total - length, length, total - length, length, max_q=total, max_k=total, covers=False
    )
    rows = torch.rand(2, total, generator=torch.Generator().manual_seed(0)) < 0.5
    with backend(name):
        _, lse = attention_rows(x.q, x.k, x.v, None, plan=plan)
        with poisoned_memory():
            found = statistics_of_rows(
                x.q, x.k, lse, plan=plan, key_bias=None, prefix=None, window=10, horizon=(2, 20), rows=rows,
                sm_scale=None, attention_window=None, need_distance=True,
            )  # fmt: skip
        for i, n in enumerate(lengths):
            own = slice(total - n, total)
            alone = attention_statistics(
                x.q[i, own], x.k[i, own], lse[i, :, own], plan=AttentionPlan((n,)), rows=rows[i, own], horizon=(2, 20)
            )
            assert torch.equal(found.distance[i], alone.distance[0])
            for batched, single in zip(found[1:], alone[1:], strict=True):
                torch.testing.assert_close(batched[i, own], single, rtol=1e-6, atol=1e-6)
                assert not batched[i, : total - n].any()


@pytest.mark.parametrize("farthest", [10**6, 2**31 - 1, 2**40, 2**63 - 1])
@pytest.mark.parametrize("name", BACKENDS)
def test_windows_beyond_the_sequence_are_as_good_as_none(name: str, farthest: int) -> None:
    """Found by reading: such a window swallowed the digits of the distance, and overflowed as a horizon."""
    case = Case((40, 25), heads=(2, 1), lengths_k=(40, 70), prefix=((0, 20), (3, 0)))
    x = make_operands(case, torch.float32, "cpu" if name == "cpu" else DEVICE)
    expected = statistics_of("reference", Settings(case, window=100, horizon=(0, 100)), x.as_float64())
    wide = Settings(case._replace(window=farthest), window=farthest, horizon=(0, farthest))
    for key, value in statistics_of(name, wide, x).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-4, check_dtype=False, msg=key)


@pytest.mark.parametrize("name", BACKENDS)
def test_windows_bound_what_is_read(name: str) -> None:
    """NaN in keys and rows out of reach never shows, so they are not touched; the full distance does touch them."""
    n = 500
    x = make_operands(Case((n,), heads=(2, 1), bias="absent"), torch.float32)
    plan = AttentionPlan((n,))
    with backend(name):
        _, lse = attention_varlen(x.q, x.k, x.v, plan=plan, return_lse=True)
        whole = attention_statistics(x.q, x.k, lse, plan=plan)
        k, q = x.k.clone(), x.q.clone()
        k[:64] = torch.nan
        q[460:] = torch.nan
        poisoned = attention_statistics(q, k, lse, plan=plan, need_distance=False)
        touched = attention_statistics(q, k, lse, plan=plan)
    # 128 keys or rows further, a whole tile of the schedule may lie in between.
    assert torch.equal(poisoned.windowed_distance[210:450], whole.windowed_distance[210:450])
    assert torch.equal(poisoned.received[210:230], whole.received[210:230])
    assert poisoned.distance.shape == (0, 2)
    assert touched.distance.isnan().all()


@pytest.mark.parametrize("name", BACKENDS)
def test_the_same_bits_come_out_every_time(name: str) -> None:
    given = CASES[1]
    x = make_operands(given.case, torch.float32, "cpu" if name == "cpu" else DEVICE)
    first, second = (statistics_of(name, given, x) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@needs_extension
def test_the_number_of_threads_changes_no_bit() -> None:
    given = Settings(Case((300, 77), heads=(4, 2)))
    x = make_operands(given.case, torch.float32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(statistics_of("cpu", given, x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][key], other[key]) for other in found[1:] for key in other)


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_the_operator_is_registered_soundly(name: str) -> None:
    x = make_operands(Case((9, 5), heads=(2, 1)), torch.float32)
    plan = AttentionPlan((9, 5))
    rows = torch.ones(1, 14, dtype=torch.bool)
    torch.library.opcheck(
        torch.ops.atman_kernels.attention_statistics.default,
        (
            *(x.q[None], x.k[None], torch.randn(1, 2, 14), x.key_bias[None], None, rows),
            *(plan.sequences, plan.tiles_q, plan.tiles_k, 0.25, NO_WINDOW, True, name, 10, 1, 5, True),
        ),
        test_utils=("test_schema", "test_faketensor"),
    )


@needs_extension
def test_the_operator_of_attention_with_distance_is_registered_soundly() -> None:
    x = make_operands(Case((9, 5), heads=(2, 1)), torch.float32)
    plan = AttentionPlan((9, 5))
    torch.library.opcheck(
        torch.ops.atman_kernels.attention_forward_distance.default,
        (
            *(x.q[None], x.k[None], x.v[None], x.key_bias[None], None, None),
            *(plan.sequences, plan.tiles_q, plan.tiles_k, 0.25, NO_WINDOW, True),
        ),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_attention_and_its_statistics_compile_into_one_graph() -> None:
    x = make_operands(Case((33, 20), heads=(2, 1)), torch.float32)
    plan = AttentionPlan((33, 20))

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        o, lse = attention_varlen(q, k, v, plan=plan, return_lse=True)
        return (o, *attention_statistics(q, k, lse, plan=plan))

    with backend("triton"):
        eager = both(x.q, x.k, x.v)
        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(x.q, x.k, x.v)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"horizon": (5, 4)}, r"horizon must be \(low, high\) with 0 <= low <= high, got \(5, 4\)"),
        ({"attention_window": 0}, "attention_window must be at least 1, got 0"),
        ({"rows": torch.ones(3, dtype=torch.bool)}, r"rows must have one entry per query row, 4, got \(3,\)"),
        ({"rows": torch.ones(4)}, "rows must be bool on cpu, got torch.float32"),
        ({"lse": torch.zeros(4, 2)}, r"lse must have shape \(2, 4\), got \(4, 2\)"),
        ({"lse": torch.zeros(2, 4).double()}, "lse must be torch.float32 on cpu, got torch.float64"),
        ({"lse": torch.full((2, 4), torch.nan)}, "lse has 8 NaN values"),
        ({"plan": None}, "attention_statistics needs cu_seqlens_q or plan"),
        ({"k": torch.zeros(4, 3, 16)}, "the 2 query heads are not a positive multiple of the 3 key/value heads"),
    ],
)
def test_wrong_arguments_are_named(changes: dict, message: str) -> None:
    arguments = {
        "q": torch.zeros(4, 2, 16),
        "k": torch.zeros(4, 1, 16),
        "lse": torch.zeros(2, 4),
        "plan": AttentionPlan((4,)),
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        attention_statistics(**arguments)


@needs_extension
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windowed_distance": torch.empty(1, 1, 4)}, r"windowed must have shape \(1, 2, 4\), got \(1, 1, 4\)"),
        ({"received_count": torch.empty(1, 4)}, "received_count must be int32"),
        ({"distance": torch.empty(2, 2)}, r"distance must have shape \(1, 2\), got \(2, 2\)"),
        ({"rows": torch.ones(1, 4)}, "rows must be uint8"),
        ({"horizon": (3, 2)}, "window must be at least 1 and the horizon 0 <= low <= high"),
    ],
)
def test_the_extension_refuses_arrays_it_would_overrun(changes: dict, message: str) -> None:
    plan = AttentionPlan((4,))
    out = Statistics(
        distance=torch.empty(1, 2),
        windowed_distance=torch.empty(1, 2, 4),
        received=torch.empty(1, 2, 4),
        received_count=torch.empty(1, 4, dtype=torch.int32),
    )
    problem = StatisticsProblem(
        q=torch.zeros(1, 4, 2, 16),
        k=torch.zeros(1, 4, 1, 16),
        lse=torch.zeros(1, 2, 4),
        key_bias=None,
        prefix_k=None,
        rows=None,
        sequences=plan.sequences,
        tiles_q=plan.tiles_q,
        tiles_k=plan.tiles_k,
        sm_scale=1.0,
        attention_window=NO_WINDOW,
        window=10,
        horizon=(1, 2),
    )
    of_out = {name: value for name, value in changes.items() if name in Statistics._fields}
    of_problem = {name: value for name, value in changes.items() if name in StatisticsProblem._fields}
    with pytest.raises(ValueError, match=message):
        _cpu.attention_statistics(out._replace(**of_out), problem._replace(**of_problem))
