"""Text views: what a token, a number, a summary and a chain of thought look like in a terminal or in Markdown."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from atmanrl.evaluation.records import RolloutRecord, Run
from atmanrl.evaluation.summary import AGREEMENT, Estimate, Summary
from atmanrl.report.scale import LEVELS, Scale, scale_for

_NAMED = {"\n": "↵\n", "\t": "⇥\t"}
# Control, format (bidi overrides, zero-width), private-use, surrogate and unassigned characters, line separators.
_INVISIBLE = {"Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp"}
# Joiners inside emoji sequences and scripts that need them are harmless and change the shape of real words.
_JOINERS = {"\u200c", "\u200d"}


def visible(text: str) -> str:
    """``text`` with newlines and tabs marked and every other invisible character written as ⟨U+202E⟩.

    A space alone becomes ␣, and a token that completes no character becomes ◌.
    """
    if not text:
        return "◌"
    if text.isspace() and "\n" not in text and "\t" not in text:
        return "␣" * len(text)
    return "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    if character in _JOINERS or unicodedata.category(character) not in _INVISIBLE:
        return character
    return f"⟨U+{ord(character):04X}⟩"


_NONE = "–"


def number(value: float | None, unit: str = "", *, sign: bool = False) -> str:
    """A value with a sensible number of digits, shares times 100 (the unit stands in the label); "–" for None.

    Numbers without a unit below 0.001 keep two significant digits.
    """
    if value is None:
        return _NONE
    if unit == "%":
        value *= 100
    if not unit and 0 < abs(value) < 0.001:
        return f"{value:{'+' if sign else ''}.2g}".replace("-", "−")
    digits = 1 if unit == "%" else 2 if unit or abs(value) >= 1 else 3
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def interval(estimate: Estimate, unit: str = "", *, sign: bool = False) -> str:
    """The interval as "[low, high]", "" where there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"[{number(estimate.low, unit, sign=sign)}, {number(estimate.high, unit, sign=sign)}]"


def loss(value: float) -> str:
    """A loss with two significant digits, which may span many orders of magnitude."""
    return f"{value:.2g}"


def tick(value: float) -> str:
    """A value on a colour scale, which may span any range, with two significant digits."""
    return f"{value:.2g}".replace("-", "−")


