"""Loaders: what becomes of a row, and what a file that cannot be used says."""

from __future__ import annotations

import json

import datasets
import httpx
import pytest

from atmanrl.config import DataConfig
from atmanrl.tasks import DataError, load_task
from atmanrl.tasks.gsm8k import gold_answer
from atmanrl.tasks.mmlu import gold_letter
from tests.atmanrl.tiny import PROBLEMS, write_gsm8k

MMLU_ROWS = [
    {"question": f"Which is {n}?", "subject": "arithmetic", "choices": ["0", "1", "2", "3"], "answer": n}
    for n in (0, 1, 2, 3)
]


def gsm8k(path, **settings) -> DataConfig:
    return DataConfig(name="gsm8k", path=str(path), **settings)


def test_gsm8k_rows_get_a_chat_prompt_and_a_bare_gold_answer(tmp_path):
    rows = [{"question": " How much? ", "answer": "1,000 + 234\n#### 1,234"}, {"question": "q", "answer": "#### -5"}]
    task = load_task(gsm8k(write_gsm8k(tmp_path / "t.jsonl", rows), test_fraction=0.5))
    by_question = {row["question"]: row for part in (task.train, task.test) for row in part}
    assert by_question["How much?"]["answer"] == "1234"
    assert by_question["q"]["answer"] == "-5"
    (message,) = by_question["How much?"]["prompt"]
    assert message["role"] == "user"
    assert "Problem: How much?\n" in message["content"]
    assert message["content"].endswith('"The final answer is [answer]" where [answer] is the response to the problem.')
    assert task.answer_format.matches("$1,234.00", "1234")


def test_plain_prompts_are_strings_and_a_system_prompt_is_a_message(tmp_path):
    path = write_gsm8k(tmp_path / "t.jsonl")
    plain = load_task(gsm8k(path, prompt_style="plain")).train[0]["prompt"]
    assert plain.startswith("Given the following problem")
    assert plain.endswith("\nResponse:")
    system, user = load_task(gsm8k(path, system_prompt="Be brief.")).train[0]["prompt"]
    assert (system["role"], system["content"], user["role"]) == ("system", "Be brief.", "user")


def test_mmlu_rows_list_the_choices_and_answer_with_a_letter(tmp_path):
    path = tmp_path / "mmlu.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in MMLU_ROWS))
    task = load_task(DataConfig(name="mmlu", path=str(path), test_path=str(path), prompt_style="plain"))
    assert task.train["answer"][:] == ["A", "B", "C", "D"]
    assert "Question: Which is 2?\nA. 0\nB. 1\nC. 2\nD. 3\n" in task.train[2]["prompt"]
    assert task.answer_format.parse("The best answer is (C).").value == "C"
    assert set(task.test["subject"]) == {"arithmetic"}


def test_a_directory_serves_train_and_test_from_files_named_after_the_splits(tmp_path):
    write_gsm8k(tmp_path / "train.jsonl", PROBLEMS[:3])
    datasets.Dataset.from_list(PROBLEMS[3:5]).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    task = load_task(gsm8k(tmp_path))
    assert task.train["question"][:] == [row["question"] for row in PROBLEMS[:3]]
    assert task.test["question"][:] == [row["question"] for row in PROBLEMS[3:5]]


def test_a_single_file_is_split_by_seed_into_disjoint_rows(tmp_path):
    path = write_gsm8k(tmp_path / "t.jsonl")
    task = load_task(gsm8k(path, test_fraction=0.25))
    train, test = set(task.train["question"]), set(task.test["question"])
    assert len(test) == 3
    assert train | test == {row["question"] for row in PROBLEMS}
    assert not train & test
    assert set(load_task(gsm8k(path, test_fraction=0.25)).test["question"]) == test
    assert set(load_task(gsm8k(path, test_fraction=0.25, seed=1)).test["question"]) != test


def test_limits_keep_a_seeded_subset_in_file_order(tmp_path):
    path = write_gsm8k(tmp_path / "t.jsonl")
    train = load_task(gsm8k(path, test_path=str(path), train_limit=4, test_limit=2)).train["question"][:]
    order = [row["question"] for row in PROBLEMS]
    assert len(train) == 4
    assert [order.index(question) for question in train] == sorted(order.index(question) for question in train)


def test_strict_or_flexible_parsing_is_chosen_in_the_configuration(tmp_path):
    path = write_gsm8k(tmp_path / "t.jsonl")
    assert load_task(gsm8k(path)).answer_format.parse("#### 5") is None
    assert load_task(gsm8k(path, answers="flexible")).answer_format.parse("#### 5").value == "5"


