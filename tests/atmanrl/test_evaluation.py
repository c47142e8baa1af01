from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from atmanrl import Rollout, optimize_masks
from atmanrl.answers import GSM8K_ANSWER
from atmanrl.config import DataConfig, MaskConfig
from atmanrl.evaluation.compare import write_comparison
from atmanrl.evaluation.evaluate import evaluate
from atmanrl.evaluation.recording import Completion, record, token_texts
from atmanrl.evaluation.records import Run
from atmanrl.evaluation.summary import compare
from atmanrl.generation import GenerationSettings, generate
from atmanrl.models import encode_prompt
from atmanrl.saliency import Mask
from atmanrl.tasks import load_task
from atmanrl.tasks.ledger import CHECKPOINT
from tests.atmanrl.tiny import EOT, byte_level_tokenizer, llama

QUICK = MaskConfig(steps=2)
SETTINGS = GenerationSettings(max_new_tokens=32, batch_size=4)


@pytest.fixture(scope="module")
def ledger():
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    return model, AutoTokenizer.from_pretrained(CHECKPOINT), load_task(DataConfig(test_limit=6, train_limit=1))


@pytest.fixture(scope="module")
def ledger_run(ledger):
    return evaluate(*ledger, label="before", generation=SETTINGS, mask=QUICK, seed=3)


@pytest.fixture(scope="module")
def byte_level():
    tokenizer = byte_level_tokenizer()
    return llama(len(tokenizer)), tokenizer


def test_a_completion_is_recorded_with_its_spans_classes_and_verdict(ledger, ledger_run):
    _, tokenizer, task = ledger
    assert len(ledger_run.rollouts) == len(task.test)
    for row, item in zip(task.test, ledger_run.rollouts, strict=True):
        assert item.prompt.text == tokenizer.decode(encode_prompt(tokenizer, row["prompt"]))
        assert item.marker.text.strip() == "<ans>"
        assert item.rest.text.strip() == "<eos>"
        assert item.answer.text.strip() == item.predicted
        assert item.correct == (item.predicted == row["answer"])
        assert not item.truncated
        needed = [text.strip() for text, c in zip(item.cot.texts, item.classes, strict=True) if c == "needed"]
        assert not item.correct or set(needed) == set(row["answer"].split()[1::2])
    assert sum(item.correct for item in ledger_run.rollouts) >= 5


def test_recorded_masks_are_those_of_optimize_masks(ledger, ledger_run):
    item = ledger_run.rollouts[1]
    rollout = Rollout(item.prompt.ids, item.cot.ids, item.answer.ids, item.marker.ids)
    (expected,) = optimize_masks(ledger[0], [rollout], QUICK)
    assert item.restored == pytest.approx(expected.restored.tolist(), abs=1e-5)
    assert item.loss.unmasked == pytest.approx(expected.loss_unmasked, rel=1e-3)
    assert torch.tensor(item.restored).float().tolist() == pytest.approx(list(item.restored), abs=1e-9)


def test_equal_seeds_give_equal_runs_and_leave_the_random_state_alone(ledger, ledger_run):
    state = torch.random.get_rng_state()
    again = evaluate(*ledger, label="before", generation=SETTINGS, mask=QUICK, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert again == ledger_run
    other = evaluate(*ledger, label="before", generation=SETTINGS, saliency=False, seed=4)
    assert [x.cot.ids for x in other.rollouts] != [x.cot.ids for x in ledger_run.rollouts]
    assert {item.skipped for item in other.rollouts} == {"saliency not asked for"}


def test_greedy_completions_do_not_depend_on_batch_or_padding(ledger):
    model, tokenizer, task = ledger
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in task.test]
    prompts[0] = prompts[0][:1] + prompts[0][3:]
    greedy = replace(SETTINGS, temperature=0.0)
    together = generate(model, tokenizer, prompts, greedy, seed=0)
    alone = [generate(model, tokenizer, [prompt], greedy, seed=0)[0] for prompt in prompts]
    assert together == alone


def test_samples_of_a_prompt_stay_together(ledger):
    model, tokenizer, task = ledger
    run = evaluate(model, tokenizer, task, label="x", generation=replace(SETTINGS, samples=3), saliency=False)
    assert [(item.prompt_id, item.sample) for item in run.rollouts[:4]] == [
        ("ledger-0", 0),
        ("ledger-0", 1),
        ("ledger-0", 2),
        ("ledger-1", 0),
    ]
    assert compare(run, run).prompts == len(task.test)


def test_a_model_in_training_mode_is_evaluated_in_eval_mode_and_given_back(ledger):
    model, tokenizer, task = ledger
    model.train()
    evaluate(model, tokenizer, task, label="x", generation=SETTINGS, saliency=False)
    assert model.training
    model.eval()


def test_a_completion_cut_off_has_no_answer_and_no_saliency(ledger):
    model, tokenizer, task = ledger
    run = evaluate(model, tokenizer, task, label="x", generation=replace(SETTINGS, max_new_tokens=3), mask=QUICK)
    assert {(item.truncated, item.predicted, item.correct, item.skipped) for item in run.rollouts} == {
        (True, None, False, "no answer found")
    }
    assert {len(item.cot) for item in run.rollouts} == {3}


