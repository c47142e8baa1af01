import json
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest

from atmanrl.evaluation.records import MaskLoss, Run
from atmanrl.evaluation.summary import bootstrap_ratios, compare, estimates, summarize
from tests.atmanrl.saliency_runs import rollout, run


def percentile_interval(values, weights, confidence=0.95):
    """The exact percentile interval of a discrete distribution, by its cumulative weights."""
    order = np.argsort(values)
    cumulative = np.cumsum(np.asarray(weights)[order])
    tail = (1 - confidence) / 2
    return [np.asarray(values)[order][np.searchsorted(cumulative, q)] for q in (tail, 1 - tail)]


def test_the_interval_is_that_of_all_resamples():
    numerators, denominators = np.array([1.0, 5.0, 2.0, 9.0, 4.0]), np.array([2.0, 4.0, 1.0, 6.0, 5.0])
    everything = [list(draw) for draw in product(range(5), repeat=5)]
    ratios = [numerators[draw].sum() / denominators[draw].sum() for draw in everything]
    exact = percentile_interval(ratios, np.full(len(ratios), 1 / len(ratios)))
    replicates = bootstrap_ratios(numerators[:, None], denominators[:, None], resamples=40_000, seed=3)
    (estimate,) = estimates(np.array([21 / 18]), replicates, n=5)
    assert estimate.value == pytest.approx(21 / 18)
    assert [estimate.low, estimate.high] == pytest.approx(exact, rel=0.01)


def test_the_interval_of_a_mean_has_the_normal_width():
    values = np.random.default_rng(0).normal(size=(400, 1))
    replicates = bootstrap_ratios(values, np.ones_like(values), seed=1)
    (estimate,) = estimates(values.mean(0), replicates, n=400)
    half_width = 1.96 * values.std() / np.sqrt(400)
    assert estimate.high - estimate.low == pytest.approx(2 * half_width, rel=0.04)


def test_equal_seeds_give_equal_intervals_and_other_seeds_others():
    runs = run(*(rollout(f"p{i}", restored=(i / 40, 0.1, 0.2)) for i in range(20)))
    assert summarize(runs, seed=1) == summarize(runs, seed=1)
    assert summarize(runs, seed=1)["restored_mean"] != summarize(runs, seed=2)["restored_mean"]


def test_a_difference_is_paired_over_prompts():
    lengths = range(1, 41)
    before = run(*(rollout(f"p{n}", texts=["x"] * (n + 3), restored=None) for n in lengths))
    after = run(*(rollout(f"p{n}", texts=["x"] * n, restored=None) for n in lengths), label="after")
    row = compare(before, after)["cot_tokens"]
    assert row.difference.value == -3
    # Every prompt lost three tokens: resampling whole pairs leaves no spread, though the lengths themselves vary.
    assert [row.difference.low, row.difference.high] == pytest.approx([-3, -3])
    assert row.runs[0].high - row.runs[0].low > 5


def test_the_prompt_and_not_the_completion_is_resampled():
    samples = [rollout(f"p{i}", sample=s, correct=i % 2 == 0) for i in range(16) for s in range(8)]
    row = summarize(run(*samples))["accuracy"]
    alone = summarize(run(*(item for item in samples if item.sample == 0)))["accuracy"]
    assert (row.runs[0].low, row.runs[0].high) == (alone.runs[0].low, alone.runs[0].high)


def test_numbers_of_a_run_by_hand():
    first = rollout(
        "p0", texts=list("abcd"), restored=(0.4, 0.1, 0.0, 0.3), classes=["needed", "filler", "filler", "other"]
    )
    second = rollout("p1", texts=list("ab"), restored=(0.2, 0.2), classes=["needed", "other"], correct=False)
    third = rollout(
        "p2", texts=list("abc"), restored=None, classes=["filler"] * 3, correct=False, predicted=None, truncated=True
    )
    summary = summarize(run(first, second, third))
    values = {row.name: row.runs[0].value for row in summary.rows}
    assert values == pytest.approx(
        {
            "accuracy": 1 / 3,
            "cot_tokens": 3,
            "needed_tokens": 2 / 3,
            "filler_tokens": 5 / 3,
            "other_tokens": 2 / 3,
            "truncated": 1 / 3,
            "unanswered": 1 / 3,
            "restored_mean": 1.2 / 6,
            "restored_needed": 0.3,
            "restored_filler": 0.05,
            "restored_other": 0.25,
            # The rollout without a mask is not one with a mass of 0.
            "restored_mass": 0.6,
            "saturated": 0,
            # The first finds its needed token, the second ties it with another; the third has no scores.
            "restored_auroc": (1 + 0.5) / 2,
            "restored_precision": (1 + 0.5) / 2,
        }
    )
    assert (summary.prompts, summary.rollouts) == (3, 3)


