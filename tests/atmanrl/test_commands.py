import json
from dataclasses import replace

import pytest

from atmanrl import Rollout, estimate_saliency
from atmanrl.cli import main
from atmanrl.config import ModelConfig
from atmanrl.evaluation.compare import with_scores_of
from atmanrl.evaluation.evaluate import labels
from atmanrl.evaluation.records import RESTORED, Run
from atmanrl.evaluation.summary import spearman
from atmanrl.models import load_policy
from atmanrl.report.scale import fixed_scale
from atmanrl.report.text import number
from atmanrl.saliency import make_estimator
from atmanrl.tasks.ledger import CHECKPOINT
from tests.atmanrl.tiny import PROBLEMS, byte_level_tokenizer, llama, write_gsm8k

PROMPT = "a 6 c 0 b 6 e 8 d 4 ? c b e <cot>"
COMPLETION = "c 0 . b 6 e 8 <ans> c 0 b 6 e 8 <eos>"


def test_an_evaluation_prompts_as_the_training_does(tmp_path, monkeypatch):
    """What the recipe hands to the chat template of the training reaches the evaluation's, too."""
    seen = {}

    def evaluated(*arguments, **options):
        seen[options["label"]] = options["chat_template_kwargs"]
        raise ValueError("seen enough")

    for module in ("evaluation.evaluate", "training.run"):
        monkeypatch.setattr(f"atmanrl.{module}.evaluate", evaluated)
    asked = ["--config", "ledger", "--chat_template_kwargs", "{enable_thinking: false}"]
    assert main(["evaluate", *asked, "--output", str(tmp_path / "evaluation")]) == 2
    with pytest.raises(ValueError, match="seen enough"):
        main(["train", *asked, "--output_dir", str(tmp_path / "run")])
    assert seen == {"ledger": {"enable_thinking": False}, "before": {"enable_thinking": False}}


def test_a_revision_is_that_of_the_recipes_own_model(tmp_path, monkeypatch):
    loaded = []

    def load(config):
        loaded.append((config.name, config.revision))
        raise ValueError("seen enough")

    for name in ("load_policy", "check_loads"):
        monkeypatch.setattr(f"atmanrl.evaluation.evaluate.{name}", load)
    asked = ["evaluate", "--config", "ledger", "--model.revision", "abc", "--output", str(tmp_path)]
    for checkpoint in ("ledger", "other"):
        assert main([*asked, "--checkpoints", checkpoint]) == 2
    assert loaded == [("ledger", "abc"), ("other", None)]


def test_a_directory_is_no_file_to_compare(tmp_path, capsys):
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 2
    assert f"{tmp_path}: is a directory" in capsys.readouterr().err


def test_an_output_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["evaluate", "--config", "ledger", "--output", str(tmp_path / "file" / "x")]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_explain_shows_one_prompt_and_writes_every_format(tmp_path, capsys):
    files = {name: tmp_path / f"out.{name}" for name in ("html", "json", "csv")}
    options = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    given = ["--model", "ledger", "--prompt", PROMPT, "--completion", COMPLETION, "--mask.steps", "4"]
    assert main(["explain", *given, "--deletion", "--record-every", "2", *options]) == 0
    output = capsys.readouterr().out
    assert "c 0 . b 6 e 8" in output
    assert "highest restored" in output
    assert "\x1b" not in output
    item = Run.load(files["json"]).rollouts[0]
    assert set(item.scores) == {"restored", "deletion"}
    assert item.trajectory.steps == (0, 2, 4)
    assert item.trajectory.restored[-1] == item.restored
    assert item.trajectory.loss[0] == pytest.approx(item.loss.initial, rel=1e-4)
    assert files["csv"].read_text(encoding="utf-8").count("\n") == 1 + len(item.cot)
    assert "<!doctype html>" in files["html"].read_text(encoding="utf-8")


