from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from atmanrl import estimate_saliency
from atmanrl.config import MaskConfig
from atmanrl.evaluation.explain import Example, explain
from atmanrl.evaluation.faithfulness import with_deletion_effects, with_faithfulness
from atmanrl.evaluation.records import DELETION, Run
from atmanrl.evaluation.summary import spearman, summarize
from atmanrl.rollout import Rollout
from atmanrl.tasks.ledger import CHECKPOINT

PROMPT = "a 6 c 0 b 6 e 8 d 4 ? c b e <cot>"


@pytest.fixture(scope="module")
def ledger():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(CHECKPOINT), AutoTokenizer.from_pretrained(CHECKPOINT)
    chains = ["c 0 . . b 6 ~ d 4 e 8 <ans> c 0 b 6 e 8 <eos>", "c 0 b 6 e 8 <ans> c 0 b 6 e 8 <eos>", ". ~ ."]
    examples = [Example(PROMPT, chain, name=f"p{i}") for i, chain in enumerate(chains)]
    return model, tokenizer, explain(model, tokenizer, examples, mask=MaskConfig(steps=2))


def test_deletion_effects_stand_beside_the_mask(ledger):
    model, _, run = ledger
    scored = with_deletion_effects(model, run)
    item = scored.rollouts[0]
    rollout = Rollout(item.prompt.ids, item.cot.ids, item.answer.ids, item.marker.ids)
    (expected,) = estimate_saliency(model, [rollout], "leave-one-out")
    assert item.scores["deletion"] == pytest.approx(expected.scores.tolist(), abs=1e-5)
    assert item.restored == run.rollouts[0].restored
    assert item.measures == {"deletion_spearman": pytest.approx(spearman(item.restored, expected.scores.numpy()))}
    assert scored.rollouts[2] == run.rollouts[2]


def test_faithfulness_is_measured_where_there_is_an_answer(ledger, tmp_path):
    model, tokenizer, run = ledger
    measured = with_faithfulness(model, tokenizer, with_deletion_effects(model, run))
    first, second, unanswered = (item.measures for item in measured.rollouts)
    assert (
        set(first)
        == set(second) | {"deletion_spearman"}
        == {
            "early_answering_aoc",
            "causal_influence",
            "no_cot_unchanged",
            "filler_unchanged",
            "mistake_unchanged",
            "comprehensiveness",
            "random_comprehensiveness",
            "sufficiency",
            "random_sufficiency",
            "deletion_spearman",
        }
    )
    assert unanswered == {}
    assert first["no_cot_unchanged"] == first["filler_unchanged"] == 0
    assert 0.5 < first["early_answering_aoc"] <= 1
    measured.save(tmp_path / "run.json")
    assert Run.load(tmp_path / "run.json") == measured


def test_the_deletion_effects_themselves_are_the_more_comprehensive_score(ledger):
    model, tokenizer, run = ledger
    by_deletion = with_deletion_effects(model, replace(run, score=DELETION))
    summary = summarize(with_faithfulness(model, tokenizer, by_deletion))
    better = summary["comprehensiveness"].runs[0].value - summary["random_comprehensiveness"].runs[0].value
    assert better > 0.1
    assert "deletion_spearman" not in [row.name for row in summary.rows]


def test_another_model_measures_under_a_prefix(ledger):
    model, tokenizer, run = ledger
    twice = with_faithfulness(model, tokenizer, with_faithfulness(model, tokenizer, run), prefix="initial_")
    measures = twice.rollouts[0].measures
    assert measures["initial_causal_influence"] == measures["causal_influence"]
    assert np.isfinite(list(measures.values())).all()


def test_accuracy_without_a_chain_is_that_of_the_ground_truth_and_not_of_the_completions_answer(ledger):
    model, tokenizer, _ = ledger
    easy = "a 6 c 0 ? c <cot>"
    examples = [Example(easy, f"c {x} <ans> c {x}", expected="c 0", name=x) for x in ("0", "7")]
    run = explain(model, tokenizer, examples, mask=MaskConfig(steps=1))
    assert [item.correct for item in run.rollouts] == [True, False]
    right, wrong = with_faithfulness(model, tokenizer, run).rollouts
    assert right.measures["accuracy_no_cot"] == right.measures["no_cot_unchanged"]
    assert wrong.measures["accuracy_no_cot"] == right.measures["accuracy_no_cot"]
    row = summarize(with_faithfulness(model, tokenizer, run, prefix="initial_"))["initial_accuracy_no_cot"]
    assert (row.unit, row.runs[0].value) == ("%", right.measures["accuracy_no_cot"])
