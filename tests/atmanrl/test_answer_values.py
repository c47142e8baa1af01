"""Values of answers: the golden table, comparison, a grammar of what surrounds a number, and time on hostile text."""

from __future__ import annotations

import json
import math
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, example, given
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


def test_golden_table_covers_every_format_with_at_least_600_distinct_cases():
    assert len({(case["format"], case["text"]) for case in GOLDEN}) == len(GOLDEN) >= 600
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


INTEGERS = st.integers(-(10**12), 10**12)
COUNTS = st.integers(0, 10**9)
WRITTEN = st.sampled_from(["{}", "{:,}", "{}.0", "{}.00"])
BEFORE = st.sampled_from(
    ["", "$", "€", "US$", "USD ", "**", "$\\boxed{", "\\(", "x = ", "approximately ", "`", "\n\n", '"', "total = $"]
)
UNITS = st.sampled_from(
    [
        *("", "%", " %", "\\%", "°", "°C", " dollars", " dollars per hour", "kg", " km/h", "€", " USD", " zebras"),
        *(" apples for 3 people", "\\text{ cm}", " (nothing more)", "-sided", " of them", " each day", " m²", " 元"),
    ]
)
ENDS = st.sampled_from(
    [
        *("", ".", "**", "$.", "}$", ")", ".\n\nBye 7", ". I hope it is correct.", "<|eot_id|>", "</ans>"),
        *(", of course", ", since 9 * 2 = 18", " ✅"),
    ]
)


@given(INTEGERS, WRITTEN, BEFORE, UNITS, ENDS)
def test_a_number_is_read_through_all_that_may_surround_it(number, written, before, unit, end):
    text = f"We have 3 and 4. The final answer is {before}{written.format(number)}{unit}{end}"
    found = GSM8K_ANSWER.parse(text)
    assert found is not None
    assert GSM8K_ANSWER.canonical(found.value) == number


DIGITS = st.sampled_from(["０１２３４５６７８９", "٠١٢٣٤٥٦٧٨٩", "०१२३४५६७८९", "𝟎𝟏𝟐𝟑𝟒𝟓𝟔𝟕𝟖𝟗"])


@given(INTEGERS, DIGITS, st.sampled_from("-−–‑﹣－"))
def test_digits_and_minus_signs_of_every_script_are_read(number, digits, minus):
    text = "The final answer is " + "".join(minus if c == "-" else digits[int(c)] for c in str(number))
    found = GSM8K_ANSWER.parse(text)
    assert found.value == text[slice(*found.value_span)]
    assert GSM8K_ANSWER.canonical(found.value) == number


HEDGES = st.sampled_from(
    [
        *("{} or {}", "{} or maybe {}", "either {} or {}", "between {} and {}", "{} and {}", "{} to {}", "{}, {}"),
        *("{}–{}", "{} - {}", "{} & {}", "({}, {})", "{{{}, {}}}", "{} (or {})", "{}. Or {}.", "{} vs. {}", "{}/{}?"),
        *("{}, possibly {}", "{}. Wait, it is {}.", "\\boxed{{{} \\text{{ or }} {}}}", "**{}** or **{}**"),
    ]
)
NUMERIC_HEDGES = st.sampled_from(
    [
        *("{}; {}", "{}~{}", "x={} or x={}", "{} feet {} inches", "{} hours and {} minutes", "{} dollars or {} euros"),
        *("\\boxed{{{}}} or \\boxed{{{}}}", "{}\nor {}", "\n1. {}\n2. {}"),
    ]
)


@given(COUNTS, COUNTS, HEDGES | NUMERIC_HEDGES, st.sampled_from(MODES))
def test_of_two_values_none_is_the_answer(one, other, hedge, mode):
    assume(one != other)
    assert GSM8K_ANSWER.with_mode(mode).parse(f"9 * 2 = 18. The final answer is {hedge.format(one, other)}") is None


@given(st.permutations("ABCD"), HEDGES, st.sampled_from(MODES))
def test_of_two_letters_none_is_the_choice(letters, hedge, mode):
    text = f"C is tempting. The best answer is {hedge.format(*letters[:2])}"
    assert MMLU_ANSWER.with_mode(mode).parse(text) is None


WRAPPED_LETTERS = st.sampled_from(
    [
        *("{}", "({})", "[{}]", "**{}**", "_{}_", "__{}__", "*({})*", "Option {}", "**Option {}**", "option **{}**"),
        *("Choice ({})", "the letter {}", "Statement {}", "$\\boxed{{{}}}$", "`{}`", '"{}"'),
    ]
)
SEPARATORS = st.sampled_from([") ", ": ", ". ", ").", " - ", " — ", "** ", ", ", "\n", "} "])
OPTION_TEXTS = st.sampled_from(
    [
        *("12", "-5", "0.5", "45%", "3 m/s", "$12", "€3.50", "1/2", "x = 4", "Paris", "red wine", "-x", "2, 3", "½"),
        *("the dog", "12 and 13", ""),
    ]
)


