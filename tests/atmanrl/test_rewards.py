"""The saliency reward of Eq. 3, in both directions and both reductions."""

from __future__ import annotations

import pytest
import torch

from atmanrl import Rollout, saliency_reward
from atmanrl.saliency import TokenScores


def _item(restored, *, marker=1, answer=2, skipped=None):
    scores = torch.tensor(restored, dtype=torch.float32)
    rollout = Rollout([1, 2], [3] * len(restored), [4] * answer, [5] * marker)
    return TokenScores("mask", rollout, scores, scores, skipped=skipped)


def test_causal_weights_are_the_mean_over_eq_3s_lower_triangle():
    item = _item([0.0, 0.5, 0.25])
    length, prompt = len(item.rollout), 2
    # Eq. 3 written out: the mean of Hhat over the entries (w, v) with v a CoT column and v <= w <= last answer token.
    seen = [(w, v) for w in range(length) for v in range(prompt, prompt + 3) if v <= w]
    printed = sum(float(item.normalized[v - prompt]) for _, v in seen) / len(seen)
    assert saliency_reward([item], "printed").tolist() == pytest.approx([printed])
    assert saliency_reward([item]).tolist() == pytest.approx([1 - printed])


def test_tokens_reduction_is_the_plain_mean():
    item = _item([0.0, 0.5, 0.25])
    assert saliency_reward([item], "restored", "tokens").tolist() == pytest.approx([0.25])
    assert saliency_reward([item], "printed", "tokens").tolist() == pytest.approx([0.75])


@pytest.mark.parametrize("reduction", ["causal", "tokens"])
def test_directions_sum_to_one_and_an_untouched_mask_restores_nothing(reduction):
    items = [_item([0.1, 0.9]), _item([0.0] * 4, marker=0, answer=1), _item([-0.2])]
    restored, printed = (saliency_reward(items, direction, reduction) for direction in ("restored", "printed"))
    torch.testing.assert_close(restored + printed, torch.ones(3))
    assert restored[1] == pytest.approx(0.0, abs=1e-6)
    assert restored[2] == pytest.approx(-0.2)


@pytest.mark.parametrize("direction", ["restored", "printed"])
def test_a_skipped_rollout_earns_zero_in_both_directions(direction):
    rewards = saliency_reward(
        [_item([], skipped="empty chain of thought"), _item([0.0], skipped="empty answer")], direction
    )
    assert rewards.tolist() == [0.0, 0.0]
    assert rewards.dtype == torch.float32


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"unknown direction 'up'.*restored.*printed"):
        saliency_reward([], "up")
    with pytest.raises(ValueError, match=r"unknown reduction 'sum'.*causal.*tokens"):
        saliency_reward([], reduction="sum")
