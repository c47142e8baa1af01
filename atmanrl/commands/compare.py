"""``atmanrl compare``: two saved runs over the same prompts, paired."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from atmanrl.comparison import write_comparison
from atmanrl.records import Run
from atmanrl.report import print_summary
from atmanrl.summary import compare


def compare_command(before: Path, after: Path, *, output: Path | None = None) -> int:
    """Print the paired comparison of two files; with ``output`` also write its report there.

    Raises:
        ValueError: for files that are no runs, or share no prompt.
    """
    first, second = Run.load(before), Run.load(after)
    console = Console(highlight=False)
    if output is None:
        print_summary(compare(first, second), console)
        return 0
    write_comparison(output, first, second, title=f"{first.label} and {second.label}", console=console)
    console.print(f"written: {output}", markup=False)
    return 0