@pytest.mark.parametrize("estimator", ["best", "leave-one-out", "attention", "random"])
def test_explain_scores_with_the_estimator_asked_for(estimator, tmp_path, capsys):
    file = tmp_path / "out.json"
    given = ["--model", "ledger", "--prompt", PROMPT, "--completion", COMPLETION, "--estimator", estimator]
    assert main(["explain", *given, "--json", str(file), "--html", str(tmp_path / "out.html")]) == 0
    run = Run.load(file)
    name = make_estimator(estimator).name
    (item,) = run.rollouts
    assert (run.score, list(item.scores)) == (name, [name])
    assert f"highest {name}" in capsys.readouterr().out
    rollout = Rollout(item.prompt.ids, item.cot.ids, item.answer.ids, item.marker.ids)
    (expected,) = estimate_saliency(load_policy(ModelConfig("ledger"))[0], [rollout], estimator)
    assert item.scores[name] == pytest.approx(expected.scores.tolist(), rel=1e-4, abs=1e-6)


def test_several_estimators_stand_in_one_file_and_on_one_page(tmp_path, capsys):
    file, page = tmp_path / "out.json", tmp_path / "out.html"
    given = ["--model", "ledger", "--prompt", PROMPT, "--completion", COMPLETION, "--record-every", "3"]
    several = ["--estimator", "best", "attention", "fai", "--deletion"]
    assert main(["explain", *given, *several, "--json", str(file), "--html", str(page)]) == 0
    run = Run.load(file)
    (item,) = run.rollouts
    assert (run.score, set(item.scores)) == ("sparse-mask", {"sparse-mask", "attention", "fai", "deletion"})
    assert item.trajectory.steps == (0, 3, 6, 9)
    assert item.trajectory.restored[0] == (1.0,) * len(item.cot)
    assert item.trajectory.loss[-1] == pytest.approx(item.loss.final, rel=1e-4)
    agreement = spearman(item.scores["sparse-mask"], item.scores["deletion"])
    output = capsys.readouterr().out
    assert f"rank correlation of sparse-mask with deletion: {number(agreement)}" in output
    listed = [line.split(":")[0] for line in output.splitlines() if line.startswith("highest")]
    assert listed == [f"highest {name}" for name in ("sparse-mask", "attention", "fai", "deletion")]
    assert page.read_text(encoding="utf-8").count('name="score"') == 4


def test_two_scores_of_the_same_completions_are_compared_token_by_token(tmp_path, capsys):
    files = {name: str(tmp_path / f"{name}.json") for name in ("leave-one-out", "gradient")}
    given = ["--model", "ledger", "--prompt", PROMPT, "--completion", COMPLETION]
    for name, file in files.items():
        assert main(["explain", *given, "--estimator", name, "--json", file]) == 0
    assert main(["compare", *files.values(), "--output", str(tmp_path / "both")]) == 0
    scores = [Run.load(file).rollouts[0].scores[name] for name, file in files.items()]
    assert f"spearman with gradient {number(spearman(*scores))}" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "both" / "report.html").read_text(encoding="utf-8").count('name="score"') == 2
    other = str(tmp_path / "other.json")
    assert main(["explain", *given[:-1], COMPLETION.replace(".", "~"), "--estimator", "fai", "--json", other]) == 0
    assert main(["compare", files["gradient"], other]) == 2
    assert "neither scores nor completions can be compared" in capsys.readouterr().err


def test_a_masks_scale_is_that_of_the_file_it_came_from(tmp_path):
    files = {name: str(tmp_path / f"{name}.json") for name in ("gradient", "mask")}
    given = ["explain", "--model", "ledger", "--prompt", PROMPT, "--completion", COMPLETION]
    assert main([*given, "--estimator", "gradient", "--json", files["gradient"]]) == 0
    assert main([*given, "--mask.steps", "20", "--json", files["mask"]]) == 0
    runs = {name: Run.load(file) for name, file in files.items()}
    both = with_scores_of(runs["gradient"], runs["mask"])
    of_paper = fixed_scale([replace(both, settings={})], RESTORED)
    assert fixed_scale([both], RESTORED) == fixed_scale([runs["mask"]], RESTORED) != of_paper
    assert both.rollouts[0].scores[RESTORED] == runs["mask"].rollouts[0].scores[RESTORED]


