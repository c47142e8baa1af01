import io
from dataclasses import replace

import pytest
from rich.console import Console

from atmanrl.evaluation.summary import compare, summarize
from atmanrl.report import markdown_table, print_run, print_summary, render_page
from tests.atmanrl.saliency_runs import rollout, run


def printed(function, value, **options):
    file = io.StringIO()
    function(value, Console(file=file, **options))
    return file.getvalue()


@pytest.fixture
def comparison():
    classes = ["other", "needed", "filler"]
    before = run(*(rollout(f"p{i}", classes=classes, correct=i > 0) for i in range(4)))
    after = run(*(rollout(f"p{i}", ("a", " 6"), (0.1, 0.5), classes[:2]) for i in range(4)), label="after")
    return compare(before, after)


def test_a_wide_terminal_gets_a_line_per_metric_with_value_and_interval(comparison):
    lines = printed(print_summary, comparison, width=120).splitlines()
    accuracy = next(line for line in lines if line.startswith("accuracy"))
    assert accuracy.split("  ")[0] == "accuracy (%)"
    assert "75.0 [25.0, 100.0]" in accuracy
    assert "+25.0 [+0.0, +75.0]" in accuracy
    assert len(lines) == 1 + len(comparison.rows) + 1


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_narrow_terminal_loses_no_number(comparison, width):
    output = printed(print_summary, comparison, width=width)
    assert max(map(len, output.splitlines())) <= width
    squeezed = "".join(output.split())
    for text in ("75.0", "[25.0,100.0]", "[+0.0,+75.0]"):
        assert text in squeezed or width < 60


def test_a_file_gets_no_escape_sequences(comparison):
    assert "\x1b" not in printed(print_summary, comparison)
    assert "\x1b" not in printed(print_run, run(rollout()))


def test_a_terminal_gets_a_background_for_salient_tokens_only():
    item = run(rollout(texts=("flat", " high"), restored=(0.00995, 0.51)))
    output = printed(print_run, item, force_terminal=True, color_system="truecolor")
    assert "48;2;213;94;0mhigh" in output
    assert "flat \x1b" in output


def test_without_colour_the_highest_tokens_are_listed_with_their_scores():
    output = printed(print_run, run(rollout(texts=("a", " 6", " ~"), restored=(0.1, 0.4, 0.02))), width=100)
    assert "highest restored: 6 @2 0.400, a @1 0.100, ~ @3 0.020" in output


def test_small_scores_keep_their_digits():
    output = printed(print_run, run(rollout(restored=(0.00021, -0.0000004, 0.0))), width=100)
    assert "a @1 0.00021, ~ @3 0.000, 6 @2 −4e−07" in output


def test_tokens_cannot_control_the_terminal_or_its_markup():
    item = rollout(texts=("\x1b[2J", "[red]x[/red]", "\u202e"), prompt_id="\x1b]0;title\x07")
    output = printed(print_run, run(item), force_terminal=True, color_system=None)
    assert "\x1b" not in output
    assert "\x07" not in output
    assert "⟨U+001B⟩[2J" in output
    assert "[red]x[/red]" in output


def test_a_rollout_without_saliency_says_why():
    assert "no saliency: no answer found" in printed(print_run, run(rollout(restored=None, skipped="no answer found")))


def test_one_of_a_kind_is_counted_in_the_singular():
    one = run(rollout("p0", ("a",), (0.1,)))
    assert "1 token," in printed(print_run, one)
    assert "1 prompt, 1 completion per run" in " ".join(printed(print_summary, summarize(one)).split())
    page = render_page(one)
    assert ">1 token<" in page
    assert "1 prompt, 1 completion" in page


def test_one_run_is_summarised_without_a_difference():
    output = printed(print_summary, summarize(run(rollout(), rollout("p1"))), width=100)
    assert "difference" not in output
    assert "before" in output


def test_the_markdown_table_has_a_row_per_metric_and_survives_its_labels(comparison):
    hostile = replace(comparison, labels=("a|b\n", "after"))
    lines = markdown_table(hostile).splitlines()
    assert lines[0] == r"|  | a\|b↵ | after | difference |"
    assert {line.replace(r"\|", "").count("|") for line in lines[: 2 + len(comparison.rows)]} == {5}
    assert lines[2] == "| accuracy (%) | 75.0 [25.0, 100.0] | 100.0 [100.0, 100.0] | +25.0 [+0.0, +75.0] |"
    assert "4 prompts" in lines[-1]
