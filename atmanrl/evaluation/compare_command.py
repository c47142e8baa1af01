"""``atmanrl compare``: two saved runs over the same prompts, paired, or two scores of the same completions."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from atmanrl.evaluation.comparison import with_scores_of, write_comparison, write_single
from atmanrl.evaluation.records import Run
from atmanrl.evaluation.summary import compare, summarize
from atmanrl.report import print_summary


def compare_command(before: Path, after: Path, *, output: Path | None = None) -> int:
    """Print the paired comparison of two files; with ``output`` also write its report there.

    Two runs of one score are compared prompt by prompt; two scores of the same completions token by token.

    Raises:
        ValueError: for files that are no runs, share no prompt, or differ both in their scores and their completions.
    """
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