GOOD = json.dumps(PROBLEMS[0]).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + b"\n" + b'{"question": "caf\xe9", "answer": "#### 1"}', r"t\.jsonl, line 2: not UTF-8 \(byte 0xe9 at"),
        (GOOD + b"\n\n{broken}\n", r"t\.jsonl, line 3: not JSON .* one object per line"),
        (GOOD + b"\n[1, 2]\n", r"t\.jsonl, line 2: expected a JSON object, got list"),
        (GOOD + b'\n{"problem": "x", "answer": "#### 1"}', r"line 2: lacks the column question; found problem, answer"),
        (GOOD + b'\n{"question": "x", "answer": "18"}', r'line 2: gold answer has no "####" marker: .*18'),
        (
            GOOD + b'\n{"question": "x", "answer": "#### many"}',
            r'line 2: no number after "####" in the gold answer: \'many',
        ),
        (GOOD + b'\n{"question": "x", "answer": "####"}', r"line 2: no number after"),
        (GOOD + b'\n{"question": null, "answer": "#### 1"}', r"line 2: question must be a text, got None"),
        (GOOD + b'\n{"question": " ", "answer": "#### 1"}', r"line 2: question is empty"),
        (GOOD + b'\n{"question": "x", "answer": 18}', r"line 2: answer must be a text, got 18"),
        (
            GOOD + b'\n{"question": "x\\ud83d", "answer": "#### 1"}',
            r'line 2: "question" is no Unicode text: half a surrogate pair \(\\ud83d\) at position 1',
        ),
        (b"", r"t\.jsonl: holds no rows"),
        (GOOD, r"t\.jsonl: 1 row, too few to hold out test rows; pass test_path"),
    ],
)
def test_a_bad_line_is_named_with_file_and_number(tmp_path, content, message):
    path = tmp_path / "t.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_task(gsm8k(path))


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n" + GOOD + b"\r\n")
    assert len(load_task(gsm8k(path, test_path=str(path))).train) == 2


def test_missing_files_and_splits_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.jsonl: no such file or directory"):
        load_task(gsm8k(tmp_path / "nothing.jsonl"))
    with pytest.raises(DataError, match=r"no file train\.jsonl, .*; found nothing"):
        load_task(gsm8k(tmp_path))
    path = write_gsm8k(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"no file train\.jsonl, train\.json or train\.parquet; found rows\.jsonl"):
        load_task(gsm8k(tmp_path))
    with pytest.raises(DataError, match=r"held\.jsonl: no such file"):
        load_task(gsm8k(path, test_path=str(tmp_path / "held.jsonl")))
    odd = tmp_path / "rows.csv"
    odd.write_text("question,answer\n")
    with pytest.raises(DataError, match=r"rows\.csv: unknown file type '\.csv'; known are \.jsonl, \.json, \.parquet"):
        load_task(gsm8k(odd))


def test_bad_parquet_is_named_with_row(tmp_path):
    path = tmp_path / "t.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"t\.parquet: not a readable Parquet file"):
        load_task(gsm8k(path))
    datasets.Dataset.from_list([PROBLEMS[0], {"question": "x", "answer": "?"}]).to_parquet(path)
    with pytest.raises(DataError, match=r"t\.parquet, row 2: gold answer has no"):
        load_task(gsm8k(path))


@pytest.mark.parametrize("answer", [4, -1, "E", "AB", "", None, True, 1.5])
def test_a_gold_choice_outside_a_to_d_is_an_error(answer):
    with pytest.raises(ValueError, match="gold answer must be 0, 1, 2 or 3"):
        gold_letter(answer)


def test_too_few_choices_are_an_error_with_line(tmp_path):
    path = tmp_path / "mmlu.jsonl"
    path.write_text(json.dumps({**MMLU_ROWS[0], "choices": ["yes", "no"]}) + "\n")
    with pytest.raises(DataError, match=r"line 1: choices must be a list of 4, got \['yes', 'no'\]"):
        load_task(DataConfig(name="mmlu", path=str(path), test_path=str(path)))


def test_the_last_marker_holds_the_gold_answer():
    assert gold_answer("#### 1\nmore\n#### $2,000") == "2000"
    assert gold_answer("#### 1/2") == "1/2"


@pytest.mark.parametrize(
    "error",
    [ConnectionError("offline"), datasets.exceptions.DatasetNotFoundError("offline"), httpx.ConnectError("offline")],
)
def test_an_unreachable_hub_says_how_to_pass_a_local_file(monkeypatch, error):
    def offline(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = r"'openai/gsm8k' \(main, split train\).*: offline.*set data\.path to .*columns question, answer"
    with pytest.raises(DataError, match=message):
        load_task(DataConfig(name="gsm8k"))


def test_hub_rows_come_from_the_papers_splits(monkeypatch):
    calls = []

    def load_dataset(path, subset, *, split):
        calls.append((path, subset, split))
        return datasets.Dataset.from_list(MMLU_ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_task(DataConfig(name="mmlu")).train) == len(MMLU_ROWS)
    assert calls == [("cais/mmlu", "all", "auxiliary_train"), ("cais/mmlu", "all", "test")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "squad"}, "name must be one of ledger, gsm8k, mmlu, got 'squad'"),
        ({"prompt_style": "bare"}, "prompt_style must be one of chat, plain"),
        ({"answers": "loose"}, "answers must be one of strict, flexible"),
        ({"test_fraction": 1.0}, r"test_fraction must lie in \(0, 1\), got 1.0"),
        ({"train_limit": 0}, "train_limit must be positive or None, got 0"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_all_rows_are_checked_and_the_first_bad_ones_named_with_their_number(tmp_path):
    path = tmp_path / "t.jsonl"
    bad = b"".join(b'\n{"question": "x", "answer": "%d"}' % i for i in range(6))
    path.write_bytes(GOOD + b"\n{broken}" + bad + b"\n" + GOOD)
    with pytest.raises(DataError) as error:
        load_task(gsm8k(path))
    lines = str(error.value).splitlines()
    assert lines[0] == "7 rows cannot be used:"
    assert [line.split(": ")[0].split(", ")[1] for line in lines[1:6]] == [f"line {i}" for i in (2, 3, 4, 5, 6)]
    assert lines[6] == "  and 2 more"
