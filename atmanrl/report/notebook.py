"""The page inside a notebook cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from atmanrl.evaluation.records import Run
from atmanrl.report.page import render_page


@dataclass(frozen=True)
class PageView:
    """A rendered page that notebooks display in a frame of its own, so that neither side's styles reach the other.

    Attributes:
        page: the HTML document.
        height: of the frame, in pixels.
    """

    page: str
    height: int = 640

    def _repr_html_(self) -> str:
        frame = (
            '<iframe srcdoc="{}" sandbox="allow-scripts" style="width:100%;height:{}px;border:1px solid #8884;'
            'border-radius:6px;resize:vertical" title="saliency"></iframe>'
        )
        return str(Markup(frame).format(self.page, self.height))


def show(before: Run, after: Run | None = None, *, height: int = 640, **options: Any) -> PageView:
    """One run, or two side by side, for the last line of a notebook cell.

    Args:
        before, after: see `render_page`, as are ``options``.
        height: of the frame, in pixels.
    """
    return PageView(render_page(before, after, **options), height)