def counted(count: int, noun: str) -> str:
    """ "1 token", "2 tokens"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def footnote(summary: Summary) -> str:
    """Numbers of prompts and completions, and the kind of the intervals."""
    paired = ", paired differences" if len(summary.labels) == 2 else ""
    return (
        f"{counted(summary.prompts, 'prompt')}, {counted(summary.rollouts, 'completion')} per run; "
        f"{summary.confidence:.0%} percentile bootstrap intervals over prompts, {summary.resamples} resamples{paired}"
    )


def markdown_table(summary: Summary) -> str:
    """The metrics as a GitHub-flavoured table, with a line that says what the intervals are.

    Args:
        summary: of `atmanrl.evaluation.summary.summarize` or `compare`.
    """
    paired = len(summary.labels) == 2
    columns = ["", *summary.labels, *(["difference"] if paired else [])]
    lines = [_row(columns), _row(["---", *["---:"] * (len(columns) - 1)])]
    for row in summary.rows:
        cells = [_plain_cell(estimate, row.unit) for estimate in row.runs]
        if row.difference is not None:
            cells.append(_plain_cell(row.difference, row.unit, sign=True))
        lines.append(_row([f"{row.label} ({row.unit})" if row.unit else row.label, *cells]))
    return "\n".join([*lines, "", f"{footnote(summary)}. {summary.warning}".rstrip(), ""])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(_escaped(cell) for cell in cells)} |"


def _escaped(text: str) -> str:
    return " ".join(visible(text).split()).replace("|", r"\|") if text else ""


def _plain_cell(estimate: Estimate, unit: str, *, sign: bool = False) -> str:
    return f"{number(estimate.value, unit, sign=sign)} {interval(estimate, unit, sign=sign)}".rstrip()


_UP, _DOWN = (213, 94, 0), (0, 114, 178)
_TOP_TOKENS = 8
_UNBOUNDED = 1000


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """The metrics as a table: a column per run and, for two runs, their paired difference, each with its interval.

    Args:
        summary: of `atmanrl.evaluation.summary.summarize` or `compare`.
        console: where to; None: standard output.
    """
    console = console or Console()
    table = _table(summary, " ")
    if console.measure(table, options=console.options.update(width=_UNBOUNDED)).maximum > console.width:
        table = _table(summary, "\n")
    console.print(table)
    console.print(Text(footnote(summary), style="dim"))
    if summary.warning:
        console.print(Text(summary.warning, style="yellow"))


def print_run(run: Run, console: Console | None = None) -> None:
    """Every rollout's chain of thought coloured by saliency, with its highest tokens listed.

    Without colours the list alone tells the scores. Characters that could move the cursor are shown as code points.

    Args:
        run: shown by its own score, ``run.score``.
        console: where to; None: standard output.
    """
    console = console or Console()
    scale = scale_for([run], run.score)
    for rollout in run.rollouts:
        _print_rollout(rollout, run.score, scale, console)


def _print_rollout(rollout: RolloutRecord, score: str, scale: Scale, console: Console) -> None:
    verdict = {True: "correct", False: "wrong", None: "not graded"}[rollout.correct]
    facts = [counted(len(rollout.cot), "token"), verdict, *(["truncated"] if rollout.truncated else [])]
    console.print(Text.assemble((visible(rollout.prompt_id), "bold"), (f"  {', '.join(facts)}", "dim")))
    values = rollout.scores.get(score)
    text = Text()
    for i, token in enumerate(rollout.cot.texts):
        shown = visible(token)
        lead = len(shown) - len(shown.lstrip()) if token.strip() else 0
        text.append(shown[:lead])
        text.append(shown[lead:], style=_style(scale.level(values[i])) if values else "")
    console.print(text)
    ending = Text(visible(rollout.marker.text) if len(rollout.marker) else "", style="dim")
    ending.append(visible(rollout.answer.text) if len(rollout.answer) else " (no answer)", style="bold")
    console.print(ending)
    if values is None:
        console.print(Text(f"no saliency: {rollout.skipped or 'not computed'}", style="dim"))
    else:
        for name in (score, *(other for other in rollout.scores if other != score)):
            console.print(Text(f"highest {name}: {_highest(rollout, rollout.scores[name])}", style="dim"))
        if (agreement := rollout.measures.get(AGREEMENT)) is not None:
            console.print(Text(f"rank correlation of {score} with deletion: {number(agreement)}", style="dim"))
    console.print()


def _table(summary: Summary, separator: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold")
    for label in (*summary.labels, *(["difference"] if len(summary.labels) == 2 else [])):
        table.add_column(Text(visible(label)), justify="right", overflow="fold")
    for row in summary.rows:
        cells = [_cell(item, row.unit, separator) for item in row.runs]
        if row.difference is not None:
            cells.append(_cell(row.difference, row.unit, separator, sign=True))
        table.add_row(Text(f"{row.label} ({row.unit})" if row.unit else row.label), *cells)
    return table


def _cell(estimate: Estimate, unit: str, separator: str, *, sign: bool = False) -> Text:
    bounds = interval(estimate, unit, sign=sign)
    return Text.assemble(number(estimate.value, unit, sign=sign), (f"{separator}{bounds}" if bounds else "", "dim"))


def _highest(rollout: RolloutRecord, values: Sequence[float]) -> str:
    top = sorted(range(len(values)), key=lambda i: -values[i])[:_TOP_TOKENS]
    return ", ".join(f"{visible(rollout.cot.texts[i]).strip()} @{i + 1} {_score(values[i])}" for i in top)


def _score(value: float) -> str:
    # Scores of a long chain of thought are small.
    return number(value) if value == 0 or abs(value) >= 0.01 else tick(value)


def _style(level: int) -> str:
    if level == 0:
        return ""
    share = abs(level) / LEVELS
    red, green, blue = (round(255 + (channel - 255) * share) for channel in (_UP if level > 0 else _DOWN))
    return f"#17191c on #{red:02x}{green:02x}{blue:02x}"