def test_a_prompt_that_leaves_no_room_is_refused_with_the_numbers(ledger):
    model, tokenizer, task = ledger
    with pytest.raises(
        ValueError, match=r"prompt 0 has 16 tokens; with max_new_tokens 1024 that is 1040.*context of 256"
    ):
        evaluate(model, tokenizer, task, label="x", generation=GenerationSettings())


def test_no_rows_are_refused(ledger):
    with pytest.raises(ValueError, match="no rows of task 'ledger'"):
        evaluate(*ledger, [], label="x")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"temperature": float("nan")}, "temperature must not be negative"),
        ({"temperature": 0.0, "samples": 2}, "2 samples at temperature 0"),
    ],
)
def test_generation_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**settings)


@pytest.mark.parametrize("text", ["18 eggs, café 中文🙂 <|eot_id|> naïve\n\n  x", "🙃🙃", "\ufffd", ""])
def test_token_texts_join_to_the_decoded_text(byte_level, text):
    _, tokenizer = byte_level
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids) == text


def test_a_character_of_several_tokens_belongs_to_its_last(byte_level):
    _, tokenizer = byte_level
    ids = tokenizer.encode("x🦉y", add_special_tokens=False)
    assert len(ids) > 3
    assert token_texts(tokenizer, ids) == ("x", *[""] * (len(ids) - 3), "🦉", "y")


def test_token_texts_keep_the_space_a_word_level_decoder_puts_between(ledger):
    tokenizer = ledger[1]
    assert token_texts(tokenizer, tokenizer.encode("a 6 ~ <ans>")) == ("<b>", " a", " 6", " ~", " <ans>")


def test_special_tokens_after_the_answer_are_recorded(byte_level):
    model, tokenizer = byte_level
    text = f"3 + 4 = 7. The final answer is 7.{EOT}"
    completion = Completion(
        "p", tokenizer.encode("How many?"), tokenizer.encode(text, add_special_tokens=False), GSM8K_ANSWER, expected="7"
    )
    (item,) = record(model, tokenizer, [completion], estimator=Mask(QUICK))
    assert (item.cot.text, item.marker.text.strip(), item.answer.text.strip()) == (
        "3 + 4 = 7. ".rstrip(),
        "The final answer is",
        "7",
    )
    assert item.rest.texts[-1] == EOT
    assert item.correct is True
    assert item.classes == ()


def test_an_answer_that_only_the_flexible_parser_finds_counts_as_flexible_accuracy(byte_level):
    model, tokenizer = byte_level
    ids = tokenizer.encode("so it is 7", add_special_tokens=False)
    strict = Completion("p", tokenizer.encode("Q"), ids, GSM8K_ANSWER, expected="7")
    (item,) = record(model, tokenizer, [strict], estimator=None)
    assert (item.correct, item.predicted, item.measures) == (False, None, {"accuracy_flexible": 1.0})
    flexible = replace(strict, answer_format=GSM8K_ANSWER.with_mode("flexible"))
    (item,) = record(model, tokenizer, [flexible], estimator=None)
    assert (item.correct, item.predicted, item.measures) == (True, "7", {})


def test_a_comparison_leaves_its_files_and_its_table(ledger_run, tmp_path, capsys):
    after = replace(ledger_run, label="after")
    summary = write_comparison(tmp_path / "run", ledger_run, after, title="Ledger")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "plots",
        "report.html",
        "summary.json",
        "summary.md",
    ]
    assert "Ledger" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "accuracy (%)" in capsys.readouterr().out
    assert summary["cot_tokens"].difference.value == 0


def test_an_evaluation_survives_its_file(ledger_run, tmp_path):
    ledger_run.save(tmp_path / "before.json")
    assert Run.load(tmp_path / "before.json") == ledger_run


def test_rows_that_cannot_be_used_are_recorded_and_the_others_evaluated(ledger):
    model, tokenizer, task = ledger
    good = dict(task.test[0])
    rows = [
        good,
        {**good, "prompt": "a " * 300},
        {"prompt": good["prompt"]},
        {**good, "answer": 7},
        {**good, "prompt": 3},
        good,
    ]
    run = evaluate(model, tokenizer, task, rows, label="x", generation=SETTINGS, estimator="gradient")
    assert [item.unusable for item in run.rollouts] == [False, False, True, True, True, True]
    assert [item.prompt_id for item in run.rollouts] == [f"ledger-{i}" for i in (0, 5, 1, 2, 3, 4)]
    reasons = [item.skipped for item in run.rollouts[2:]]
    assert "more than the model's context of 256" in reasons[0]
    assert "lacks the column answer" in reasons[1]
    assert "the gold answer 7" in reasons[2]
    with pytest.raises(ValueError, match=r"none of 2 rows .* can be used; prompt 0 lacks the column answer"):
        evaluate(model, tokenizer, task, [rows[2]] * 2, label="x")


def test_a_model_that_cannot_be_scored_is_refused_before_anything_is_generated(ledger, monkeypatch):
    model, tokenizer, task = ledger

    def generated(*arguments, **options):
        raise AssertionError("completions were generated")

    def unsupported(*arguments, **options):
        raise ValueError("no bias reaches this model")

    monkeypatch.setattr("atmanrl.evaluation.evaluate.generate", generated)
    monkeypatch.setattr("atmanrl.evaluation.recording.estimate_saliency", unsupported)
    with pytest.raises(ValueError, match="no bias reaches this model"):
        evaluate(model, tokenizer, task, label="x", generation=SETTINGS)
