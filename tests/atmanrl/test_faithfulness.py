from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from atmanrl import Rollout, estimate_saliency
from atmanrl.evaluation.faithfulness import (
    added_mistakes,
    early_answering,
    filler_substitution,
    score_curves,
)
from atmanrl.evaluation.interventions import Variant, answer_log_probabilities, outcomes
from atmanrl.saliency import batches
from atmanrl.tasks.ledger import CHECKPOINT

PROMPT = "a 6 c 0 b 6 e 8 d 4 ? c b e <cot>"
CHAINS = ["c 0 . . b 6 ~ d 4 e 8", "c 0 b 6 e 8", "c 0 , a 6 b 6 ; ; e 8", "c 0 ~ b 6 . e 8"]
NEEDED_VALUE_AT = [[1, 5, 10], [1, 3, 5], [1, 6, 10], [1, 4, 7]]
FILLER_AT = [[2, 3, 6], [], [2, 7, 8], [2, 5]]


@pytest.fixture(scope="module")
def ledger():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)

    def encode(text):
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    rollouts = [
        Rollout(tuple(tokenizer.encode(PROMPT)), encode(chain), encode("c 0 b 6 e 8"), encode("<ans>"))
        for chain in CHAINS
    ]
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT).eval(), rollouts, encode


def eager_log_probabilities(model, variant):
    """The same from one full sequence with a dense mask."""
    rollout = variant.rollout
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    length = ids.shape[1]
    seen = torch.ones(length, length).tril().bool()
    for i, hidden in enumerate(variant.hidden if variant.hidden is not None else []):
        if hidden:
            seen[:, len(rollout.prompt_ids) + i] = False
    mask = torch.zeros(length, length).masked_fill(~seen, -torch.inf)[None, None]
    n = len(rollout.answer_ids)
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits[0, -n - 1 : -1].log_softmax(-1)


