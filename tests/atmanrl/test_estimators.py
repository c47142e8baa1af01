"""Estimators of token saliency: what each computes, what it costs, and that companions and budgets do not matter."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from atmanrl import ESTIMATORS, MaskConfig, Rollout, estimate_saliency, optimize_masks, saliency_reward
from atmanrl.config import SeriesConfig
from atmanrl.evaluation.interventions import Variant, outcomes
from atmanrl.rhythm.series import attention_series
from atmanrl.saliency import (
    FutureInfluence,
    Gradient,
    Integrated,
    Mask,
    NonFiniteLossError,
    Random,
    ReceivedAttention,
    SparseMask,
    Suppression,
    batches,
    make_estimator,
    substitution_effects,
)
from atmanrl.saliency.leave_one_out import Suffix, similar_tokens, suffix_losses
from atmanrl.saliency.packing import PackedRollouts, whole
from atmanrl.saliency.support import check_model
from tests.atmanrl.tiny_models import random_rollouts, tiny_model

# transformers' norms round to float32, whatever the model's dtype.
TOLERANCE = 1e-7

LENGTHS = [(5, 2, 3), (9, 0, 1), (1, 1, 2), (7, 3, 4)]


def dense_loss(model, rollout, bias, *, ids=None):
    """The answer's mean NLL from one full sequence; ``bias`` (T,) is added to the chain of thought's columns."""
    sequence = torch.tensor([rollout.prompt_ids + rollout.completion_ids]) if ids is None else ids
    length, start, n = sequence.shape[1], len(rollout.prompt_ids), len(rollout.answer_ids)
    mask = torch.zeros(length, length, dtype=model.dtype)
    mask[:, start : start + len(rollout.cot_ids)] += bias.to(model.dtype)
    mask.masked_fill_(torch.ones(length, length).triu(1).bool(), -torch.inf)
    # Its eager attention takes the softmax in float32.
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = model(sequence, attention_mask=mask[None, None]).logits[0, -n - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(rollout.answer_ids)))


@pytest.mark.parametrize("log_factor", [-math.inf, math.log(0.1)])
def test_suppression_from_suffixes_equals_a_full_forward_per_token(log_factor):
    model, rollouts = tiny_model(dtype=torch.float64), random_rollouts(LENGTHS)
    scored = estimate_saliency(model, rollouts, Suppression(log_factor=log_factor))
    for rollout, item in zip(rollouts, scored, strict=True):
        base = dense_loss(model, rollout, torch.zeros(len(rollout.cot_ids)))
        rises = []
        for token in range(len(rollout.cot_ids)):
            bias = torch.zeros(len(rollout.cot_ids), dtype=torch.float64)
            bias[token] = log_factor
            rises.append(dense_loss(model, rollout, bias) - base)
        assert item.scores.tolist() == pytest.approx(rises, abs=TOLERANCE)
        assert item.loss_unmasked == pytest.approx(base, abs=TOLERANCE)


@pytest.mark.parametrize("family", ["mistral window", "gemma3", "qwen3"])
def test_leave_one_out_from_suffixes_counts_windows_through_the_unaltered_run(family):
    model, rollouts = tiny_model(family, torch.float64), random_rollouts(LENGTHS)
    for rollout, item in zip(rollouts, estimate_saliency(model, rollouts, "leave-one-out"), strict=True):
        hidden = [Variant(rollout, row) for row in np.eye(len(rollout.cot_ids), dtype=bool)]
        base, *without = [each.nll for each in outcomes(model, [Variant(rollout), *hidden])]
        # The other path rounds its log-probabilities to float32.
        assert item.scores.tolist() == pytest.approx([nll - base for nll in without], abs=2e-6)


def test_a_substituted_token_is_recomputed_from_its_own_row():
    model, (rollout, *_) = tiny_model(dtype=torch.float64), random_rollouts(LENGTHS)
    losses = suffix_losses(model, [rollout], [Suffix(0, start, token=17) for start in range(5)])
    for start, loss in enumerate(losses.tolist()):
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        ids[0, len(rollout.prompt_ids) + start] = 17
        assert loss == pytest.approx(dense_loss(model, rollout, torch.zeros(5), ids=ids), abs=TOLERANCE)


def test_substitution_effects_are_mean_rises_over_other_tokens_of_the_chain():
    model = tiny_model(dtype=torch.float64)
    # With two kinds of tokens there is one substitute for each, however often it is drawn.
    rollout, constant = Rollout((1, 2, 3), (10, 11, 11), (5, 6), (4,)), Rollout((1, 2, 3), (10, 10), (5,))
    effects, none = substitution_effects(model, [rollout, constant], draws=2)
    base = dense_loss(model, rollout, torch.zeros(3))
    for place, other in enumerate((11, 10, 10)):
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        ids[0, 3 + place] = other
        rise = dense_loss(model, rollout, torch.zeros(3), ids=ids) - base
        assert float(effects[place]) == pytest.approx(rise, abs=TOLERANCE)
    assert none.tolist() == pytest.approx([0, 0], abs=TOLERANCE)


def test_conceptual_suppression_hides_every_similar_token_at_once():
    model = tiny_model(dtype=torch.float64)
    rollout = Rollout((1, 2, 3), (10, 11, 10, 12, 11), (5, 6), (4,))
    groups = similar_tokens(model, rollout, 0.999)
    assert groups == ((0, 2), (1, 4), (0, 2), (3,), (1, 4))
    (item,) = estimate_saliency(model, [rollout], Suppression(similarity=0.999))
    base = dense_loss(model, rollout, torch.zeros(5))
    expected = []
    for group in groups:
        bias = torch.zeros(5)
        bias[list(group)] = -torch.inf
        expected.append(dense_loss(model, rollout, bias) - base)
    assert item.scores.tolist() == pytest.approx(expected, abs=TOLERANCE)


def test_gradient_is_the_slope_of_the_loss_in_each_column():
    model, (rollout, *_) = tiny_model(dtype=torch.float64), random_rollouts(LENGTHS)
    (item,) = estimate_saliency(model, [rollout], "gradient")
    for token in range(5):
        step = torch.zeros(5, dtype=torch.float64)
        step[token] = 0.003
        slope = (dense_loss(model, rollout, step) - dense_loss(model, rollout, -step)) / 0.006
        assert float(item.scores[token]) == pytest.approx(-slope, rel=2e-3, abs=1e-5)


def test_integrated_scores_sum_to_what_suppression_adds_to_the_loss():
    model, rollouts = tiny_model(dtype=torch.float64), random_rollouts(LENGTHS)
    for item in estimate_saliency(model, rollouts, Integrated(depth=-3.0, steps=20)):
        assert float(item.scores.sum()) == pytest.approx(item.loss_initial - item.loss_unmasked, rel=1e-2)


def test_mask_is_optimize_masks():
    model, rollouts = tiny_model(), random_rollouts(LENGTHS)
    config = MaskConfig(steps=5)
    for item, expected in zip(
        estimate_saliency(model, rollouts, Mask(config)), optimize_masks(model, rollouts, config), strict=True
    ):
        torch.testing.assert_close(item.scores, expected.restored)
        assert (item.loss_initial, item.loss_final) == pytest.approx((expected.loss_initial, expected.loss_final))


def test_sparse_mask_keeps_to_its_box_and_lowers_its_objective():
    model, rollouts = tiny_model(), random_rollouts(LENGTHS)
    estimator = SparseMask(depth=-4.0, sparsity=0.01, steps=25, lr=0.05, record_every=10)
    for rollout, item in zip(rollouts, estimate_saliency(model, rollouts, estimator), strict=True):
        masks = item.trajectory.scores
        assert item.trajectory.steps.tolist() == [0, 10, 20, 25]
        assert ((masks >= 0) & (masks <= 1)).all()
        assert masks[0].tolist() == [1.0] * len(rollout.cot_ids)
        loss = dense_loss(model, rollout, -4.0 * (1 - masks[-1]))
        assert loss == pytest.approx(item.loss_final, abs=1e-4)
        before = item.loss_initial + 0.01 * len(rollout.cot_ids)
        assert item.loss_final + 0.01 * float(masks[-1].sum()) <= before + 1e-6


def test_a_step_of_the_sparse_mask_goes_down_the_gradient_over_its_largest_magnitude():
    model, (rollout, *_) = tiny_model(dtype=torch.float64), random_rollouts([(9, 1, 2)])
    (item,) = estimate_saliency(
        model, [rollout], SparseMask(depth=-4.0, sparsity=0.01, steps=3, lr=0.3, record_every=1)
    )

    def gradient(mask):
        step = 3e-3 * torch.eye(9, dtype=torch.float64)
        slopes = [
            dense_loss(model, rollout, -4 * (1 - mask - e)) - dense_loss(model, rollout, -4 * (1 - mask + e))
            for e in step
        ]
        return torch.tensor(slopes, dtype=torch.float64) / 6e-3 + 0.01

    for now, after in itertools.pairwise(item.trajectory.scores):
        slope = gradient(now)
        # The idle token's gradient is the price.
        steepest = slope.abs().max().clamp(min=0.01)
        torch.testing.assert_close(after, (now - 0.3 * slope / steepest).clamp(0, 1), atol=1e-3, rtol=0)


def test_sparse_mask_scores_tokens_that_the_answer_cannot_see_at_zero():
    # Three layers with a window of 7 reach 18 tokens back from the row that predicts the answer, the chain's last.
    model, rollouts = tiny_model("mistral window"), random_rollouts([(40, 0, 1), (4, 0, 1)])
    far, near = estimate_saliency(model, rollouts, SparseMask())
    assert far.scores[:21].tolist() == pytest.approx([0.0] * 21, abs=1e-6)
    assert far.scores[21:].abs().max() > 0.1
    assert near.scores.abs().max() > 0.1
    assert torch.equal(far.restored, far.scores.clamp(min=0))


def test_received_attention_is_that_of_the_eager_maps():
    model, rollouts = tiny_model(), random_rollouts(LENGTHS)
    for rollout, item in zip(rollouts, estimate_saliency(model, rollouts, "attention"), strict=True):
        model.set_attn_implementation("eager")
        with torch.no_grad():
            maps = model(torch.tensor([rollout.prompt_ids + rollout.completion_ids]), output_attentions=True).attentions
        start, n = len(rollout.prompt_ids), len(rollout.answer_ids)
        columns = torch.stack(maps)[:, 0, :, -n - 1 : -1, start : start + len(rollout.cot_ids)]
        torch.testing.assert_close(item.scores, columns.mean((0, 1, 2)), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral window"])
def test_fai_is_the_series_of_each_rollout_alone(family):
    # The series is held against eager maps in test_attention_series.py; the answer's last token has no row here.
    model, rollouts, config = tiny_model(family), random_rollouts(LENGTHS), SeriesConfig(horizon=(1, 4))
    for rollout, item in zip(rollouts, estimate_saliency(model, rollouts, FutureInfluence(config)), strict=True):
        (series,) = attention_series(model, [rollout.prompt_ids], [rollout.completion_ids[:-1]], config)
        torch.testing.assert_close(item.scores, series.fai[: len(rollout.cot_ids)], atol=1e-6, rtol=1e-4)
        assert item.scores.max() > 0


@pytest.mark.parametrize("name", ESTIMATORS)
def test_scores_depend_on_neither_companions_nor_budget(name):
    model, rollouts = tiny_model(), random_rollouts(LENGTHS)
    estimator = Mask(MaskConfig(steps=3)) if name == "mask" else make_estimator(name)
    together = estimate_saliency(model, rollouts, estimator)
    for rows in (1, 17):
        for a, b in zip(together, estimate_saliency(model, rollouts, estimator, token_budget=rows), strict=True):
            torch.testing.assert_close(a.scores, b.scores, atol=2e-4, rtol=1e-3)
    (alone,) = estimate_saliency(model, rollouts[1:2], estimator)
    torch.testing.assert_close(alone.scores, together[1].scores, atol=2e-4, rtol=1e-3)


def watch_rows(model):
    """The packed rows of every forward that takes a gradient, listed as the model runs."""
    rows = []

    def watch(module, args, kwargs, output):
        if output.logits.requires_grad:
            rows.append(kwargs["input_ids"].shape[1])

    model.register_forward_hook(watch, with_kwargs=True)
    return rows


def test_the_general_path_packs_what_fits_the_free_memory(monkeypatch):
    model, rollouts = tiny_model("gemma3"), random_rollouts([(9, 2, 3)] * 6, per_prompt=1)
    plenty = estimate_saliency(model, rollouts, "gradient")
    rows = watch_rows(model)
    estimate_saliency(model, rollouts, "gradient")
    probe, *packed = rows
    assert packed == [6 * probe]
    monkeypatch.setattr(batches, "free_bytes", lambda device: 4 * batches.kept_bytes_of(model, whole(rollouts[0])))
    rows.clear()
    scarce = estimate_saliency(model, rollouts, "gradient")
    assert len(rows) > 4
    assert max(rows) <= 2 * probe
    for a, b in zip(plenty, scarce, strict=True):
        torch.testing.assert_close(a.scores, b.scores, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gradient", "attention", "leave-one-out"])
def test_where_memory_runs_out_half_of_the_batch_is_tried(monkeypatch, name):
    model, rollouts = tiny_model(), random_rollouts(LENGTHS)
    expected = estimate_saliency(model, rollouts, name)
    rows = []

    def short_of_memory(packed, nll):
        rows.append(packed.n_rows)
        if len(rows) == 1:
            raise torch.OutOfMemoryError("no room")
        return whole(packed, nll)

    whole = PackedRollouts.mean_per_rollout
    monkeypatch.setattr(PackedRollouts, "mean_per_rollout", short_of_memory)
    found = estimate_saliency(model, rollouts, name)
    assert max(rows[1:]) < rows[0]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.scores, b.scores, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "estimator",
    [
        Mask(MaskConfig(steps=4)),
        SparseMask(),
        Integrated(steps=3),
        Gradient(),
        Suppression(),
        Suppression(log_factor=-2.3),
        ReceivedAttention(),
        FutureInfluence(),
        Random(),
    ],
    ids=repr,
)
def test_stated_passes_are_the_rows_that_the_model_runs(estimator):
    # This family takes the general path, where every row goes through the module that is watched.
    model, (rollout,) = tiny_model("gemma3"), random_rollouts([(9, 2, 3)])
    forward, backward = [], []

    def watch(module, args, kwargs, output):
        rows = kwargs["input_ids"].shape[1]
        forward.append(rows)
        if output.logits.requires_grad:
            output.logits.register_hook(lambda grad: backward.append(rows))

    # Once per model, before anything is computed.
    check_model(model)
    handle = model.register_forward_hook(watch, with_kwargs=True)
    # Without a budget the general path first probes what it keeps for a backward.
    estimate_saliency(model, [rollout], estimator, token_budget=1000)
    handle.remove()
    rows = len(rollout.completion_ids) - 1
    passes = estimator.passes(rollout)
    prompt = len(rollout.prompt_ids) if passes.forward else 0
    assert sum(forward) == pytest.approx(prompt + passes.forward * rows)
    assert sum(backward) == pytest.approx(passes.backward * rows)
    assert passes.total == passes.forward + passes.backward


def test_the_unaltered_run_is_computed_once_however_many_batches_its_variants_take():
    model, (rollout,) = tiny_model("gemma3"), random_rollouts([(9, 2, 3)])
    rows = []
    check_model(model)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    estimate_saliency(model, [rollout], "leave-one-out", token_budget=40)
    assert len(rows) > 3
    own = len(rollout.completion_ids) - 1
    assert sum(rows) == pytest.approx(
        len(rollout.prompt_ids) + make_estimator("leave-one-out").passes(rollout).forward * own
    )


def test_scores_in_nats_become_shares_of_the_probability_that_a_token_carries():
    model, rollouts = tiny_model(), random_rollouts(LENGTHS)
    for rollout, item in zip(rollouts, estimate_saliency(model, rollouts, "leave-one-out"), strict=True):
        hidden = [Variant(rollout, row) for row in np.eye(len(rollout.cot_ids), dtype=bool)]
        whole, *others = [each.probability for each in outcomes(model, [Variant(rollout), *hidden])]
        expected = [max(0.0, 1 - other / whole) for other in others]
        assert item.restored.tolist() == pytest.approx(expected, abs=1e-4)
        assert float(saliency_reward([item], reduction="tokens")) == pytest.approx(np.mean(expected), abs=1e-4)


def test_rollouts_without_a_chain_or_an_answer_are_skipped_and_earn_nothing():
    model, (rollout, *_) = tiny_model(), random_rollouts(LENGTHS)
    empty = [replace(rollout, cot_ids=()), rollout, replace(rollout, answer_ids=())]
    with pytest.warns(UserWarning, match=r"2 of 3 rollouts get no scores \(rollout 0: empty chain of thought\)"):
        scored = estimate_saliency(model, empty, "gradient")
    assert [item.skipped for item in scored] == ["empty chain of thought", None, "empty answer"]
    assert saliency_reward(scored).tolist()[::2] == [0.0, 0.0]
    assert scored[1].scores.abs().max() > 0


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "random"])
def test_a_rollout_that_is_not_finite_is_named_by_its_place_among_all(name):
    model, rollouts = tiny_model(), random_rollouts([(5, 1, 2), (6, 1, 2)], per_prompt=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = torch.nan
    broken = replace(rollouts[1], cot_ids=(0, *rollouts[1].cot_ids[1:]))
    with (
        pytest.warns(UserWarning, match="1 of 3 rollouts get no scores"),
        pytest.raises(NonFiniteLossError, match="rollout 2 is nan") as raised,
    ):
        estimate_saliency(model, [replace(rollouts[0], cot_ids=()), rollouts[0], broken], name)
    assert raised.value.rollout == 2


def test_the_model_is_given_back_as_it_was():
    model, rollouts = tiny_model().train(), random_rollouts(LENGTHS)
    for name in ("leave-one-out", "sparse-mask", "attention"):
        estimate_saliency(model, rollouts, name)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_random_scores_differ_by_seed_and_rollout_and_repeat():
    model, rollouts = tiny_model(), random_rollouts([(6, 0, 1)] * 2)
    first, second = estimate_saliency(model, rollouts, Random(1))
    assert not torch.equal(first.scores, second.scores)
    assert torch.equal(first.scores, estimate_saliency(model, rollouts, Random(1))[0].scores)
    assert not torch.equal(first.scores, estimate_saliency(model, rollouts, Random(2))[0].scores)


def test_names_are_those_of_the_estimators_and_a_wrong_one_is_answered_with_the_nearest():
    assert all(make_estimator(name).name == name for name in ESTIMATORS)
    assert make_estimator("best").name in ESTIMATORS
    with pytest.raises(ValueError, match=r"unknown estimator 'leave-one-aut'.*did you mean 'leave-one-out'\?"):
        make_estimator("leave-one-aut")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Suppression(log_factor=0.1), "log_factor must be negative, got 0.1"),
        (lambda: Suppression(similarity=2), r"similarity must lie in \[-1, 1\], got 2"),
        (lambda: Integrated(depth=1.0), "depth must be negative, got 1.0"),
        (lambda: Integrated(steps=0), "steps must be at least 1, got 0"),
        (lambda: SparseMask(depth=0.0), "depth must be negative, got 0.0"),
        (lambda: SparseMask(sparsity=0.0), "need steps >= 1, lr > 0 and sparsity > 0, got 9, 0.3 and 0.0"),
        (lambda: SparseMask(lr=-1.0), "need steps >= 1, lr > 0 and sparsity > 0"),
    ],
)
def test_settings_out_of_range_are_refused_with_the_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_budget_below_one_and_a_rollout_beyond_the_context_are_refused():
    model, rollouts = tiny_model(), random_rollouts([(90, 2, 3)])
    with pytest.raises(ValueError, match="token_budget must be at least 1, got 0"):
        estimate_saliency(model, rollouts, "gradient", token_budget=0)
    with pytest.raises(ValueError, match="rollout 0 has 101 tokens"):
        estimate_saliency(model, rollouts, "gradient")
