"""The directory of a run: its files, and the check before writing. Importing this module loads no torch.

config.yaml          every setting with its value, itself a recipe
inputs.json          fingerprints of the data rows, the tokenizer and the base model
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
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from atmanrl.errors import InputError
from atmanrl.evaluation.records import write_text_atomically
from atmanrl.settings import Settings

CONFIG = "config.yaml"
INPUTS = "inputs.json"
PACKAGES = ("atmanrl", "torch", "triton", "transformers", "trl", "accelerate", "datasets", "peft", "vllm", "flash-attn")

_WRITTEN = (
    *(CONFIG, INPUTS, "environment.json", "metrics.jsonl", "timings.jsonl", "training_args.bin"),
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
    "hub_token",
)
_DIRECTORIES = ("model", "adapter", "plots", "runs", "completions", "non_finite", "rollouts")


class RunDirectoryError(InputError):
    """The directory cannot be used; the message says what it holds and what to do."""


def check(path: Path, recipe: Settings, *, overwrite: bool = False, resume: bool = False) -> None:
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
        _check_writable(path)
    elif holds_run and not overwrite:
        raise RunDirectoryError(
            f"{path} holds another run ({', '.join(_contents(path))}): choose another output_dir, go on with --resume "
            f"or delete it with --overwrite"
        )
    elif not holds_run and path.exists() and any(path.iterdir()):
        raise RunDirectoryError(
            f"{path} is not empty ({', '.join(_contents(path))}) and holds no run: choose another output_dir"
        )


@contextmanager
def made(path: Path) -> Iterator[None]:
    """The directory exists inside the block, for a trial; it stays where the trial succeeds or it was there before.

    Raises:
        RunDirectoryError: the directory cannot be written to.
    """
    new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        if new:
            shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, OSError):
            raise RunDirectoryError(f"output_dir {path} cannot be written to: {error}") from error
        raise


def start(path: Path, recipe: Settings, inputs: Mapping[str, Any], *, resume: bool = False) -> None:
    """Delete what an earlier run wrote to the checked directory, unless it is resumed, and write settings and inputs.

    Raises:
        RunDirectoryError: the directory cannot be written to.
    """
    try:
        if not resume:
            for item in (item for pattern in _WRITTEN for item in path.glob(pattern)):
                shutil.rmtree(item) if item.is_dir() else item.unlink()
        # In one piece: a resumed run whose disk is full must not lose the recipe it was started with.
        write_text_atomically(path / CONFIG, recipe.to_yaml())
        write_text_atomically(path / INPUTS, json.dumps(inputs))
        write_text_atomically(path / "environment.json", json.dumps(_environment(), indent=1))
    except OSError as error:
        raise RunDirectoryError(f"output_dir {path} cannot be written to: {error}") from error


def _check_writable(path: Path) -> None:
    """Check that the files and folders that the run will write again are writable."""
    for item in (item for pattern in _WRITTEN for item in path.glob(pattern)):
        if item.name in _DIRECTORIES and not item.is_dir():
            raise RunDirectoryError(f"{item} is a file, and the run writes a directory of that name")
        if not os.access(item, os.W_OK):
            raise RunDirectoryError(f"{item} cannot be written to")


def _contents(path: Path, most: int = 5) -> list[str]:
    names = sorted(item.name for item in path.iterdir())
    return names[:most] + (["..."] if len(names) > most else [])


def _check_same(config: Path, recipe: Settings) -> None:
    before, now = (yaml.safe_load(text) for text in (config.read_text(encoding="utf-8"), recipe.to_yaml()))
    differing = [text for key, text in _differing(before, now) if key not in _MAY_CHANGE]
    if differing:
        raise RunDirectoryError(f"{config} was started with other settings: {', '.join(differing)}")


def _differing(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys whose values differ, of those that stand in both, and both values in words."""
    for key in sorted(before.keys() & now.keys()):
        old, new = before[key], now[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differing(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", f"{prefix}{key} ({old!r}, now {new!r})"


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
