"""The tables in the documentation are those of the committed results."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("triton")


def test_the_generated_tables_are_up_to_date() -> None:
    result = subprocess.run([sys.executable, "-m", "benchmarks.tables", "--check"], check=False)
    assert result.returncode == 0, "run python -m benchmarks.tables"


@pytest.mark.parametrize("module", ["gpu", "timing", "tune"])
def test_gpu_commands_say_what_they_need_where_there_is_no_gpu(module: str) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    command = [sys.executable, "-m", f"benchmarks.{module}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 1
    assert f"benchmarks.{module} needs a CUDA GPU" in result.stderr
