"""Tables and learning curves of credit assignment, from the committed results.

python -m benchmarks.credit_report      the plot; the tables are written by benchmarks.tables
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from atmanrl.report.plots import FIGURE_STYLE
from benchmarks.claim_report import Interval, interval

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "images" / "credit_curves.png"
BASELINE = "none"
NAMES = {
    "none": "uniform",
    "local": "local-chunk",
    "global": "global-anchor",
    "coupled": "coupled rhythm",
    "random": "random",
    "entropy": "entropy",
    "saliency": "saliency",
}
_PANELS = (("local", "global", "coupled"), ("random", "entropy", "saliency"))
_COLOURS = {
    "none": "#17191c",
    "local": "#0072b2",
    "global": "#d55e00",
    "coupled": "#009e73",
    "random": "#8a919c",
    "entropy": "#cc79a7",
    "saliency": "#e69f00",
}


def runs_of(content: dict[str, Any], task: str, arm: str) -> list[dict[str, Any]]:
    """The runs of one arm on one task, by seed."""
    return sorted(
        (run for run in content["runs"] if (run["task"], run["arm"]) == (task, arm)), key=lambda run: run["seed"]
    )


def while_training(run: dict[str, Any]) -> float:
    """Mean accuracy over all generation batches of a run: the area under its learning curve."""
    return statistics.fmean(value for _, value in run["curves"]["accuracy"])


def held_out(run: dict[str, Any]) -> float:
    """Accuracy on held-out prompts after training."""
    return float(run["metrics"]["accuracy"])


def difference(content: dict[str, Any], task: str, arm: str, measure: Any) -> Interval:
    """Interval of a measure minus that of uniform credit with the same seed."""
    own, uniform = (runs_of(content, task, name) for name in (arm, BASELINE))
    by_seed = {run["seed"]: measure(run) for run in uniform}
    return interval([measure(run) - by_seed[run["seed"]] for run in own])


def arm_table(content: dict[str, Any], task: str) -> str:
    """Markdown: accuracy held out and while training, and paired differences from uniform credit."""
    lines = [
        "| credit | held-out accuracy (%) | - uniform | accuracy while training (%) | - uniform | CoT (tokens) |",
        "|---|" + "---:|" * 5,
    ]
    for arm, title in NAMES.items():
        runs = runs_of(content, task, arm)
        cells = [title]
        for measure in (held_out, while_training):
            cells.append(f"{100 * statistics.fmean(map(measure, runs)):.1f}")
            if arm == BASELINE:
                cells.append("")
                continue
            mean, low, high = (100 * value for value in difference(content, task, arm, measure))
            cells.append(f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]")
        cells.append(f"{statistics.fmean(run['metrics']['cot_tokens'] for run in runs):.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def coupling_table(content: dict[str, Any]) -> str:
    """Markdown: what `atmanrl explain --statistics` finds on the starting checkpoint, per task."""
    tasks = list(content["explain"])
    rows: dict[str, list[str]] = {}
    for task in tasks:
        found = content["explain"][task]
        for item in found["couplings"]:
            cell = f"{item['observed']:.3f} / {item['expected']:.3f} ({100 * item['lift']:+.0f} %)"
            rows.setdefault(f"{item['name']}: observed / by chance", []).append(cell)
        changed = found["perturbation"]
        cell = f"{changed['high']:.3f} / {changed['low']:.3f}"
        rows.setdefault("Jaccard after a replaced token, high / low FAI", []).append(cell)
        rows.setdefault("FAI of needed tokens, AUROC", []).append(f"{found['needed']['auroc']:.3f}")
        rows.setdefault("FAI of needed tokens, mean percentile", []).append(
            f"{100 * found['needed']['percentile']:.0f}"
        )
    lines = ["| | " + " | ".join(tasks) + " |", "|---|" + "---:|" * len(tasks)]
    lines += ["| " + " | ".join([name, *cells]) + " |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"


def statistics_table(content: dict[str, Any]) -> str:
    """Markdown: time and memory of one layer's statistics beside the attention itself and an eager map."""
    lines = [
        f"{content['device']}, {content['threads']} threads, {content['instruction_set']}, torch"
        f" {content['versions']['torch']}, commit {content['commit']}. Milliseconds, and in brackets shares of the"
        " attention's forward.\n",
        "| float32, length | attention forward | what the distance adds to it | WAAD and received | all, afterwards |"
        " eager map | peak MiB: WAAD and received | all, afterwards | eager map |",
        "|---|" + "---:|" * 8,
    ]
    # Three lengths show the course; the file has more, and bfloat16.
    for row in (
        row for row in content["results"] if row["dtype"] == "float32" and row["length"] in (1024, 8192, 32768)
    ):
        ms, peak = row["ms"], row["peak_mib"]
        forward = ms["attention forward"]
        cells = [str(row["length"]), f"{forward:.1f}"]
        cells.append(_share(ms["attention with distance"] - forward, forward))
        cells += [_share(ms[name], forward) for name in ("WAAD and received", "all from q, k, lse")]
        if "eager map" in ms:
            cells.append(f"{ms['eager map']:.0f}")
        else:
            cells.append("" if not peak else f"not run: a map has {row['map_mib']:.0f} MiB")
        measured = ("WAAD and received", "all from q, k, lse", "eager map")
        cells += [f"{peak[name]:.1f}" if name in peak else "" for name in measured]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def observed_table(content: dict[str, Any]) -> str:
    """Markdown: what WAAD and FAI add to a forward of a whole model."""
    lines = [
        f"{content['device']}, {content['threads']} threads, {content['instruction_set']}, torch"
        f" {content['versions']['torch']}, commit {content['commit']}. Packed forwards of"
        f" {content['results'][0]['layers']} layers and 30 M parameters, fp32, in milliseconds. The series' own forward"
        " runs equal prompts once.\n",
        "| rollouts x (prompt + response) | forward | observed | in the observer (of the forward) | own forward |",
        "|---|" + "---:|" * 4,
    ]
    for row in content["results"]:
        forward, observed, own = (row["ms"][name] for name in ("forward", "observed", "own forward"))
        lines.append(
            f"| {row['rollouts']} x ({row['prompt']} + {row['response']}) | {forward:.0f} |"
            f" {observed:.0f} ({100 * (observed / forward - 1):+.1f} %) |"
            f" {_share(row['ms']['in the observer'], forward)} | {own:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _share(part: float, whole: float) -> str:
    return f"{part:.1f} ({100 * part / whole:.1f} %)"


def latest(kind: str) -> tuple[Path, dict[str, Any]] | None:
    """The committed results file of a kind and its content, if there is one."""
    return next(((path, json.loads(path.read_text())) for path in RESULTS.glob(f"{kind}_*.json")), None)


def costs() -> str:
    """The part of docs/benchmarks.md that shows what the statistics cost."""
    parts = []
    for title, kind, table in (
        ("one layer", "statistics", statistics_table),
        ("a whole model", "observed_forward", observed_table),
    ):
        timed = latest(kind)
        parts += [f"### {title.capitalize()}\n", "Not yet measured.\n" if timed is None else table(timed[1])]
    return "\n".join(parts)


def arms() -> str:
    """The part of docs/ledger.md that shows the arms."""
    found = latest("credit")
    if found is None:
        return "Not yet measured.\n"
    path, content = found
    parts = [
        f"`benchmarks/results/{path.name}`, made by `make credit`. Means over seeds; differences are paired by seed,"
        " with 95 % Student intervals.\n"
    ]
    for task in content["tasks"]:
        start = content["start"][task]["accuracy"]
        seeds = len(runs_of(content, task, BASELINE))
        parts += [f"**{task}**, {seeds} seeds, start {100 * start:.1f} %\n", arm_table(content, task)]
    parts += ["**The starting checkpoint's attention**\n", coupling_table(content)]
    return "\n".join(parts)


def plot(content: dict[str, Any], path: Path) -> None:
    """Accuracy over the optimiser steps, one row per task: each arm's mean, with the interval of uniform credit."""
    tasks = list(content["tasks"])
    with mpl.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(9.5, 3.2 * len(tasks)), layout="constrained")
        axes = figure.subplots(len(tasks), 2, sharey="row", squeeze=False)
        for row, task in zip(axes, tasks, strict=True):
            for axis, arms in zip(row, _PANELS, strict=True):
                _curves(axis, content, task, (BASELINE, *arms))
            row[0].set_ylabel(f"{task}: accuracy while training (%)")
            # Student intervals do not know that nothing lies above.
            row[0].set_ylim(top=min(row[0].get_ylim()[1], 100))
        for axis in axes[-1]:
            axis.set_xlabel("optimiser step")
        figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": None})


def _curves(axis: Axes, content: dict[str, Any], task: str, arms: Sequence[str]) -> None:
    for arm in arms:
        curves = [run["curves"]["accuracy"] for run in runs_of(content, task, arm)]
        steps = [step for step, _ in curves[0]]
        # Three batches together: one has 64 rollouts.
        smooth = [_moving([100 * value for _, value in curve]) for curve in curves]
        found = [interval(values) for values in zip(*smooth, strict=True)]
        axis.plot(steps, [one.mean for one in found], color=_COLOURS[arm], linewidth=1.8, label=NAMES[arm])
        strength = 0.18 if arm == BASELINE else 0.08
        low, high = [one.low for one in found], [one.high for one in found]
        axis.fill_between(steps, low, high, color=_COLOURS[arm], alpha=strength, linewidth=0)
    axis.legend(loc="lower right", frameon=False)


def _moving(values: Sequence[float]) -> list[float]:
    return [statistics.fmean(values[max(0, i - 1) : i + 2]) for i in range(len(values))]


def main() -> int:
    found = latest("credit")
    if found is None:
        print("there are no results; run python -m benchmarks.credit", file=sys.stderr)
        return 1
    plot(found[1], PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
