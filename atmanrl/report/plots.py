"""Pictures of a training run and of a before / after comparison, each for light and for dark backgrounds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from atmanrl.evaluation.records import FILLER, NEEDED, OTHER, RESTORED
from atmanrl.evaluation.summary import Row, Summary
from atmanrl.report import Plot

GRID_COLOUR = "#e4e6e9"
# matplotlib types its parameters by their names, of which a mapping of strings is none.
FIGURE_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": GRID_COLOUR,
    "grid.color": GRID_COLOUR,
}
TITLE_STYLE: Any = {
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


# Okabe and Ito's palette, told apart under every common colour blindness.
_BLUE, _VERMILLION, _GREEN, _SKY, _ORANGE = "#0072b2", "#d55e00", "#009e73", "#56b4e9", "#e69f00"
_CLASS_COLOURS = {NEEDED: _VERMILLION, FILLER: _BLUE, OTHER: _GREEN}
_SMOOTHING_SHARE = 0.1


@dataclass(frozen=True)
class _Theme:
    suffix: str
    ink: str
    muted: str
    grid: str


_THEMES = (_Theme("", "#17191c", "#5c636d", GRID_COLOUR), _Theme(".dark", "#eceef1", "#a2a9b3", "#33383f"))


@dataclass(frozen=True)
class _Curve:
    key: str
    label: str
    colour: str


@dataclass(frozen=True)
class _Panel:
    title: str
    unit: str
    curves: tuple[_Curve, ...]
    scale: float = 1.0


def plot_training(metrics: str | Path, directory: str | Path) -> list[Plot]:
    """Reward, accuracy, chain-of-thought length, filler and restored per class over the optimiser steps.

    Faint lines are the logged values (each a mean over one batch of completions), strong lines their centred moving
    average over a tenth of the run. A panel whose values were not logged is left out.

    Args:
        metrics: ``metrics.jsonl`` of a run: one JSON object per line with "step".
        directory: where ``training.svg``, ``training.dark.svg`` and ``training.png`` are written.

    Returns:
        One picture, or none where fewer than two steps were logged.

    Raises:
        ValueError: for a line that is not a JSON object, naming file and line.
    """
    rows = _read_metrics(Path(metrics))
    classes = sorted({key.removeprefix("cot/") for row in rows for key in row if key.startswith("cot/")} - {"tokens"})
    by_class = [(name, _class_colour(name)) for name in sorted(classes, key=_class_order)]
    panels = [
        _Panel(
            "Reward",
            "mean over completions",
            (
                _Curve("reward", "total", _VERMILLION),
                _Curve("rewards/outcome/mean", "outcome", _BLUE),
                _Curve("rewards/saliency/mean", "saliency", _GREEN),
            ),
        ),
        _Panel("Accuracy of sampled answers", "%", (_Curve("answers/accuracy", "accuracy", _BLUE),), scale=100),
        _Panel("Chain-of-thought length", "tokens", (_Curve("cot/tokens", "length", _BLUE),)),
        _Panel("Tokens by class", "tokens per chain of thought", tuple(_Curve(f"cot/{n}", n, c) for n, c in by_class)),
        _Panel(
            "Restored by class",
            "mean restored",
            tuple(_Curve(f"mask/restored/{n}", n, c) for n, c in by_class) or (_Curve("mask/restored", "all", _BLUE),),
        ),
        _Panel("Restored mass", "summed per chain of thought", (_Curve("mask/restored_mass", "mass", _BLUE),)),
    ]
    shown = [panel for panel in panels if any(len(_series(rows, curve.key)[0]) > 1 for curve in panel.curves)]
    if not shown:
        return []

    def draw(figure: Figure, theme: _Theme) -> None:
        columns = min(3, len(shown))
        axes = figure.subplots(-(-len(shown) // columns), columns, squeeze=False).flat
        for axis, panel in zip(axes, shown, strict=False):
            _draw_panel(axis, panel, rows, theme)
        for axis in list(axes)[len(shown) :]:
            axis.set_visible(False)

    size = (3.7 * min(3, len(shown)), 2.7 * -(-len(shown) // 3))
    caption = "Training: batch means (faint) and their moving average"
    return [_save(Path(directory) / "training", caption, size, draw)]


def plot_comparison(summary: Summary, directory: str | Path, score: str = RESTORED) -> list[Plot]:
    """Tokens per chain of thought and mean score of each token class, with the summary's intervals.

    Returns:
        One picture ``classes.svg`` (``classes.dark.svg``, ``classes.png``), or none where no classes are known.
    """
    names = {row.name: row for row in summary.rows}
    classes = [
        name.removesuffix("_tokens") for name in names if name.endswith("_tokens") and name not in ("cot_tokens",)
    ]
    if not classes:
        return []
    percent = f"{100 * summary.confidence:.0f} %"

    def draw(figure: Figure, theme: _Theme) -> None:
        left, right = figure.subplots(1, 2)
        _draw_intervals(left, [names[f"{name}_tokens"] for name in classes], classes, summary.labels, theme)
        left.set(title="Tokens by class", xlabel="tokens per chain of thought")
        _draw_intervals(right, [names[f"{score}_{name}"] for name in classes], classes, summary.labels, theme)
        right.set(title=f"{score.capitalize()} by class", xlabel=f"mean {score}")
        if len(summary.labels) > 1:
            handles, labels = left.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, labelcolor=theme.ink)

    caption = f"Held-out completions by token class, {percent} intervals over {summary.prompts} prompts"
    height = 1.3 + 0.45 * len(classes)
    return [_save(Path(directory) / "classes", caption, (8.0, height), draw)]


def _draw_panel(axis: Axes, panel: _Panel, rows: Sequence[Mapping[str, Any]], theme: _Theme) -> None:
    drawn = 0
    for curve in panel.curves:
        steps, values = _series(rows, curve.key)
        if len(steps) < 2:
            continue
        drawn += 1
        values = panel.scale * values
        axis.plot(steps, values, color=curve.colour, alpha=0.28, linewidth=0.8)
        axis.plot(steps, _moving_average(values), color=curve.colour, linewidth=1.8, label=curve.label)
    axis.set(title=panel.title, xlabel="optimiser step", ylabel=panel.unit)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if drawn > 1:
        axis.legend(
            loc="lower right",
            bbox_to_anchor=(1.02, 0.97),
            ncols=drawn,
            frameon=False,
            labelcolor=theme.ink,
            fontsize=7.5,
            handlelength=1,
            columnspacing=0.9,
            handletextpad=0.4,
        )


def _draw_intervals(
    axis: Axes, rows: Sequence[Row], classes: Sequence[str], labels: Sequence[str], theme: _Theme
) -> None:
    styles = [("o", theme.muted), ("D", _VERMILLION)]
    for run, (label, (marker, colour)) in enumerate(zip(labels, styles, strict=False)):
        offset = 0.0 if len(labels) == 1 else 0.13 * (2 * run - 1)
        drawn_label: str | None = label
        for position, row in enumerate(rows):
            estimate = row.runs[run]
            if estimate.value is None:
                continue
            y = position + offset
            if estimate.low is not None and estimate.high is not None:
                axis.plot([estimate.low, estimate.high], [y, y], color=colour, linewidth=2, solid_capstyle="round")
            axis.plot(
                [estimate.value], [y], marker, color=colour, markersize=6, label=drawn_label, linestyle="none", zorder=3
            )
            drawn_label = None
    axis.set_yticks(range(len(classes)), classes)
    axis.set_ylim(len(classes) - 0.5, -0.5)
    axis.set_xlim(left=min(0.0, axis.get_xlim()[0]))
    axis.grid(axis="y", visible=False)


def _save(stem: Path, caption: str, size: tuple[float, float], draw: Callable[[Figure, _Theme], None]) -> Plot:
    stem.parent.mkdir(parents=True, exist_ok=True)
    for theme in _THEMES:
        with mpl.rc_context(_style(theme)):
            figure = Figure(figsize=size, layout="constrained")
            draw(figure, theme)
            # The page's own background shows through; without a date equal data give equal files.
            figure.savefig(stem.with_name(f"{stem.name}{theme.suffix}.svg"), transparent=True, metadata={"Date": None})
            if not theme.suffix:
                figure.savefig(stem.with_suffix(".png"), dpi=160, facecolor="white")
    return Plot(stem.with_suffix(".svg"), caption, stem.with_name(f"{stem.name}.dark.svg"))


def _style(theme: _Theme) -> Any:
    return {
        **FIGURE_STYLE,
        **TITLE_STYLE,
        "svg.hashsalt": "atmanrl",
        "font.family": "sans-serif",
        "text.color": theme.ink,
        "axes.titlesize": 10,
        "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.grid,
        "axes.facecolor": "none",
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "legend.fontsize": 9,
    }


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    points = [(step, value) for step, value in points if math.isfinite(value)]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _moving_average(values: NDArray[np.float64]) -> NDArray[np.float64]:
    half = max(1, round(_SMOOTHING_SHARE * len(values) / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    start = np.maximum(np.arange(len(values)) - half, 0)
    stop = np.minimum(np.arange(len(values)) + half + 1, len(values))
    average: NDArray[np.float64] = (sums[stop] - sums[start]) / (stop - start)
    return average


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from error
        if not isinstance(row, dict) or "step" not in row:
            raise ValueError(f"{path}, line {number}: expected an object with 'step'")
        rows.append(row)
    return rows


def _class_order(name: str) -> tuple[int, str]:
    return (list(_CLASS_COLOURS).index(name), "") if name in _CLASS_COLOURS else (len(_CLASS_COLOURS), name)


def _class_colour(name: str) -> str:
    return _CLASS_COLOURS.get(name, (_SKY, _ORANGE)[sum(name.encode()) % 2])
