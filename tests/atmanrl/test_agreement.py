import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atmanrl.evaluation.summary import auroc, precision_at_k, spearman

scores = st.lists(st.integers(-3, 3), min_size=2, max_size=12)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 400], 1),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1),
        # Without ties 1 - 6 sum d^2 / (n (n^2 - 1)), here 1 - 6 * 6 / 60.
        ([1, 2, 3, 4], [2, 1, 4, 3], 0.6),
        ([86, 97, 99, 100, 101, 103, 106, 110, 112, 113], [2, 20, 28, 27, 50, 29, 7, 17, 6, 12], -29 / 165),
    ],
)
def test_spearman_of_known_pairs(a, b, expected):
    assert spearman(a, b) == pytest.approx(expected)


@given(scores, st.data())
def test_auroc_is_the_share_of_rightly_ordered_pairs(values, data):
    truth = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    pairs = [(x > y) + 0.5 * (x == y) for (x, t), (y, f) in product(zip(values, truth, strict=True), repeat=2) if t > f]
    expected = np.mean(pairs) if pairs else math.nan
    assert auroc(values, truth) == pytest.approx(expected, nan_ok=True)


def test_precision_counts_the_true_tokens_on_top():
    assert precision_at_k([0.9, 0.1, 0.8, 0.2], [1, 1, 0, 0]) == 0.5
    assert precision_at_k([0.9, 0.1, 0.8, 0.2], [1, 1, 0, 0], k=1) == 1


def test_a_tie_at_the_border_counts_its_share():
    assert precision_at_k([1, 1, 1, 1], [1, 0, 0, 0]) == 0.25
    assert precision_at_k([2, 1, 1, 0], [1, 1, 0, 0]) == 0.75


@pytest.mark.parametrize("function", [spearman, auroc, precision_at_k])
def test_what_is_undefined_is_nan(function):
    assert math.isnan(function([1.0, 2.0], [0, 0]))


def test_lengths_and_k_must_fit():
    with pytest.raises(ValueError, match="one length"):
        spearman([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="k is 3, but there are 2 tokens"):
        precision_at_k([1, 2], [1, 0], k=3)
