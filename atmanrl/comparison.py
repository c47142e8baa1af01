"""The files and the table that an evaluation or a before / after comparison leaves behind."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from atmanrl.plots import plot_comparison, plot_training
from atmanrl.records import Run, write_text_atomically
from atmanrl.report import markdown_table, print_summary, write_page
from atmanrl.summary import Summary, compare, summarize

SUMMARY, TABLE, PAGE, PLOTS = "summary.json", "summary.md", "report.html", "plots"


def write_comparison(
    directory: str | Path,
    before: Run,
    after: Run,
    *,
    title: str = "Before and after",
    note: str = "",
    metrics: str | Path | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> Summary:
    """Compare two runs; write ``summary.json``, ``summary.md``, ``plots/`` and ``report.html``, and print the table.

    Args:
        directory: where the files go; made if it is missing.
        before, after: runs over the same prompts.
        title, note: heading of the page and a sentence below it.
        metrics: ``metrics.jsonl`` of the training in between, for its curves; ``directory``'s own where None.
        seed: of the bootstrap.
        console: where the table is printed.

    Raises:
        ValueError: if the runs cannot be compared.
    """
    summary = compare(before, after, seed=seed)
    metrics = Path(directory) / "metrics.jsonl" if metrics is None else Path(metrics)
    _write(Path(directory), summary, [before, after], metrics, title=title, note=note, console=console)
    return summary


def write_single(
    directory: str | Path, run: Run, *, title: str, note: str = "", seed: int = 0, console: Console | None = None
) -> Summary:
    """The same files and table for one run."""
    summary = summarize(run, seed=seed)
    _write(Path(directory), summary, [run], None, title=title, note=note, console=console)
    return summary


def _write(
    directory: Path,
    summary: Summary,
    runs: list[Run],
    metrics: Path | None,
    *,
    title: str,
    note: str,
    console: Console | None,
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    summary.save(directory / SUMMARY)
    write_text_atomically(directory / TABLE, markdown_table(summary))
    plots = plot_comparison(summary, directory / PLOTS, runs[0].score)
    if metrics is not None and metrics.is_file():
        plots += plot_training(metrics, directory / PLOTS)
    write_page(directory / PAGE, *runs, title=title, note=note, summary=summary, plots=plots)
    print_summary(summary, console)
