"""The files and the table that a before / after comparison leaves behind."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from atmanrl.plots import plot_comparison, plot_training
from atmanrl.records import Run
from atmanrl.report import print_summary, write_page
from atmanrl.summary import Summary, compare

SUMMARY, PAGE, PLOTS = "summary.json", "report.html", "plots"


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
    """Compare two runs; write ``summary.json``, ``plots/`` and ``report.html``, and print the table.

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
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    summary = compare(before, after, seed=seed)
    summary.save(directory / SUMMARY)
    metrics = directory / "metrics.jsonl" if metrics is None else Path(metrics)
    plots = plot_comparison(summary, directory / PLOTS, before.score)
    if metrics.is_file():
        plots += plot_training(metrics, directory / PLOTS)
    write_page(directory / PAGE, before, after, title=title, note=note, summary=summary, plots=plots)
    print_summary(summary, console)
    return summary
