"""The tables in the documentation are those of the committed results, and GPU commands refuse to run without one."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import checks, gpu, tables, timing, tune


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
def test_gpu_commands_say_what_they_need(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["command"])
    assert command.main() == 1
    assert f"{command.__name__} needs a CUDA GPU" in capsys.readouterr().err
