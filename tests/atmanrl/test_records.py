import csv
import io
import json
import math
import os
import stat
from dataclasses import replace

import pytest

from atmanrl.evaluation.records import Run, TokenSpan, Trajectory, paired_rollouts, write_text_atomically
from tests.atmanrl.saliency_runs import rollout, run


def full_run() -> Run:
    trajectory = Trajectory((0, 100), (2.0, 0.5), ((0.0, 0.0, 0.0), (0.1, 0.4, 0.02)))
    first = rollout(
        texts=("</script>", "\u202eabc", "🦉"), classes=("other", "needed", "filler"), trajectory=trajectory
    )
    second = rollout("p1", restored=None, correct=None, predicted=None, skipped="no answer found", truncated=True)
    third = rollout("p1", sample=1, texts=(), restored=(), classes=())
    return run(replace(first, scores={**first.scores, "deletion": (0.0, 1.5, -0.25)}), second, third)


def test_a_saved_run_loads_equal(tmp_path):
    original = full_run()
    original.save(tmp_path / "run.json")
    assert Run.load(tmp_path / "run.json") == original


def test_settings_load_as_they_were_given(tmp_path):
    original = Run("x", (), settings={"mask": {"betas": (0.6, 0.9999)}})
    original.save(tmp_path / "run.json")
    assert Run.load(tmp_path / "run.json") == original
    assert original.settings["mask"]["betas"] == [0.6, 0.9999]


def test_the_file_is_plain_json_with_one_rollout_per_line(tmp_path):
    path = tmp_path / "run.json"
    full_run().save(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert json.loads("\n".join(lines))["format"] == "atmanrl.run"
    assert [json.loads(line.rstrip(","))["prompt_id"] for line in lines[3:6]] == ["p0", "p1", "p1"]


def test_saving_leaves_no_other_file_and_keeps_the_old_one_on_failure(tmp_path):
    path = tmp_path / "run.json"
    full_run().save(path)
    before = path.read_bytes()
    broken = run(replace(rollout(), loss=replace(rollout().loss, final=math.nan)))
    with pytest.raises(ValueError, match="JSON compliant"):
        broken.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1, 2]", "not a saliency file"),
        (b'{"format": "atmanrl.run",\n"version": 1,\n"run": oops', "line 3: Expecting value"),
        (b'{"format": "atmanrl.run", "version": 2}', "version 2 of the format, this program reads 1"),
        (b'{"format": "atmanrl.run", "version": 1, "run": {}}', "rollouts"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_file_that_is_no_run_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Run.load(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.json: no such file"):
        Run.load(tmp_path / "nothing.json")


def test_csv_has_a_row_per_token_with_every_score():
    file = io.StringIO()
    full_run().write_csv(file)
    rows = list(csv.DictReader(io.StringIO(file.getvalue(), newline="")))
    assert [row["text"] for row in rows[:3]] == ["</script>", "\u202eabc", "🦉"]
    assert rows[1]["restored"] == "0.4"
    assert rows[1]["deletion"] == "1.5"
    assert rows[3]["restored"] == ""
    assert [row["position"] for row in rows] == ["0", "1", "2", "0", "1", "2"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"restored": (0.1,)}, "3 chain-of-thought tokens but 1 scores 'restored'"),
        ({"restored": (0.1, math.nan, 0.2)}, "score 'restored' of token 1 is nan"),
        ({"classes": ("needed",)}, "3 chain-of-thought tokens but 1 classes"),
        ({"trajectory": Trajectory((0,), (1.0,), ((0.0,),))}, "does not have 3 scores"),
    ],
)
def test_a_record_refuses_numbers_that_do_not_fit_its_tokens(fields, message):
    with pytest.raises(ValueError, match=message):
        rollout(**fields)


def test_a_span_needs_a_text_per_id():
    with pytest.raises(ValueError, match="2 token ids but 1 token texts"):
        TokenSpan((1, 2), ("a",))


def test_pairing_follows_prompt_and_sample_whatever_the_order():
    before = run(rollout("a"), rollout("b"), rollout("b", sample=1), rollout("only before"))
    after = run(rollout("b", sample=1), rollout("only after"), rollout("b"), rollout("a"), label="after")
    pairs = [(x.prompt_id, x.sample, y.prompt_id, y.sample) for x, y in paired_rollouts(before, after)]
    assert pairs == [("a", 0, "a", 0), ("b", 0, "b", 0), ("b", 1, "b", 1)]


def test_runs_over_other_prompts_cannot_be_paired():
    with pytest.raises(ValueError, match="share no prompt"):
        paired_rollouts(run(rollout("a")), run(rollout("b"), label="after"))
    with pytest.raises(ValueError, match="'a' is not the same prompt in 'before' and 'after'"):
        paired_rollouts(run(rollout("a")), run(rollout("a", prompt="another"), label="after"))


def test_a_file_is_private_while_it_is_written_and_then_as_any_new_file(tmp_path, monkeypatch):
    written = []
    change = os.chmod

    def chmod(path, mode):
        written.append((path, stat.S_IMODE(os.stat(path).st_mode)))
        change(path, mode)

    monkeypatch.setattr(os, "chmod", chmod)
    write_text_atomically(tmp_path / "a", "text")
    (tmp_path / "b").write_text("text")
    ((name, mode),) = written
    assert mode == 0o600
    assert not os.path.exists(name)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(path, "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
