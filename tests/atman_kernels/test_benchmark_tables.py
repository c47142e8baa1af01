"""The tables in the documentation are those of the committed results, and GPU commands refuse to run without one."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import checks, gpu, tables, timing, tune
from benchmarks.cases import attention_cases


def test_the_generated_tables_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tables", "--check"])
    assert tables.main() == 0, "run python -m benchmarks.tables"


def test_the_accuracy_table_of_the_mathematics_is_the_measured_one() -> None:
    measured = json.loads((tables.RESULTS / "dkey_bias_accuracy.json").read_text())
    page = (tables.RESULTS.parent.parent / "docs" / "math.md").read_text()
    rows = [f"{error:.1e} | {total:.1e} |" for error, total in measured["s = 1024, 8 heads of 128, bfloat16"].values()]
    assert [line for line in page.splitlines() if line.endswith(tuple(rows))] == [
        line for line in page.splitlines() if line.startswith("| ") and "e-0" in line
    ]
    long = [f"{error:.1e}" for error, _ in measured["s = 8192, 24 heads of 128, bfloat16"].values()]
    assert f"in the same order, {', '.join(long[:-1])} and {long[-1]}." in page


@pytest.mark.parametrize("command", [gpu, checks, timing, tune], ids=lambda module: module.__name__)
def test_gpu_commands_say_what_they_need(command: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit, match=f"{command.__name__} needs a CUDA GPU"):
        command.main()


def _write_gpu_results(directory: Path, block_sizes: str, milliseconds: dict[str, float]) -> None:
    case = attention_cases()[0]
    rows = [
        {"case": case.key, "peer": peer, "direction": direction, "ms": ms, "tflops": 800 / ms, "peak_mib": 7.0}
        for direction in tables.DIRECTIONS
        for peer, ms in milliseconds.items()
    ]
    rows += [{"case": case.key, "peer": "fla", "direction": "forward+backward", "unavailable": "fla is not installed"}]
    facts = {"device": "Imaginary GPU", "commit": "abcdef0", "versions": {"torch": "2.11.0"}}
    content = {**facts, "matrix_rate_tflops": 800.0, "block_sizes": block_sizes, "results": rows}
    path = directory / f"attention-{block_sizes}_Imaginary-GPU_2026-01-01_abcdef0.json"
    path.write_text(json.dumps(content))


def test_measurements_of_a_gpu_reach_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RESULTS", "DOCS"):
        shutil.copytree(getattr(tables, name), tmp_path / name)
        monkeypatch.setattr(tables, name, tmp_path / name)
    _write_gpu_results(tmp_path / "RESULTS", "committed", {"atman": 4.0, "atman_unbiased": 3.9, "flex": 16.0})
    _write_gpu_results(tmp_path / "RESULTS", "tuned", {"atman": 2.0})
    before = (tmp_path / "DOCS" / "benchmarks.md").read_text()
    monkeypatch.setattr(sys, "argv", ["tables", "--pages", "benchmarks.md"])
    assert tables.main() == 0
    page = (tmp_path / "DOCS" / "benchmarks.md").read_text()
    assert "Attention on a GPU: not yet measured." in before
    assert "Attention on a GPU: not yet measured." not in page
    assert "### Imaginary GPU, committed block sizes, commit abcdef0" in page
    assert "### Imaginary GPU, tuned block sizes, commit abcdef0" in page
    unmeasured = "not yet measured | not yet measured |"
    assert f"| flex / atman | at least 3.0 | 4.00 | {unmeasured}" in page
    assert f"| atman / atman_unbiased | at most 1.05 | 1.03 | {unmeasured}" in page
    assert f"| fla / atman | at least 1.5 | fla is not installed | {unmeasured}" in page
    assert f"| {attention_cases()[0].key} | 200 (25), 7 |" in page
    # What no GPU measured stays as it was.
    assert page.split("### Compiled kernels")[1] == before.split("### Compiled kernels")[1]
    assert tables.main() == 0
    assert (tmp_path / "DOCS" / "benchmarks.md").read_text() == page