def test_log_probabilities_are_those_of_a_dense_mask(ledger):
    model, rollouts, _ = ledger
    hidden = np.array([False, True, False, True, True, False])
    variants = [
        Variant(rollouts[1]),
        Variant(rollouts[1], hidden),
        Variant(rollouts[1], ~np.zeros(6, bool)),
        Variant(replace(rollouts[0], cot_ids=())),
        Variant(replace(rollouts[2], cot_ids=(), marker_ids=())),
    ]
    model.set_attn_implementation("eager")
    expected = [eager_log_probabilities(model, variant) for variant in variants]
    model.set_attn_implementation("sdpa")
    for got, want in zip(answer_log_probabilities(model, variants), expected, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_a_variant_does_not_depend_on_its_batch(ledger):
    model, rollouts, _ = ledger
    variants = [Variant(rollout, np.arange(len(rollout.cot_ids)) == i) for rollout in rollouts for i in range(3)]
    together, alone = (outcomes(model, variants, rows=rows) for rows in (10_000, 1))
    assert [x.nll for x in together] == pytest.approx([x.nll for x in alone], rel=1e-4, abs=1e-6)


def sizes_of_batches(monkeypatch, fails_above=None):
    sizes = []
    original = batches.pack

    def packed(segments, **options):
        sizes.append(len(segments))
        if fails_above is not None and len(segments) > fails_above:
            raise torch.OutOfMemoryError("no room")
        return original(segments, **options)

    monkeypatch.setattr(batches, "pack", packed)
    return sizes


def test_where_memory_runs_out_half_of_the_rows_are_tried_and_kept(ledger, monkeypatch):
    model, rollouts, _ = ledger
    variants = [Variant(rollouts[1])] * 8
    expected = outcomes(model, variants)
    own, prompt = len(rollouts[1].completion_ids) - 1, len(rollouts[1].prompt_ids)
    # Six and their prompt; half of it holds the prompt and two.
    rows = 6 * own + prompt
    assert 2 * own + prompt <= rows // 2 < 3 * own + prompt
    sizes = sizes_of_batches(monkeypatch, fails_above=2)
    assert [x.nll for x in outcomes(model, variants, rows=rows)] == pytest.approx([x.nll for x in expected], rel=1e-4)
    assert sizes == [6, 2, 2, 2, 2]
    sizes = sizes_of_batches(monkeypatch, fails_above=0)
    with pytest.raises(torch.OutOfMemoryError):
        outcomes(model, variants, rows=rows)


@pytest.mark.parametrize("intervene", [early_answering, lambda m, r: estimate_saliency(m, r, "leave-one-out")])
def test_interventions_keep_to_the_free_memory(ledger, monkeypatch, intervene):
    model, rollouts, _ = ledger
    sizes = sizes_of_batches(monkeypatch)
    counts = []
    for free in (2**32, 2**18):
        monkeypatch.setattr("atmanrl.saliency.batches.free_bytes", lambda device, free=free: free)
        intervene(model, rollouts)
        counts.append(len(sizes))
        sizes.clear()
    assert counts[0] == 1
    assert counts[1] > 1


def test_the_model_is_given_back_as_it_was(ledger):
    model, rollouts, _ = ledger
    outcomes(model, [Variant(rollouts[0])])
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_mistake_in_a_needed_value_changes_the_answer_and_one_in_filler_does_not(ledger):
    model, rollouts, encode = ledger
    values = [encode(value)[0] for value in "03579"]
    needed = added_mistakes(model, rollouts, NEEDED_VALUE_AT, values, draws=4)
    idle = added_mistakes(model, rollouts, FILLER_AT, [encode(",")[0], encode(";")[0]], draws=4)
    assert [len(each) for each in needed] == [4, 4, 4, 4]
    assert not any(outcome.unchanged for each in needed for outcome in each)
    # The second chain holds no filler: there is nothing to change.
    assert [len(each) for each in idle] == [4, 0, 4, 4]
    assert all(outcome.unchanged for each in idle for outcome in each)
    itself = added_mistakes(model, rollouts[1:2], [[1]], [rollouts[1].cot_ids[1]])
    assert itself == [[]]


def test_curves_share_their_ends_and_the_best_order_beats_random_ones(ledger):
    model, rollouts, _ = ledger
    curves = score_curves(
        model, rollouts, [item.scores for item in estimate_saliency(model, rollouts, "leave-one-out")]
    )
    for curve in curves:
        assert curve.deletion[0] == pytest.approx(curve.insertion[-1], rel=1e-4)
        assert curve.deletion[-1] == pytest.approx(curve.insertion[0], rel=1e-4)
        assert curve.deletion[0] == pytest.approx(curve.random_deletion[0], rel=1e-4)
    better = [c.comprehensiveness - c.random_comprehensiveness for c in curves]
    assert np.mean(better) > 0.1
    assert np.mean([c.random_sufficiency - c.sufficiency for c in curves]) > 0.1


def test_random_orders_follow_the_seed(ledger):
    model, rollouts, _ = ledger
    scores = [np.zeros(len(rollout.cot_ids)) for rollout in rollouts[:1]]
    first, again, other = (
        score_curves(model, rollouts[:1], scores, seed=seed, draws=2)[0].random_deletion for seed in (1, 1, 2)
    )
    assert first.tolist() == again.tolist() != other.tolist()


def test_an_early_answer_needs_the_chain_of_thought(ledger):
    model, rollouts, _ = ledger
    for early in early_answering(model, rollouts, fractions=(0, 0.5, 1)):
        assert early.unchanged.tolist() == [False, False, True]
        assert early.area_over_curve == 1
        assert early.divergence[-1] == pytest.approx(0, abs=1e-6)
        assert 0 < early.causal_influence <= np.log(2)


def test_filler_in_place_of_the_chain_of_thought_makes_every_answer_less_likely_and_changes_most(ledger):
    model, rollouts, encode = ledger
    before = outcomes(model, [Variant(rollout) for rollout in rollouts])
    after = filler_substitution(model, rollouts, encode(". ~"))
    assert all(b.probability < 0.9 * a.probability for a, b in zip(before, after, strict=True))
    assert sum(not outcome.unchanged for outcome in after) > len(rollouts) / 2


def test_filler_substitution_scores_the_answer_after_the_filler_repeated_to_the_chains_length(ledger):
    model, rollouts, encode = ledger
    written_out = [
        replace(rollout, cot_ids=(encode(". ~") * len(rollout.cot_ids))[: len(rollout.cot_ids)]) for rollout in rollouts
    ]
    after = filler_substitution(model, rollouts, encode(". ~"))
    assert after == outcomes(model, [Variant(rollout) for rollout in written_out])


def test_an_unaltered_answer_is_unchanged_and_likely(ledger):
    model, rollouts, _ = ledger
    for outcome in outcomes(model, [Variant(rollout) for rollout in rollouts]):
        assert outcome.unchanged
        assert outcome.probability > 0.9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, r: outcomes(m, [Variant(replace(r, answer_ids=()))]), "without an answer"),
        (lambda m, r: outcomes(m, [Variant(r, np.zeros(2, bool))]), r"hidden has shape \(2,\)"),
        (lambda m, r: score_curves(m, [r], [[1.0]]), r"scores have shape \(1,\)"),
        (lambda m, r: score_curves(m, [r], [[0.0] * 11], fractions=(0.1, 0.5, 1)), "ascend from 0 to 1"),
        (lambda m, r: filler_substitution(m, [r], []), "filler_ids is empty"),
        (lambda m, r: outcomes(m, [Variant(replace(r, prompt_ids=(1,), cot_ids=()))]), "leave no prefix"),
    ],
)
def test_interventions_that_make_no_sense_are_refused(ledger, call, message):
    model, rollouts, _ = ledger
    with pytest.raises(ValueError, match=message):
        call(model, rollouts[0])
