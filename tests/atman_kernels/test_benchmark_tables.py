"""The tables in the documentation are those of the committed results, and GPU commands refuse to run without one."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import checks, gpu, tables, timing, tune


def test_the_generated_tables_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tables", "--check"])
    assert tables.main() == 0, "run python -m benchmarks.tables"


@pytest.mark.parametrize("command", [gpu, checks, timing, tune], ids=lambda module: module.__name__)
def test_gpu_commands_say_what_they_need(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["command"])
    assert command.main() == 1
    assert f"{command.__name__} needs a CUDA GPU" in capsys.readouterr().err
