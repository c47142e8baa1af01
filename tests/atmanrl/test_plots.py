import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from atmanrl.evaluation.summary import compare, summarize
from atmanrl.report.plots import plot_comparison, plot_training
from tests.atmanrl.saliency_runs import rollout, run


def write_metrics(path, steps=12, **extra):
    rows = [
        {"step": s, "reward": s / 10, "cot/tokens": 10 - s / 3, "cot/filler": 2.0, **extra} for s in range(1, steps + 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def drawn(monkeypatch):
    """Every figure that is saved, in order; the first one is the light SVG."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k))[1])
    return figures


def curves(figure):
    """The points of every line on every visible axis."""
    return [
        np.asarray(line.get_xydata(), dtype=float)
        for axis in figure.axes
        if axis.get_visible()
        for line in axis.get_lines()
    ]


def test_training_draws_the_logged_values_and_their_moving_average(tmp_path, drawn):
    plot_training(write_metrics(tmp_path / "metrics.jsonl", steps=40, **{"answers/accuracy": 0.25}), tmp_path)
    found = curves(drawn[0])
    steps = np.arange(1, 41)
    for values in (steps / 10, 10 - steps / 3, np.full(40, 2.0), np.full(40, 25.0)):
        logged = np.column_stack([steps, values])
        # Two steps on either side, fewer at the ends: a tenth of the run.
        smooth = [values[max(0, i - 2) : i + 3].mean() for i in range(40)]
        assert any(np.allclose(curve, logged) for curve in found)
        assert any(np.allclose(curve, np.column_stack([steps, smooth])) for curve in found)
    # A pair of curves for each of the four, and nothing else.
    assert len(found) == 8
    assert all(np.allclose(one, other) for one, other in zip(found, curves(drawn[1]), strict=True))


def test_training_is_drawn_for_light_and_dark_and_as_png(tmp_path):
    (plot,) = plot_training(write_metrics(tmp_path / "metrics.jsonl"), tmp_path / "plots")
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "training.dark.svg",
        "training.png",
        "training.svg",
    ]
    assert plot.path.read_text(encoding="utf-8") != plot.dark.read_text(encoding="utf-8")


def test_equal_data_gives_equal_files(tmp_path):
    metrics = write_metrics(tmp_path / "metrics.jsonl")
    files = [plot_training(metrics, tmp_path / name)[0].path.read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_values_that_are_missing_or_not_numbers_are_left_out(tmp_path):
    metrics = write_metrics(tmp_path / "metrics.jsonl", **{"answers/accuracy": None, "mask/restored": float("nan")})
    assert len(plot_training(metrics, tmp_path)) == 1


def test_a_run_that_has_just_begun_has_no_plot(tmp_path):
    assert plot_training(write_metrics(tmp_path / "metrics.jsonl", steps=1), tmp_path) == []


@pytest.mark.parametrize(("line", "message"), [("{oops", "line 13: not JSON"), ("[1]", "line 13: expected an object")])
def test_a_damaged_metrics_file_is_named_with_its_line(tmp_path, line, message):
    metrics = write_metrics(tmp_path / "metrics.jsonl")
    with metrics.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        plot_training(metrics, tmp_path)


def test_a_comparison_is_drawn_by_class_where_classes_are_known(tmp_path):
    classes = ["needed", "filler", "other"]
    before = run(*(rollout(f"p{i}", classes=classes) for i in range(4)))
    (plot,) = plot_comparison(compare(before, before), tmp_path)
    assert plot.path.name == "classes.svg"
    assert plot_comparison(summarize(run(rollout())), tmp_path) == []


def test_a_comparison_draws_every_estimate_and_its_interval(tmp_path, drawn):
    classes = ["needed", "filler", "other"]
    before = run(*(rollout(f"p{i}", restored=(0.1 * i, 0.4, 0.02), classes=classes) for i in range(4)))
    after = run(*(rollout(f"p{i}", ("a", " 6"), (0.1, 0.05 * i), classes[:2]) for i in range(4)), label="after")
    summary = compare(before, after)
    plot_comparison(summary, tmp_path)
    axes = drawn[0].axes
    for axis, names in zip(axes, ([f"{c}_tokens" for c in classes], [f"restored_{c}" for c in classes]), strict=True):
        points, bars = [], []
        for line in axis.get_lines():
            (bars if len(line.get_xdata()) == 2 else points).append(list(line.get_xdata()))
        estimates = [
            estimate for side in (0, 1) for name in names if (estimate := summary[name].runs[side]).value is not None
        ]
        assert [x for (x,) in points] == [estimate.value for estimate in estimates]
        assert bars == [[estimate.low, estimate.high] for estimate in estimates if estimate.low is not None]
        assert [label.get_text() for label in axis.get_yticklabels()] == classes
