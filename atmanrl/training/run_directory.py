"""A run's directory: what stands in it, and when one may be written to. Importing this module loads no torch.

config.yaml          the recipe with every override, itself a recipe
environment.json     versions of Python and of the packages, the command line
metrics.jsonl        one line per log step; reproducible
timings.jsonl        seconds of generation, saliency and update per log step
rollouts/step-N.html sampled rollouts, coloured by saliency
checkpoint-N/        to resume from
model/               the trained model, Hugging Face format, adapters merged
adapter/             the adapters, where they were trained
before.json after.json summary.json report.html plots/   the evaluation
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from atmanrl.errors import InputError
from atmanrl.evaluation.records import write_text_atomically
from atmanrl.recipe import Recipe

CONFIG = "config.yaml"
PACKAGES = ("atmanrl", "torch", "triton", "transformers", "trl", "accelerate", "datasets", "peft", "vllm", "flash-attn")

_WRITTEN = (
    *(CONFIG, "environment.json", "metrics.jsonl", "timings.jsonl", "training_args.bin"),
    *("before.json", "after.json", "summary.json", "report.html", "summary.md"),
    *("checkpoint-*", ".saving", "model", "adapter", "plots", "runs", "completions", "non_finite", "rollouts"),
)
# A run may be moved, and go on for longer than it was first asked to; the rest is what makes it reproducible.
_MAY_CHANGE = (
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "save_total_limit",
    "report_to",
    "page_steps",
    "page_rollouts",
)


class RunDirectoryError(InputError):
    """The directory cannot be used; the message says what it holds and what to do."""


def check(path: Path, recipe: Recipe, *, overwrite: bool = False, resume: bool = False) -> None:
    """Check that a run of ``recipe``, or the rest of one, may be written to ``path``; changes nothing.

    Args:
        path: the run's directory.
        recipe: what will be run.
        overwrite: an earlier run there is to be deleted.
        resume: the directory must hold a run of this same recipe.

    Raises:
        RunDirectoryError: the directory holds another run, or files that are no run's; or there is nothing to resume,
            or the recipe is not the one that was started (with the keys that differ).
    """
    holds_run = (path / CONFIG).is_file()
    if resume:
        if not holds_run:
            raise RunDirectoryError(f"{path} holds no run to resume: there is no {path / CONFIG}")
        _check_same(path / CONFIG, recipe)
    elif holds_run and not overwrite:
        raise RunDirectoryError(
            f"{path} holds another run ({', '.join(_contents(path))}): choose another output_dir, go on with --resume "
            f"or delete it with --overwrite"
        )
    elif not holds_run and path.exists() and any(path.iterdir()):
        raise RunDirectoryError(
            f"{path} is not empty ({', '.join(_contents(path))}) and holds no run: choose another output_dir"
        )


def start(path: Path, recipe: Recipe, *, resume: bool = False) -> None:
    """Make the checked directory, delete what an earlier run wrote there unless it is resumed, and write the recipe.

    Raises:
        RunDirectoryError: the directory cannot be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not resume:
            for item in (item for pattern in _WRITTEN for item in path.glob(pattern)):
                shutil.rmtree(item) if item.is_dir() else item.unlink()
        # In one piece: a resumed run whose disk is full must not lose the recipe it was started with.
        write_text_atomically(path / CONFIG, recipe.to_yaml())
        write_text_atomically(path / "environment.json", json.dumps(_environment(), indent=1))
    except OSError as error:
        raise RunDirectoryError(f"output_dir {path} cannot be written to: {error}") from error


def _contents(path: Path, most: int = 5) -> list[str]:
    names = sorted(item.name for item in path.iterdir())
    return names[:most] + (["..."] if len(names) > most else [])


def _check_same(config: Path, recipe: Recipe) -> None:
    before, now = (dict(_flat(yaml.safe_load(text))) for text in (config.read_text(encoding="utf-8"), recipe.to_yaml()))
    differing = [
        f"{key} ({before.get(key)!r}, now {now.get(key)!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in _MAY_CHANGE
    ]
    if differing:
        raise RunDirectoryError(f"{config} was started with other settings: {', '.join(differing)}")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def installed_versions() -> dict[str, str | None]:
    """Version of this package and of those it builds on; None where one is not installed."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    # With the build (+cpu, +cu130), which the metadata of some builds leave out.
    versions["torch"] = torch.__version__
    return versions


def _environment() -> dict[str, Any]:
    about = {"python": platform.python_version(), "platform": platform.platform(), "argv": sys.argv}
    return {**about, **installed_versions()}