@given(st.sampled_from("ABCD"), WRAPPED_LETTERS, SEPARATORS, OPTION_TEXTS, st.sampled_from(MODES))
def test_the_text_of_an_option_changes_no_letter(letter, wrapper, separator, words, mode):
    text = f"C is tempting. The best answer is {wrapper.format(letter)}{separator}{words}"
    found = MMLU_ANSWER.with_mode(mode).parse(text)
    assert found is not None
    assert found.value == letter


@pytest.mark.parametrize("written", ["B) 12}", "A only", "A (not B)", "A because B is wrong", "D rather than C", "C}."])
def test_a_letter_with_a_reason_or_a_closing_brace_is_read(written):
    assert MMLU_ANSWER.parse(f"The best answer is {written}").value == written[0]


@pytest.mark.parametrize("glue", ["{}1", "{}-1", "{}+", "{}²", "{}_1", "{}'s", "{}/C", "{} & C", "{}x"])
def test_a_letter_that_is_a_piece_of_more_is_no_choice(glue):
    assert MMLU_ANSWER.parse(f"The best answer is {glue.format('B')}") is None


@given(COUNTS, COUNTS, st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1, max_size=2))
@example(1, 234, "'")
@example(10, 2, "**")
@example(1, 2, "⁄")
def test_digits_glued_together_are_one_number_or_none(one, other, glue):
    text = f"The final answer is {one}{glue}{other}"
    for mode in MODES:
        found = GSM8K_ANSWER.with_mode(mode).parse(text)
        assert found is None or found.value_span[1] == len(text)


SCALES = ["k", "K", " thousand", " million", " Million", " billion", "M", "bn", " hundred", " dozen", " lakh", " crore"]
OTHERS = [
    *("²", "⁻²", "^2", "**2", "!", "½x", "x", "π", "i", "\\pi", "\\sqrt{3}", "…", "...", "‰", "+", " ± 1", "ish"),
    *(" squared", " thirds", " and a half", " or more", " at most", " plus tax", "万", "e", " point 5", " factorial"),
]


@given(st.integers(1, 999), st.sampled_from(SCALES + OTHERS), st.sampled_from(["", " dollars", "."]))
def test_a_suffix_that_changes_a_number_is_understood_or_makes_it_unreadable(number, suffix, end):
    found = GSM8K_ANSWER.parse(f"The final answer is {number}{suffix}{end}")
    if found is not None:
        assert suffix in SCALES
        power = {"k": 3, "t": 3, "h": 2, "m": 6, "b": 9}[suffix.strip().lower()[0]]
        assert GSM8K_ANSWER.canonical(found.value) == number * 10**power


LOCAL_SCALES = [
    *("Mio.", "Mrd.", "Tsd.", "mln", "tys.", "bin", "milyon", "milyar", "juta", "ribu", "triệu", "nghìn", "χιλιάδες"),
    *("тысяч", "ألف", "مليون", "tisíc", "tusen", "duizend", "ezer", "mill", "mio", "miliardi", "milhões", "millió"),
]
LOCAL_HEDGES = [
    *("oder mehr", "and above", "and up", "upwards", "and counting", "and a bit", "doubled", "halved", "tripled"),
    *("percent less", "(base 9)", "(mod 20)", "i.e. 5000", "(i.e., 5000)", "(thirty)"),
]


@given(st.integers(100, 999), st.sampled_from(LOCAL_SCALES + LOCAL_HEDGES), st.sampled_from(["", " dollars", "."]))
def test_scales_of_other_languages_and_hedges_make_a_number_unreadable(number, suffix, end):
    assert GSM8K_ANSWER.parse(f"The final answer is {number} {suffix}{end}") is None


@pytest.mark.parametrize(
    "written",
    [
        "18만",
        "18천",
        "18억",
        "18-odd",
        "18（或20）",
        "17.6, which rounds to 18",
        "18 = 20",
        "1/3 = 0.333",
        "0,018",
        "18 (twenty)",
    ],
)
def test_a_number_that_is_not_the_whole_value_is_unreadable(written):
    assert GSM8K_ANSWER.parse(f"The final answer is {written}") is None


