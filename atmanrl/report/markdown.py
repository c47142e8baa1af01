"""A summary as a Markdown table."""

from __future__ import annotations

from atmanrl.evaluation.intervals import Estimate
from atmanrl.evaluation.summary import Summary
from atmanrl.report.glyphs import visible
from atmanrl.report.numbers import footnote, interval, number


def markdown_table(summary: Summary) -> str:
    """The metrics as a GitHub-flavoured table, with a line that says what the intervals are.

    Args:
        summary: of `atmanrl.evaluation.summary.summarize` or `compare`.
    """
    paired = len(summary.labels) == 2
    columns = ["", *summary.labels, *(["difference"] if paired else [])]
    lines = [_row(columns), _row(["---", *["---:"] * (len(columns) - 1)])]
    for row in summary.rows:
        cells = [_cell(estimate, row.unit) for estimate in row.runs]
        if row.difference is not None:
            cells.append(_cell(row.difference, row.unit, sign=True))
        lines.append(_row([f"{row.label} ({row.unit})" if row.unit else row.label, *cells]))
    return "\n".join([*lines, "", f"{footnote(summary)}. {summary.warning}".rstrip(), ""])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(_escaped(cell) for cell in cells)} |"


def _escaped(text: str) -> str:
    return " ".join(visible(text).split()).replace("|", r"\|") if text else ""


def _cell(estimate: Estimate, unit: str, *, sign: bool = False) -> str:
    return f"{number(estimate.value, unit, sign=sign)} {interval(estimate, unit, sign=sign)}".rstrip()
