"""The one progress display of the package, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_Item = TypeVar("_Item")


def display() -> Progress:
    """A bar with its name, the count and the time left. It disappears from a terminal when it is finished."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=console.is_terminal)


@contextmanager
def progress_bar(what: str, total: int, shown: bool | None) -> Iterator[Callable[[int], None]]:
    """A bar for the block. The function given sets how much of ``total`` is done; None shows it on a terminal only."""
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda completed: None
        return
    with display() as bar:
        task = bar.add_task(what, total=total)
        yield lambda completed: bar.update(task, completed=completed)


def track(items: Iterable[_Item], what: str, shown: bool | None, *, total: int | None = None) -> Iterator[_Item]:
    """``items`` behind a bar; ``total`` is their number where they have no length."""
    if not (sys.stderr.isatty() if shown is None else shown):
        yield from items
        return
    with display() as bar:
        yield from bar.track(items, total=total, description=what)


class StepsBar:
    """The bar of a long run: a word in front, steps, a line of text behind.

    Args:
        total: steps of the whole run.
        done: steps before this process.
        unit: named behind the count.
    """

    def __init__(self, total: int, done: int = 0, unit: str = "step") -> None:
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("", total=total, completed=done, text="")
        self._progress.start()

    def show(self, *, word: str | None = None, done: int | None = None, text: str | None = None) -> None:
        """Change what is given."""
        fields = {} if text is None else {"text": text}
        self._progress.update(self._task, description=word, completed=done, **fields)  # type: ignore[arg-type]

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._progress.stop()
