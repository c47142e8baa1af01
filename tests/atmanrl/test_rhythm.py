"""Couplings, perturbations and the rank of needed tokens, on series with a known answer and on the built-in model."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from atmanrl.cli import main
from atmanrl.config import LedgerConfig
from atmanrl.rhythm.report import couplings, jaccard, needed_rank, plot_series
from atmanrl.rhythm.series import RolloutSeries
from atmanrl.tasks.ledger import sample_examples


def _series(n: int, seed: int, *, coupled: bool) -> RolloutSeries:
    """FAI peaks one token after WAAD peaks, where entropy is high as well; or all three unrelated."""
    generator = torch.Generator().manual_seed(seed)
    waad = torch.rand(n, generator=generator)
    if not coupled:
        return RolloutSeries(waad, torch.rand(n, generator=generator), torch.rand(n, generator=generator))
    return RolloutSeries(waad, waad.roll(1), waad)


def test_coupled_series_lift_far_above_chance_and_unrelated_ones_do_not() -> None:
    entropy, anchors = couplings([_series(50, i, coupled=True) for i in range(20)], lookback=1)
    assert entropy.observed == 1.0
    assert entropy.expected == pytest.approx(0.2, abs=0.02)
    # The first place has nobody before it.
    assert anchors.observed > 0.95
    assert anchors.expected == pytest.approx(0.36, abs=0.03)
    assert all(abs(item.lift) < 0.2 for item in couplings([_series(200, i, coupled=False) for i in range(20)]))


def test_jaccard_counts_shared_tokens() -> None:
    assert jaccard([1, 2, 2, 3], [3, 4]) == 0.25
    assert jaccard([], []) == 1.0


def test_needed_tokens_rank_among_the_chain_alone() -> None:
    series = RolloutSeries(torch.zeros(5), torch.tensor([0.1, 0.9, 0.2, 0.3, 5.0]))
    found = needed_rank([series, series], [[False, True, False, False], []])
    assert (found.percentile, found.auroc, found.rollouts) == (1.0, 1.0, 1)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("examples") / "ledger.jsonl"
    prompts = [example.prompt for example in islice(sample_examples(LedgerConfig(), 5, held_out=True), 24)]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def test_explain_statistics_finds_ledgers_needed_values_and_writes_what_it_found(
    examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, numbers = tmp_path / "series.svg", tmp_path / "series.json"
    arguments = ["explain", "--model", "ledger", "--input", str(examples), "--statistics", "--max-new-tokens", "40"]
    arguments += ["--series.horizon", "[3, 100]", "--plot", str(picture), "--json", str(numbers), "--no-color"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "24 rollouts, completions greedy" in shown
    assert "high entropy at a WAAD peak" in shown
    assert "Jaccard" in shown
    content = json.loads(numbers.read_text())
    assert content["series"]["horizon"] == [3, 100]
    assert content["generation"]["temperature"] == 0.0
    assert content["needed"]["rollouts"] == 24
    assert content["needed"]["auroc"] > 0.8
    assert content["perturbation"]["high"] < content["perturbation"]["low"]
    assert all(len(one["tokens"]) == len(one["waad"]) == len(one["fai"]) for one in content["rollouts"])
    assert "<svg" in picture.read_text()


def test_options_of_the_mask_are_refused_with_statistics(examples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explain", "--model", "ledger", "--input", str(examples), "--statistics", "--mask.steps", "3"]
    assert main(arguments) == 2
    assert "besides the options of this command only --series.* can be set" in capsys.readouterr().err


def test_sampled_completions_end_with_the_context(examples: Path, tmp_path: Path) -> None:
    numbers = tmp_path / "series.json"
    arguments = ["explain", "--model", "ledger", "--input", str(examples), "--statistics", "--json", str(numbers)]
    assert main([*arguments, "--temperature", "1"]) == 0
    generation = json.loads(numbers.read_text())["generation"]
    assert generation["temperature"] == 1.0
    assert generation["max_new_tokens"] < 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--statistics", "--html", "page.html"], "--html is not for --statistics"),
        (["--statistics", "--estimator", "best"], "--estimator is not for --statistics"),
        (["--statistics", "--record-every", "2"], "--record-every is not for --statistics"),
        (["--plot", "series.png"], "--plot needs --statistics"),
        (["--statistics", "--plot", "series.txt"], "--plot series.txt: unknown kind of picture"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    examples: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "--model", "ledger", "--input", str(examples), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_plot_of_dollars_is_not_taken_for_a_formula(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    flags = [True, False]
    plot_series(
        path, ["$a", "b$ _^"], [1.0, 2.0], [0.1, 0.2], local=flags, anchors=flags, dominated=flags, first_distance=1
    )
    assert path.stat().st_size > 1000