def test_pass_at_k_is_the_chance_that_k_drawn_completions_hold_a_correct_one():
    right = {"p0": 0, "p1": 1, "p2": 3, "p3": 6}
    items = [rollout(prompt, sample=s, correct=s < correct) for prompt, correct in right.items() for s in range(6)]
    rows = {row.name: row for row in summarize(run(*items)).rows}
    assert [name for name in rows if name.startswith("pass")] == ["pass_at_2", "pass_at_4", "pass_at_6"]
    for k in (2, 4, 6):
        draws = list(combinations(range(6), k))
        chances = [sum(min(draw) < correct for draw in draws) / len(draws) for correct in right.values()]
        assert rows[f"pass_at_{k}"].runs[0].value == pytest.approx(sum(chances) / len(chances))


def test_pass_at_n_asks_for_one_correct_answer_among_all_samples():
    verdicts = {"p0": [True, False], "p1": [False, False], "p2": [True, True], "p3": [False, True]}
    items = [rollout(name, sample=i, correct=v) for name, each in verdicts.items() for i, v in enumerate(each)]
    summary = summarize(run(*items))
    assert summary["pass_at_2"].runs[0].value == 0.75
    assert summary["accuracy"].runs[0].value == 0.5
    assert "pass_at_1" not in [row.name for row in summarize(run(*items[:1])).rows]
    assert compare(run(*items), run(*items, label="after"))["pass_at_2"].difference.value == 0


def test_measures_are_means_over_the_completions_that_have_them():
    values = [{"causal_influence": 0.2, "filler_unchanged": 1.0}, {"causal_influence": 0.4}, {}]
    summary = summarize(run(*(rollout(f"p{i}", measures=value) for i, value in enumerate(values))))
    assert summary["causal_influence"].runs[0].value == pytest.approx(0.3)
    assert (summary["filler_unchanged"].label, summary["filler_unchanged"].unit) == ("filler unchanged", "%")


def test_masks_with_nothing_to_restore_are_counted_and_said():
    effective = rollout("p0")
    saturated = [replace(rollout(f"p{i}"), loss=MaskLoss(0.002, 0.001, 0.001)) for i in range(1, 4)]
    summary = summarize(run(effective, *saturated))
    assert summary["saturated"].runs[0].value == 0.75
    assert summary.warning.startswith("In 75% (before) of the completions the initial mask leaves")
    assert summarize(run(effective)).warning == ""


def test_a_class_that_never_occurs_has_no_mean_and_no_interval():
    before = run(*(rollout(f"p{i}", classes=["needed", "filler", "other"]) for i in range(3)))
    after = run(*(rollout(f"p{i}", classes=["needed", "other", "other"]) for i in range(3)), label="after")
    row = compare(before, after)["restored_filler"]
    assert row.runs[1].value is row.runs[1].low is row.difference.value is row.difference.low is None
    assert row.runs[0].value == pytest.approx(0.4)


def test_one_prompt_gives_values_without_intervals():
    row = summarize(run(rollout(), rollout(sample=1, correct=False)))["accuracy"]
    assert (row.runs[0].value, row.runs[0].low, row.runs[0].high) == (0.5, None, None)


def test_ungraded_completions_have_no_accuracy():
    assert "accuracy" not in [row.name for row in summarize(run(rollout(correct=None))).rows]


def test_what_cannot_be_summarised_is_refused():
    with pytest.raises(ValueError, match="'empty' holds no rollouts"):
        summarize(Run("empty", ()))
    other = Run("after", run(rollout()).rollouts, score="deletion")
    with pytest.raises(ValueError, match=r"scored by 'restored'.*by 'deletion'"):
        compare(run(rollout()), other)


def test_a_saved_summary_holds_every_number(tmp_path):
    runs = [run(*(rollout(f"p{i}", correct=i > right) for i in range(9)), label=str(right)) for right in (5, 2)]
    summary = compare(*runs)
    summary.save(tmp_path / "summary.json")
    data = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    accuracy = next(row for row in data["rows"] if row["name"] == "accuracy")
    assert accuracy["difference"]["value"] == pytest.approx(1 / 3)
    assert accuracy["difference"]["low"] == summary["accuracy"].difference.low
    assert (data["labels"], data["prompts"], data["confidence"]) == (["5", "2"], 9, 0.95)
