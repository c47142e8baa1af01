"""``atmanrl compare``, and the files and the table that an evaluation or a comparison leaves behind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from atmanrl.evaluation.records import RESTORED, Run, check_writable, paired_rollouts, write_text_atomically
from atmanrl.evaluation.summary import Summary, compare, spearman, summarize
from atmanrl.report import markdown_table, print_summary, write_page
from atmanrl.report.plots import plot_comparison, plot_training

SUMMARY, TABLE, PAGE, PLOTS = "summary.json", "summary.md", "report.html", "plots"
REPORT = (SUMMARY, TABLE, PAGE, f"{PLOTS}/classes.svg")


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


def with_scores_of(first: Run, second: Run) -> Run:
    """The completions that two runs share, with the scores of both.

    Measures say how far the scores agree within a completion: ``spearman_with_S``, the rank correlation with the second
    run's score S, and ``top_fifth_shared_with_S``, the share of the highest fifth of the tokens (at least one) that is
    the highest fifth of the other as well.

    Raises:
        ValueError: if the runs share no prompt, or completions that ought to be the same are not.
    """
    name = second.score
    records = []
    for one, other in paired_rollouts(first, second):
        if (one.cot.ids, one.answer.ids) != (other.cot.ids, other.answer.ids):
            raise ValueError(
                f"{first.label!r} is scored by {first.score!r}, {second.label!r} by {name!r}, and the completions of"
                f" prompt {one.prompt_id!r} differ: neither scores nor completions can be compared"
            )
        measures = {**one.measures}
        if first.score in one.scores and name in other.scores:
            pair = one.scores[first.score], other.scores[name]
            found = {f"spearman_with_{name}": spearman(*pair), f"top_fifth_shared_with_{name}": _top_shared(*pair)}
            measures |= {key: value for key, value in found.items() if math.isfinite(value)}
        its_own = {name: other.scores[name]} if name in other.scores else {}
        records.append(replace(one, scores={**other.scores, **one.scores, **its_own}, measures=measures))
    # The mask's settings fix its scale: of the run whose mask is shown.
    masked = second if name == RESTORED else first
    settings = {**first.settings, "mask": masked.settings.get("mask"), "second": second.settings}
    return Run(f"{first.label}, {first.score} and {name}", tuple(records), first.score, settings)


def _top_shared(one: Sequence[float], other: Sequence[float]) -> float:
    count = max(1, round(len(one) / 5))
    highest = [set(sorted(range(len(values)), key=lambda i: -values[i])[:count]) for values in (one, other)]
    return len(highest[0] & highest[1]) / count


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


def compare_command(before: Path, after: Path, *, output: Path | None = None) -> int:
    """Print the paired comparison of two files; with ``output`` also write its report there.

    Two runs of one score are compared prompt by prompt; two scores of the same completions token by token.

    Raises:
        ValueError: for files that are no runs, share no prompt, or differ both in their scores and their completions.
    """
    if output is not None:
        for name in REPORT:
            check_writable(output / name, "--output", made=True)
    first, second = Run.load(before), Run.load(after)
    console = Console(highlight=False)
    if first.score != second.score:
        both = with_scores_of(first, second)
        if output is None:
            print_summary(summarize(both), console)
        else:
            title = f"{first.score} and {second.score}"
            write_single(output, both, title=title, console=console)
            console.print(f"written: {output}", markup=False)
        return 0
    if output is None:
        print_summary(compare(first, second), console)
        return 0
    write_comparison(output, first, second, title=f"{first.label} and {second.label}", console=console)
    console.print(f"written: {output}", markup=False)
    return 0