def test_explain_reads_a_file_and_lets_the_model_complete(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": PROMPT, "completion": COMPLETION, "expected": "c 0 b 6 e 8"}, {"prompt": PROMPT, "id": "own"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main(["explain", "--model", "ledger", "--input", str(path), "--mask.steps", "2"]) == 0
    output = capsys.readouterr().out
    assert "1  7 tokens, correct" in output
    assert "own" in output


def test_evaluate_lets_the_initial_model_read_the_chains_too(tmp_path, capsys):
    quick = ["--evaluation.prompts", "2", "--evaluation.samples", "1", "--saliency_estimator", "gradient"]
    command = ["evaluate", "--config", "ledger", *quick, "--output", str(tmp_path)]
    assert main([*command, "--faithfulness", "--initial-model", str(CHECKPOINT)]) == 0
    run = Run.load(tmp_path / "ledger.json")
    assert run.score == "gradient"
    for item in run.rollouts:
        own = {name: value for name, value in item.measures.items() if not name.startswith("initial_")}
        assert own["mistake_unchanged"] < 1
        for name in set(own) - {"deletion_spearman"}:
            assert item.measures[f"initial_{name}"] == own[name]
    assert "initial accuracy no cot (%)" in capsys.readouterr().out


def test_evaluate_compares_checkpoints_on_the_same_prompts(tmp_path, capsys):
    command = ["evaluate", "--config", "ledger", "--checkpoints", "ledger", str(CHECKPOINT), "--output", str(tmp_path)]
    quick = ["--evaluation.prompts", "3", "--evaluation.samples", "1", "--mask.steps", "2", "--faithfulness"]
    assert main([*command, *quick]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"ledger.json", "checkpoint.json", "summary.json", "summary.md", "report.html", "plots"}
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert all(row["difference"]["value"] in (0, None) for row in summary["rows"])
    assert "early answering aoc" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "ledger.json"), str(tmp_path / "checkpoint.json")]) == 0
    assert "paired differences" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "a.json", "b.json"], "a.json: no such file"),
        (["explain", "--model", "ledger", "--input", "nothing.jsonl"], "nothing.jsonl: no such file"),
        (["explain", "--model", "ledger", "--prompt", "a", "--mask.stps", "2"], "unknown key 'mask.stps'"),
        (
            ["explain", "--model", "ledger", "--prompt", "a", "--steps", "2"],
            "unknown key 'steps'; did you mean 'mask.steps'",
        ),
        (
            ["explain", "--model", "ledger", "--prompt", "a", "--html", "no/such/x.html"],
            "there is no directory no/such",
        ),
        (
            ["explain", "--model", "ledger", "--prompt", "a", "--estimator", "atmam"],
            "unknown estimator 'atmam'; choose best, mask,",
        ),
        (
            ["explain", "--model", "ledger", "--prompt", "a", "--estimator", "best", "--mask.steps", "2"],
            "--mask.steps belongs to --estimator mask, not best",
        ),
        (
            ["explain", "--model", "ledger", "--prompt", "a", "--estimator", "gradient", "mask", "--record-every", "2"],
            "--record-every belongs to a mask as the first estimator, not to 'gradient'",
        ),
        (["explain", "--model", "ledger", "--prompt", "a", "--record-every", "0"], "record_every must be at least 1"),
        (["explain", "--model", "ledger", "--prompt", "a", "--temperature", "nan"], "temperature must not be negative"),
        (["explain", "--model", "ledger", "--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens must be at least"),
        (["explain", "--model", "ledger", "--prompt", "a", "--answer", ""], "--answer is empty"),
        (["explain", "--model", "ledger", "--prompt", "\udcff"], "--prompt is not valid UTF-8"),
        (["explain", "--model", "ledger\udcff", "--prompt", "a"], "is not valid UTF-8"),
        (
            ["explain", "--model", "ledger", "--prompt", "a", "--estimator", "best", "sparse-mask"],
            "an estimator is named twice: best, sparse-mask",
        ),
        (
            ["explain", "--model", "/no/such/model", "--prompt", "a"],
            "model '/no/such/model' cannot be loaded: there is no such directory",
        ),
        (
            ["explain", "--model", "..", "--prompt", "a"],
            "model '..' cannot be loaded: the directory has no config.json",
        ),
        (
            ["explain", "--model", "ledger", "--prompt", "a", "--mask.betas", "[0.5"],
            "--mask.betas: not a YAML value: '[0.5'",
        ),
        (
            ["evaluate", "--config", "ledger", "--saliency_estimatr", "best"],
            "--saliency_estimatr: unknown key 'saliency_estimatr'; did you mean 'saliency_estimator'",
        ),
        (["evaluate", "--config", "ledger", "--mask.steps", "few"], "--mask.steps: 'mask.steps' must be an integer"),
        (["evaluate", "--config", "ledger", "--evaluation.prompts", "0"], "evaluation.prompts is 0"),
        (["evaluate", "--config", "ledger", "--checkpoints", "ledger", "ledger"], "named twice"),
        (
            ["evaluate", "--config", "ledger", "--initial-model", "ledger"],
            "--initial-model takes part in --faithfulness only",
        ),
    ],
)
def test_input_that_cannot_be_used_is_said_in_a_line_with_status_2(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_labels_are_as_short_as_they_can_be():
    assert labels(["runs/a/model", "runs/b/model", "ledger"]) == ["a-model", "b-model", "ledger"]
    assert labels(["meta/llama"]) == ["llama"]


@pytest.fixture
def nothing_computed(monkeypatch):
    """No weights may be loaded: what is wrong is known before."""

    def load(*arguments, **options):
        raise AssertionError("the model was loaded")

    for module in ("evaluate", "explain"):
        monkeypatch.setattr(f"atmanrl.evaluation.{module}.load_policy", load)


@pytest.mark.parametrize("option", ["--html", "--json", "--csv"])
def test_explain_refuses_a_file_that_it_cannot_write_before_the_model_is_loaded(
    option, tmp_path, capsys, nothing_computed
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    asked = ["explain", "--model", "ledger", "--prompt", PROMPT, option]
    for path, reason in (("folder", "is a directory"), ("file/x", "there is no directory"), ("no/x", "no directory")):
        assert main([*asked, str(tmp_path / path)]) == 2
        error = capsys.readouterr().err
        assert option in error
        assert reason in error
    assert main([*asked, str(tmp_path / "x"), "--json" if option != "--json" else "--csv", str(tmp_path / "x")]) == 2
    assert "name one file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--saliency_estimator", "atmam"], "unknown estimator 'atmam'"),
        (["--checkpoints", "ledger", "/no/such/model"], "'/no/such/model' cannot be loaded"),
        (["--faithfulness", "--initial-model", "/no/such/model"], "'/no/such/model' cannot be loaded"),
        (["--output", "{tmp}/taken"], "ledger.json: is a directory"),
        (["--output", "{tmp}/full"], "report.html: is a directory"),
        (["--max_completion_length", "0"], "max_new_tokens must be at least 1"),
    ],
)
def test_evaluate_refuses_what_cannot_end_well_before_a_model_is_loaded(
    changed, message, tmp_path, capsys, nothing_computed
):
    (tmp_path / "taken" / "ledger.json").mkdir(parents=True)
    (tmp_path / "full" / "report.html").mkdir(parents=True)
    asked = ["evaluate", "--config", "ledger", "--output", str(tmp_path / "out")]
    assert main([*asked, *(each.format(tmp=tmp_path) for each in changed)]) == 2
    assert message in capsys.readouterr().err


