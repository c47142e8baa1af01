"""What an import brings along. Modules are counted, not seconds: a clock on a shared machine proves nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Each takes from a tenth of a second to several.
HEAVY = {
    "accelerate",
    "datasets",
    "jinja2",
    "matplotlib",
    "pandas",
    "peft",
    "pyarrow",
    "rich",
    "safetensors",
    "tensorboard",
    "transformers",
    "trl",
}


def loaded(program: str) -> set[str]:
    """Names in sys.modules after a program has run in a fresh interpreter."""
    listing = f"{program}\nimport sys; print('modules:', *sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", listing], check=True, capture_output=True, text=True)
    return set(done.stdout.rpartition("modules:")[2].split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"]], ids=" ".join)
def test_help_loads_the_standard_library_yaml_and_four_modules_of_its_own(arguments: list[str]) -> None:
    modules = loaded(f"from atmanrl.cli import main\ntry: main({arguments!r})\nexcept SystemExit: pass")
    tops = {name.partition(".")[0] for name in modules - loaded("")} - sys.stdlib_module_names
    assert {name for name in tops if not name.startswith("_")} <= {"atmanrl", "yaml", "cython_runtime"}
    own = {name for name in modules if name.startswith("atmanrl.")}
    assert own == {"atmanrl.cli", "atmanrl.config", "atmanrl.errors", "atmanrl.recipe"}


def test_atman_kernels_loads_little_beyond_torch() -> None:
    beyond = loaded("import atman_kernels") - loaded("import torch")
    assert not HEAVY & {name.partition(".")[0] for name in beyond}
    # Triton's compiler is loaded by the first call that needs it.
    assert not any(name.startswith("triton") for name in beyond)
    assert len(beyond) < 100


def test_what_was_recorded_is_read_without_torch() -> None:
    assert "torch" not in loaded(
        "import atmanrl.evaluation.records, atmanrl.evaluation.summary, atmanrl.report, atmanrl.evaluation.compare"
    )
