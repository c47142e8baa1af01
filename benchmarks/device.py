"""Where a benchmark runs: a CUDA GPU, or a CPU on which the same steps are rehearsed with tiny shapes.

A rehearsal runs the kernels in Triton's interpreter and writes into a directory of its own: its numbers mean nothing,
its errors are those that a GPU machine would otherwise be the first to meet.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from atman_kernels import backend
from atman_kernels._triton.launch import (
    BLOCK_SIZES_FILE,
    BLOCK_SIZES_VARIABLE,
    block_sizes_in_use,
    kernels_label,
)

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "triton", "flash-attn", "flash-linear-attention")


class Device(NamedTuple):
    """A GPU (``rehearsal`` None), or a CPU that writes its results to the directory ``rehearsal``.

    Attributes:
        directory: where a GPU's results are kept.
    """

    rehearsal: Path | None = None
    directory: Path = RESULTS

    @property
    def name(self) -> str:
        """The device string of tensors."""
        return "cuda" if self.rehearsal is None else "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """What is measured; the interpreter cannot multiply bfloat16."""
        return torch.bfloat16 if self.rehearsal is None else torch.float16

    @property
    def results(self) -> Path:
        """Where results are kept."""
        return self.rehearsal or self.directory

    def kernels(self) -> AbstractContextManager[None]:
        """The Triton kernels, also for CPU tensors."""
        return backend("triton")

    def milliseconds(self, run: Callable[[], object], warmup: float, rep: float) -> float:
        """Median time of a call with a cold L2 cache, by CUDA events; a single call in a rehearsal."""
        if self.rehearsal is None:
            from triton.testing import do_bench

            return float(do_bench(run, warmup=warmup, rep=rep, return_mode="median"))
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin)

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """Peak memory of a call beyond what was allocated before; 0 in a rehearsal."""
        if self.rehearsal is not None:
            return 0
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def release(self) -> None:
        """Wait for the device, which raises what it could not do, and give back unused memory."""
        if self.rehearsal is None:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def provenance(self, block_sizes: Path | None = None) -> dict[str, Any]:
        """Device, versions, commit and kernels that a result belongs to; by default with the block sizes in use."""
        versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
        for package in _PACKAGES:
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                continue
        device = torch.cuda.get_device_name() if self.rehearsal is None else "rehearsal"
        label = kernels_label(block_sizes or block_sizes_in_use())
        return {"device": device, "commit": commit(), "kernels": label, "versions": versions}

    def tuned_block_sizes(self) -> Path:
        """Where the tuning of the committed kernels on this device keeps its table; it need not exist."""
        device = "rehearsal" if self.rehearsal is not None else torch.cuda.get_device_name()
        return self.results / f"block_sizes_{_in_name(device)}_k{kernels_label(BLOCK_SIZES_FILE)}.json"


def device_of_command(
    module: str,
    description: str,
    seconds: float = float("inf"),
    add: Callable[[argparse.ArgumentParser], object] | None = None,
) -> tuple[Device, float, argparse.Namespace]:
    """The device of a GPU command, when the command must stop, and its arguments.

    Where this device has tuned block sizes among its results, the kernels of this process and its children take them.

    Args:
        module: the command's name, for messages.
        description: the module's docstring.
        seconds: default of --seconds.
        add: adds the command's own arguments.

    Raises:
        SystemExit: if there is no GPU and nothing is to be rehearsed.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=seconds, help="stop before this much time has passed")
    add_results_argument(parser)
    parser.add_argument(
        "--rehearse", type=Path, metavar="DIR", help="walk through it without a GPU, tiny, results in DIR"
    )
    if add is not None:
        add(parser)
    arguments = parser.parse_args()
    device = Device(arguments.rehearse, arguments.results)
    if device.rehearsal is None and not torch.cuda.is_available():
        raise SystemExit(f"{module} needs a CUDA GPU; what it measures stays not yet measured")
    if (tuned := device.tuned_block_sizes()).exists():
        os.environ[BLOCK_SIZES_VARIABLE] = str(tuned.resolve())
    return device, time.monotonic() + arguments.seconds, arguments


def add_results_argument(parser: argparse.ArgumentParser) -> None:
    """--results DIR, which may lie outside the source tree."""
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where results are kept")


def kept_results(
    kind: str, device: Device, block_sizes: Path | None = None, **empty: Any
) -> tuple[Path, dict[str, Any]]:
    """The file of results of this kind, device, commit and kernels, and its content: ``empty`` where it is new.

    The kernels are those with the block sizes in use, unless another table is given.
    """
    facts = device.provenance(block_sizes)
    path = results_file(kind, facts, device.results)
    return path, json.loads(path.read_text()) if path.exists() else {**facts, **empty}


def commit() -> str:
    """Short hash of the source tree, with "-dirty" where it was edited.

    The environment variable ATMAN_COMMIT states it where the tree travels without its history; "unknown" without both.
    Documentation, which the GPU commands write, is no edit: a run that was cut off goes on under the same name.
    """
    if stated := os.environ.get("ATMAN_COMMIT"):
        return stated
    revision = _git("rev-parse", "--short", "HEAD")
    edited = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs")
    return f"{revision}-dirty" if revision and edited else revision or "unknown"


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        return ""
    return result.stdout.strip()


def results_file(kind: str, facts: dict[str, Any], directory: Path = RESULTS) -> Path:
    """<kind>_<device>_<date>_<commit>.json: the unfinished one of this device and commit, or a new one.

    Results of kernels have the kernels' label in their name as well.
    """
    device = _in_name(facts["device"])
    label = facts["commit"] + (f"_k{facts['kernels']}" if "kernels" in facts else "")
    existing = sorted(directory.glob(f"{kind}_{device}_*_{label}.json"))
    today = datetime.datetime.now(datetime.UTC).date()
    return existing[-1] if existing else directory / f"{kind}_{device}_{today}_{label}.json"


def _in_name(device: str) -> str:
    return device.replace(" ", "-").replace("/", "-")


def save(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file in one step, so that an interrupted run leaves the numbers measured before."""
    path.parent.mkdir(exist_ok=True, parents=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
