"""gamma_t from series: the equations on numbers worked by hand, and what always holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atmanrl.config import CreditConfig, SeriesConfig
from atmanrl.rhythm import credit
from atmanrl.rhythm.credit import gammas, weighted_advantages
from atmanrl.rhythm.series import RolloutSeries

WAAD = torch.tensor([1.0, 4.0, 0.5, 0.6, 3.0])
FAI = torch.tensor([0.1, 0.3, 0.9, 0.2, 0.8])


def test_waad_changes_by_the_next_token() -> None:
    torch.testing.assert_close(credit.waad_change(WAAD), torch.tensor([3.0, 3.5, 0.1, 2.4, 0.0]))


def test_local_chunk_amplifies_before_the_largest_changes() -> None:
    assert credit.local_chunk(WAAD).tolist() == [1.5, 1.5, 1.0, 1.0, 1.0]


def test_global_anchor_amplifies_the_highest_influence() -> None:
    assert credit.global_anchor(FAI, gain=2.0).tolist() == [1.0, 1.0, 2.0, 1.0, 2.0]


def test_coupled_rhythm_moves_part_of_a_dominated_anchors_bonus_to_its_introduction() -> None:
    # Anchors are 2 and 4. Only 2 reads locally (0.5 <= median 1.0); the largest change before it, 3.5 at 1, is above
    # the median 2.4. Token 1 introduces it.
    dominated, introduction = credit.locally_dominated(WAAD, FAI)
    assert dominated.tolist() == [False, False, True, False, False]
    assert introduction[2] == 1
    gamma = credit.coupled_rhythm(WAAD, FAI, alpha=0.25)
    assert gamma.tolist() == [1.0, 1.125, 1.375, 1.0, 1.5]


def test_two_anchors_with_one_introduction_add_their_bonuses() -> None:
    waad = torch.tensor([5.0, 0.1, 0.1, 4.0, 4.0])
    fai = torch.tensor([0.0, 0.9, 0.8, 0.1, 0.1])
    assert credit.coupled_rhythm(waad, fai).tolist() == [1.5, 1.25, 1.25, 1.0, 1.0]


def test_the_introduction_lies_within_the_lookback() -> None:
    waad = torch.tensor([9.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    fai = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    assert credit.locally_dominated(waad, fai, share=0.2, lookback=4)[1][4] == 0
    assert credit.locally_dominated(waad, fai, share=0.2, lookback=2)[1][4] == 2


@given(
    values=st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1)), min_size=1, max_size=40),
    share=st.floats(0, 1),
    alpha=st.floats(0, 1),
    lookback=st.integers(1, 6),
)
def test_coupling_hands_out_exactly_the_bonus_of_the_anchors(
    values: list[tuple[float, float]], share: float, alpha: float, lookback: int
) -> None:
    waad, fai = torch.tensor(values, dtype=torch.float64).unbind(1)
    gamma = credit.coupled_rhythm(waad, fai, share=share, alpha=alpha, lookback=lookback)
    assert (gamma - 1).sum().item() == pytest.approx(0.5 * round(share * len(values)))
    assert bool((gamma >= 1 - 1e-12).all())


def test_random_credit_depends_on_the_seed_alone() -> None:
    first = credit.random_tokens(50, torch.Generator().manual_seed(1))
    assert torch.equal(first, credit.random_tokens(50, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, credit.random_tokens(50, torch.Generator().manual_seed(2)))
    assert (first == 1.5).sum() == 20


def test_salient_credit_has_mean_1_and_the_floor() -> None:
    gamma = credit.salient(torch.tensor([-0.2, 0.0, 0.3, 0.1]), floor=0.4)
    torch.testing.assert_close(gamma, torch.tensor([0.4, 0.4, 2.2, 1.0]))
    assert gamma.mean().item() == pytest.approx(1.0)
    assert credit.salient(torch.tensor([-1.0, 0.0])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("strategy", ["none", "local", "global", "coupled", "random", "entropy", "saliency"])
def test_every_strategy_gives_one_factor_per_token(strategy: str) -> None:
    series = [RolloutSeries(WAAD, FAI, WAAD), RolloutSeries(torch.zeros(0), torch.zeros(0), torch.zeros(0))]
    found = gammas(CreditConfig(strategy=strategy), [5, 0], series=series, restored={0: torch.tensor([0.3, 0.1])})
    assert [len(gamma) for gamma in found] == [5, 0]
    expected = {
        "none": [1.0] * 5,
        "local": credit.local_chunk(WAAD).tolist(),
        "global": credit.global_anchor(FAI).tolist(),
        "coupled": credit.coupled_rhythm(WAAD, FAI).tolist(),
        "entropy": credit.high_entropy(WAAD).tolist(),
        "saliency": [1.25, 0.75, 1.0, 1.0, 1.0],
    }
    if strategy != "random":
        assert found[0].tolist() == pytest.approx(expected[strategy])
    assert strategy == "none" or found[0].tolist() != [1.0] * 5


def test_a_missing_input_is_named() -> None:
    with pytest.raises(ValueError, match="'local' strategy needs series"):
        gammas(CreditConfig(strategy="local"), [3])
    with pytest.raises(ValueError, match="'saliency' strategy needs restored values"):
        gammas(CreditConfig(strategy="saliency"), [3])


def test_positive_sign_leaves_negative_advantages_alone() -> None:
    advantages = torch.tensor([2.0, -1.0])
    factors = [torch.tensor([1.5, 1.0]), torch.tensor([1.5])]
    both = weighted_advantages(advantages, factors, 3, "both")
    assert both.tolist() == [[3.0, 2.0, 2.0], [-1.5, -1.0, -1.0]]
    positive = weighted_advantages(advantages, factors, 3, "positive")
    assert positive.tolist() == [[3.0, 2.0, 2.0], [-1.0, -1.0, -1.0]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strategy": "locl"}, "strategy must be one of none, local"),
        ({"gain": 0.0}, "gain must be positive and finite, got 0.0"),
        ({"share": 1.5}, r"share must lie in \[0, 1\], got 1.5"),
        ({"lookback": 0}, "lookback must be at least 1, got 0"),
        ({"sign": "negative"}, "sign must be one of both, positive"),
        ({"series": {"horizon": (5, 2)}}, r"horizon must be two numbers 0 <= low <= high, got \(5, 2\)"),
    ],
)
def test_wrong_settings_are_named(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CreditConfig(**values)


def test_wrong_heads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"head_share must lie in \(0, 0.5\], got 0.6"):
        SeriesConfig(head_share=0.6)