def test_compare_and_bench_refuse_an_output_that_they_cannot_write(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["compare", "a.json", "b.json", "--output", str(tmp_path / "file")]) == 2
    assert "--output" in capsys.readouterr().err
    for path in (tmp_path / "file" / "x", tmp_path / "no" / "x", tmp_path):
        assert main(["bench", "--shape", "llama-30m", "--output", str(path)]) == 2
        assert f"--output {path}: " in capsys.readouterr().err


def test_explain_skips_bad_lines_goes_on_and_ends_with_status_1(tmp_path, capsys):
    path, file = tmp_path / "pairs.jsonl", tmp_path / "out.json"
    good = json.dumps({"prompt": PROMPT, "completion": COMPLETION})
    bad = [
        "{",
        '{"prompt": 3}',
        json.dumps({"prompt": PROMPT, "completion": "c 0", "answer": "8"}),
        '{"prompt": "\\ud800"}',
    ]
    path.write_text("\n".join([good, *bad, good]) + "\n", encoding="utf-8")
    asked = ["explain", "--model", "ledger", "--input", str(path)]
    assert (
        main([*asked, "--estimator", "gradient", "--deletion", "--json", str(file), "--html", str(tmp_path / "x")]) == 1
    )
    error = capsys.readouterr().err
    items = Run.load(file).rollouts
    assert [item.unusable for item in items] == [False, True, True, True, True, False]
    for line, item in enumerate(items[1:5], start=2):
        assert item.skipped.startswith(f"{path}, line {line}: ")
        assert f"skipped: {item.skipped}" in error
    assert items[0].scores == items[5].scores != {}
    assert main([*asked, "--statistics", "--max-new-tokens", "2"]) == 1
    path.write_text("\n".join(bad[:2]) + "\n", encoding="utf-8")
    assert main(asked) == 2
    assert f"{path}, line 1: not JSON" in capsys.readouterr().err