@pytest.mark.parametrize(
    "written", ["18 (eighteen)", "18 (i.e., 18)", "36/2 = 18", "1800% = 18", "18 binders", "18 milligrams"]
)
def test_a_value_said_twice_or_a_unit_that_begins_like_a_scale_is_read(written):
    assert GSM8K_ANSWER.parse(f"The final answer is {written}") is not None


SECOND_THOUGHTS = st.sampled_from(
    [
        *(
            " No wait, it is {}.",
            " I mean {}.",
            " But it might be {}.",
            " It could be {}.",
            " But {} could be right too.",
        ),
        *(
            "\n\nWait, that's wrong. It should be {}.",
            " Sorry, I meant {}.",
            " Wait, I think it is {}.",
            " It could also be {}.",
        ),
    ]
)


@given(COUNTS, COUNTS, st.permutations("ABCD"), SECOND_THOUGHTS, st.sampled_from(MODES))
def test_an_answer_taken_back_in_the_next_sentence_is_none(one, other, letters, thought, mode):
    assume(one != other)
    assert GSM8K_ANSWER.with_mode(mode).parse(f"The final answer is {one}.{thought.format(other)}") is None
    assert MMLU_ANSWER.with_mode(mode).parse(f"The best answer is {letters[0]}.{thought.format(letters[1])}") is None
    # The same value again takes nothing back.
    assert GSM8K_ANSWER.with_mode(mode).parse(f"The final answer is {one}.{thought.format(one)}") is not None


@pytest.mark.parametrize(
    ("written", "value"), [("$5m", 5 * 10**6), ("$5 M", 5 * 10**6), ("5 m", 5), ("5m", 5), ("$5mm", None)]
)
def test_m_is_million_behind_a_currency_and_metres_elsewhere(written, value):
    found = GSM8K_ANSWER.parse(f"The final answer is {written}")
    assert (None if found is None else GSM8K_ANSWER.canonical(found.value)) == value


@given(st.text(st.characters(categories=["L"]), min_size=2, max_size=12), st.sampled_from(MODES), st.booleans())
@example("Paris", "flexible", False)
def test_an_announced_answer_that_cannot_be_read_is_none_whatever_stands_before_it(word, mode, boxed):
    assume(GSM8K_ANSWER.canonical(word) is None and word.lower() not in ("correct", "right", "wrong"))
    announced = f"\\boxed{{{word}}}" if boxed else word
    text = f"The final answer is 7. In 1999 there were 3. No: the final answer is {announced}."
    assert GSM8K_ANSWER.with_mode(mode).parse(text) is None


@pytest.mark.parametrize("more", [" I hope the final answer is correct.", "\nThe final answer is", " The answer is:\n"])
def test_an_announcement_of_nothing_takes_no_earlier_answer_back(more):
    assert GSM8K_ANSWER.with_mode("flexible").parse(f"The final answer is 18.{more}").value == "18"


@given(st.text(alphabet=r"\{}boxed frac$()0123456789.,/-+=^* anslwer<>#:AB" + "\n\u2212½²k'", max_size=80))
def test_any_text_is_parsed_without_error_and_spans_point_at_the_value(text):
    for answer_format in FORMATS.values():
        found = answer_format.with_mode("flexible").parse(text)
        if found is not None:
            assert text[slice(*found.value_span)] == found.value
            assert found.marker_span[1] == found.value_span[0]
            assert answer_format.canonical(found.value) is not None


PIECES = [
    *("1,", "1", "12,", "1.", "1 ", "1/", "1'234", "１", "½", "1 + ", "x = ", "10^", "1e", "k", "-", "(", "5(", "or "),
    *("\\boxed{", "{", "\\text{", "\\frac{1}{", "**", "####", "#### a\n", "<ans>", " ", "\n", "A ", "A, ", "the "),
    *(
        "final answer is ",
        "answer to ",
        "answer for x ",
        "answer is 1",
        "answer is A ",
        "answer is 5 or ",
        "the  final",
    ),
    *("18. But ", "18. It may ", "answer is 5. Wait ", "5 = ", "answer is 5, "),
    *("the  final", "final answer is correct ", "answer is \\boxed{5} and ", "18. "),
]


@pytest.mark.parametrize("piece", PIECES)
def test_time_is_linear_in_the_text(piece):
    def seconds(length: int) -> float:
        text = piece * (length // len(piece))
        best = math.inf
        for _ in range(4):
            start = time.process_time()
            for answer_format in FORMATS.values():
                answer_format.parse(text)
                answer_format.with_mode("flexible").parse(text)
            best = min(best, time.process_time() - start)
        return best

    # 8 where time is linear, 64 where it is quadratic; halfway between on a logarithmic scale.
    assert seconds(40_000) < 23 * max(seconds(5_000), 1e-3)
