"""The tutorial notebook runs from its first cell to its last."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from traitlets.config import Config

ROOT = Path(__file__).parents[1]


def test_the_tutorial_runs(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    # The kernel is a process of its own, which must find a source tree that is not installed.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # Nothing of the user's is run, and no port is chosen before it is used. A socket's path has at most 107 characters.
    for variable in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(tmp_path_factory.mktemp("k")))
    sockets = Config({"KernelManager": {"transport": "ipc"}})
    notebook = nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4)
    executed = NotebookClient(notebook, timeout=120, kernel_name="python3", config=sockets).execute()
    outputs = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "leave-one-out  AUROC" in printed
    assert any("<iframe srcdoc=" in output.data.get("text/html", "") for output in outputs if "data" in output)
    assert any("image/png" in output.data for output in outputs if "data" in output)


def test_the_committed_tutorial_holds_no_outputs() -> None:
    # They would go stale unseen, and the page in them is most of a megabyte.
    notebook = nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
