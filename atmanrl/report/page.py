"""The self-contained HTML page: chains of thought coloured by saliency, one run alone or two side by side."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from atmanrl.evaluation.records import (
    DELETION,
    DELETIONS,
    FILLER,
    NEEDED,
    RolloutRecord,
    Run,
    paired_rollouts,
    write_text_atomically,
)
from atmanrl.evaluation.summary import AGREEMENT, Summary, compare, spearman, summarize, token_classes
from atmanrl.report.html import scored_html, span_html
from atmanrl.report.scale import LEVELS, Scale, fitted_scale, fixed_scale, meaning_of, scale_for
from atmanrl.report.text import counted, interval, loss, number, tick

_SHOWN = 40


@dataclass(frozen=True)
class Plot:
    """A picture for the page.

    Attributes:
        path: PNG file, taken into the page.
        caption: plain text below it.
        dark: its twin for dark backgrounds, where there is one.
    """

    path: Path
    caption: str
    dark: Path | None = None


def write_page(path: str | Path, before: Run, after: Run | None = None, **options: Any) -> None:
    """Render the page into one file, atomically.

    Args:
        path: the file; one that is there is replaced.
        before, after: see `render_page`, as are ``options``.
    """
    write_text_atomically(path, render_page(before, after, **options))


def render_page(
    before: Run,
    after: Run | None = None,
    *,
    title: str = "What the answer rests on",
    note: str = "",
    summary: Summary | None = None,
    plots: Sequence[Plot] = (),
    shown: int = _SHOWN,
) -> str:
    """One HTML document without external references, which forbids itself any request.

    Args:
        before: the run to show.
        after: a second run over the same prompts; each prompt's two chains of thought then stand side by side.
        title: heading, plain text.
        note: a sentence under the heading, plain text.
        summary: the headline numbers; computed where None.
        plots: pictures to embed.
        shown: at most this many completions (pairs of completions) are shown; the numbers cover all.

    Raises:
        ValueError: if the two runs cannot be compared.
    """
    runs = [before] if after is None else [before, after]
    if summary is None:
        summary = summarize(before) if after is None else compare(before, after)
    views = [_score_view(runs, name) for name in _scores(runs)]
    rows: list[tuple[RolloutRecord, ...]]
    rows = [(item,) for item in before.rollouts] if after is None else list(paired_rollouts(before, after))
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=title,
            note=note,
            runs=runs,
            summary=summary,
            headline=list(_headline(summary)),
            views=views,
            scales={
                view["name"]: {scale["kind"]: scale["scale"].to_json() for scale in view["scales"]} for view in views
            },
            levels=range(-LEVELS, LEVELS + 1),
            classes=token_classes(item for row in rows for item in row),
            plots=[_embedded(plot) for plot in plots],
            examples=list(islice(_examples(rows, runs, scale_for(runs, before.score)), shown)),
            total=len(rows),
            css=Markup(_asset("page.css")),
            script=Markup(_asset("page.js")),
        )
    )


def _headline(summary: Summary) -> Iterator[Any]:
    wanted = ["accuracy", "cot_tokens", f"{FILLER}_tokens", AGREEMENT]
    by_class = [row.name for row in summary.rows if row.name.endswith((f"_{NEEDED}", f"_{FILLER}"))]
    wanted += by_class or [row.name for row in summary.rows if row.name.endswith(("_mean", "_mass"))]
    for row in summary.rows:
        if row.name in wanted:
            yield row


def _scores(runs: Sequence[Run]) -> list[str]:
    """Every score the runs hold, the one that they are summarised by first."""
    found = dict.fromkeys(name for run in runs for rollout in run.rollouts for name in rollout.scores)
    return [runs[0].score, *(name for name in found if name != runs[0].score)]


def _score_view(runs: Sequence[Run], name: str) -> dict[str, Any]:
    kinds = {"fixed": fixed_scale(runs, name), "fitted": fitted_scale(runs, name)}
    scales = [{"kind": kind, "scale": scale} for kind, scale in kinds.items() if scale is not None]
    return {"name": name, "meaning": meaning_of(name), "scales": scales}


def _examples(rows: Iterable[tuple[RolloutRecord, ...]], runs: Sequence[Run], scale: Scale) -> Iterator[dict[str, Any]]:
    for row in rows:
        first = row[0]
        yield {
            "prompt_id": first.prompt_id,
            "sample": first.sample,
            "prompt": span_html(first.prompt),
            "prompt_length": len(first.prompt),
            "expected": first.expected,
            "sides": [_side(item, run, scale) for item, run in zip(row, runs, strict=True)],
        }


def _side(rollout: RolloutRecord, run: Run, scale: Scale) -> dict[str, Any]:
    # The script colours by the values on the page, so the first colours come from the same ones.
    rounded = {name: [_short(value) for value in values] for name, values in rollout.scores.items()}
    data: dict[str, Any] = {"ids": rollout.cot.ids, "classes": rollout.classes, "scores": rounded}
    if rollout.trajectory is not None:
        data["trajectory"] = {
            "steps": rollout.trajectory.steps,
            "loss": [_short(value) for value in rollout.trajectory.loss],
            "restored": [[_short(value) for value in row] for row in rollout.trajectory.restored],
        }
    return {
        "label": run.label,
        "rollout": rollout,
        "cot": scored_html(rollout, rounded.get(run.score), scale),
        "marker": span_html(rollout.marker),
        "answer": span_html(rollout.answer),
        "rest": span_html(rollout.rest),
        "data": data,
        "agreement": {
            name: spearman(values, rollout.scores[DELETION])
            for name, values in rollout.scores.items()
            if DELETION in rollout.scores and name not in DELETIONS
        },
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _embedded(plot: Plot) -> dict[str, str | None]:
    dark = None if plot.dark is None else _data_uri(plot.dark)
    return {"source": _data_uri(plot.path), "dark": dark, "caption": plot.caption}


def _data_uri(path: Path) -> str:
    kind, _ = mimetypes.guess_type(path.name)
    if kind is None or not kind.startswith("image/"):
        raise ValueError(f"{path}: not a picture by its name; use .svg or .png")
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _asset(name: str) -> str:
    return files("atmanrl.report").joinpath(name).read_text(encoding="utf-8")


def _environment() -> Environment:
    environment = Environment(
        loader=DictLoader({"page.html.j2": _asset("page.html.j2")}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, interval=interval, loss=loss, tick=tick)
    environment.globals.update(counted=counted, zip=zip)
    return environment


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
