import json

import pytest

from atmanrl.evaluation.summary import compare, summarize
from atmanrl.report.plots import plot_comparison, plot_training
from tests.atmanrl.saliency_runs import rollout, run


def write_metrics(path, steps=12, **extra):
    rows = [
        {"step": s, "reward": s / 10, "cot/tokens": 10 - s / 3, "cot/filler": 2.0, **extra} for s in range(1, steps + 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


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
    assert "4 prompts" in plot.caption
    assert plot_comparison(summarize(run(rollout())), tmp_path) == []