def test_the_template_has_its_arguments_from_the_command_line_of_explain(tmp_path):
    file = tmp_path / "out.json"
    asked = ["explain", "--model", "ledger", "--prompt", PROMPT, "--completion", COMPLETION, "--json", str(file)]
    given = ["--chat_template_kwargs.enable_thinking", "false", "--chat_template_kwargs", "{level: 2}"]
    assert main([*asked, "--estimator", "random", *given]) == 0
    assert Run.load(file).settings["chat_template_kwargs"] == {"enable_thinking": False, "level": 2}
    assert main([*asked, "--chat_template_kwargs", "[1]"]) == 2


def test_an_error_after_the_first_scores_loses_none_of_them(tmp_path, monkeypatch):
    def failing(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr("atmanrl.evaluation.explain.with_deletion_effects", failing)
    monkeypatch.setattr("atmanrl.evaluation.evaluate.with_deletion_effects", failing)
    file = tmp_path / "out.json"
    asked = ["explain", "--model", "ledger", "--prompt", PROMPT, "--completion", COMPLETION, "--estimator", "gradient"]
    assert main([*asked, "--deletion", "--json", str(file)]) == 1
    assert Run.load(file).rollouts[0].scores["gradient"]
    quick = ["--evaluation.prompts", "2", "--saliency_estimator", "gradient", "--faithfulness"]
    assert main(["evaluate", "--config", "ledger", *quick, "--output", str(tmp_path)]) == 1
    assert Run.load(tmp_path / "ledger.json").rollouts[0].scores["gradient"]


def test_evaluate_skips_bad_rows_goes_on_and_ends_with_status_1(tmp_path, capsys):
    tokenizer = byte_level_tokenizer()
    llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    write_gsm8k(data / "train.jsonl", [*PROBLEMS, {"question": "no gold", "answer": "?"}])
    lines = [json.dumps(row) for row in PROBLEMS[:3]]
    bad = ["{", json.dumps({"question": "x"}), json.dumps({"question": "x", "answer": "1 #### two"})]
    bad.append(json.dumps({"question": "x " * 600, "answer": "1 #### 1"}))
    (data / "test.jsonl").write_text("\n".join([*lines[:2], *bad, lines[2]]) + "\n", encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{name: {tmp_path / 'model'}}}\ndata: {{name: gsm8k, path: {data}}}\n"
        "evaluation: {prompts: 10}\nmax_completion_length: 8\nsaliency_estimator: gradient\n"
    )
    assert main(["evaluate", "--config", str(recipe), "--output", str(tmp_path / "out")]) == 1
    run = Run.load(tmp_path / "out" / "model.json")
    assert [item.unusable for item in run.rollouts] == [False] * 3 + [True] * 4
    error = capsys.readouterr().err
    for line in (3, 4, 5, 6):
        assert f"skipped: {data / 'test.jsonl'}, line {line}: " in error
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["prompts"] == 3


def test_a_file_that_cannot_be_written_takes_no_other_with_it(tmp_path, capsys):
    full, file = tmp_path / "full", tmp_path / "out.csv"
    full.symlink_to("/dev/full")
    asked = ["explain", "--model", "ledger", "--prompt", PROMPT, "--completion", COMPLETION, "--estimator", "gradient"]
    assert main([*asked, "--json", str(full), "--csv", str(file)]) == 1
    assert "No space left" in capsys.readouterr().err
    assert file.read_text().count("\n") == 8
