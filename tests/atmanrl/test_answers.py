"""Answer parsers: the golden table, spans, comparison, and what hostile text may not do."""

from __future__ import annotations

import json
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atmanrl.answers import GSM8K_ANSWER, LEDGER_ANSWER, MMLU_ANSWER, AnswerFormat

GOLDEN = [
    json.loads(line) for line in (Path(__file__).parent / "golden" / "answers.jsonl").read_text("utf-8").splitlines()
]
FORMATS = {
    "final": GSM8K_ANSWER,
    "boxed": AnswerFormat("number", markers=("boxed",), flexible_markers=("final answer is", "answer is", "####")),
    "####": AnswerFormat("number", markers=("####",), flexible_markers=("final answer is", "answer is", "boxed")),
    "choice": MMLU_ANSWER,
    "words": LEDGER_ANSWER,
}
MODES = ("strict", "flexible")


def test_golden_table_covers_every_format_with_at_least_150_distinct_cases():
    assert len({(case["format"], case["text"]) for case in GOLDEN}) == len(GOLDEN) >= 150
    assert {case["format"] for case in GOLDEN} == set(FORMATS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['format']}: {case['text'][-50:]}")
def test_golden_value_is_found_where_it_stands_and_equals_its_gold(case, mode):
    answer_format = FORMATS[case["format"]].with_mode(mode)
    found = answer_format.parse(case["text"])
    if case[mode] is None:
        assert found is None
        return
    assert found is not None
    assert found.value == case[mode]
    assert case["text"][slice(*found.value_span)] == found.value
    assert found.marker_span[1] == found.value_span[0]
    if mode == "flexible":
        assert answer_format.matches(found.value, case["gold"])


@pytest.mark.parametrize(
    ("text", "marker"),
    [
        ("so 9 * 2 = 18. The final answer is 18", "The final answer is "),
        ("so. **The final answer is: $\\boxed{18}$**", "The final answer is: $\\boxed{"),
        ("so.\nmy final answer is $18", "my final answer is $"),
        ("The final answer is 9 * 2 = 18", "The final answer is 9 * 2 = "),
    ],
)
def test_marker_reaches_from_the_phrase_to_the_value(text, marker):
    found = GSM8K_ANSWER.parse(text)
    assert text[slice(*found.marker_span)] == marker


def test_a_number_without_marker_has_an_empty_marker_at_its_start():
    found = GSM8K_ANSWER.with_mode("flexible").parse("she has 18 eggs")
    assert found.marker_span == (8, 8)
    assert GSM8K_ANSWER.parse("she has 18 eggs") is None


@pytest.mark.parametrize(
    ("predicted", "gold", "same"),
    [
        ("1,000.00", "1000", True),
        ("$1,000", "1000", True),
        ("0.5", "1/2", True),
        ("\\frac{2}{4}", "0.5", True),
        ("-3", "3", False),
        ("0.333", "1/3", False),
        ("50%", "50", True),
        ("50%", "0.5", False),
        ("18 apples", "18", True),
        ("", "18", False),
        ("apples", "18", False),
        ("1e300", "1" + "0" * 250, False),
    ],
)
def test_numbers_match_as_exact_fractions(predicted, gold, same):
    assert GSM8K_ANSWER.matches(predicted, gold) is same


def test_an_unreadable_gold_answer_is_an_error():
    with pytest.raises(ValueError, match="gold answer 'many' is not a number"):
        GSM8K_ANSWER.matches("18", "many")


def test_canonical_reads_a_number_exactly():
    assert GSM8K_ANSWER.canonical("0.1") == Fraction(1, 10)
    assert MMLU_ANSWER.canonical("(c)") == "C"
    assert LEDGER_ANSWER.canonical(" c  0 ") == ("c", "0")


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "{}.0", "{}.", "{} apples", "**{}**", "${}$"]))
def test_every_integer_survives_its_formatting(number, style):
    found = GSM8K_ANSWER.parse(f"The final answer is {style.format(number)}")
    assert found is not None
    assert GSM8K_ANSWER.matches(found.value, str(number))


@given(st.text(alphabet=r"\{}boxed frac$()0123456789.,/-+=^* anslwer<>#:AB" + "\n\u2212½", max_size=80))
def test_any_text_is_parsed_without_error_and_spans_point_at_the_value(text):
    for answer_format in FORMATS.values():
        found = answer_format.with_mode("flexible").parse(text)
        if found is not None:
            assert text[slice(*found.value_span)] == found.value
            assert found.marker_span[1] == found.value_span[0]
            assert answer_format.canonical(found.value) is not None


@pytest.mark.parametrize(
    "piece",
    [
        "1,",
        "1",
        "\\boxed{",
        "{",
        "final answer is ",
        "the ",
        "####",
        "1/",
        "1 + ",
        "x = ",
        "\\frac{1}{",
        "**",
        "-",
        "answer to ",
        "<ans>",
        "10^",
    ],
)
def test_time_stays_linear_on_degenerate_repetition(piece):
    text = piece * (20_000 // len(piece))
    start = time.process_time()
    for answer_format in FORMATS.values():
        answer_format.with_mode("flexible").parse(text)
    assert time.process_time() - start < 5
