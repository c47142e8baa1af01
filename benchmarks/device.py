"""Where a benchmark runs: a CUDA GPU, or a CPU on which the same steps are rehearsed with tiny shapes.

A rehearsal runs the kernels in Triton's interpreter and writes into a directory of its own: its numbers mean nothing,
its errors are those that a GPU machine would otherwise be the first to meet.
"""

from __future__ import annotations

import argparse
import datetime
import json
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
from atman_kernels._triton.blocks import BLOCK_SIZES_FILE

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "triton", "flash-attn", "flash-linear-attention")


class Device(NamedTuple):
    """A GPU (``rehearsal`` None), or a CPU that writes its results to the directory ``rehearsal``."""

    rehearsal: Path | None = None

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
        return RESULTS if self.rehearsal is None else self.rehearsal

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

    def provenance(self) -> dict[str, Any]:
        """Device, versions and commit that a result belongs to."""
        versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
        for package in _PACKAGES:
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                continue
        device = torch.cuda.get_device_name() if self.rehearsal is None else "rehearsal"
        return {"device": device, "commit": commit(), "versions": versions}


def device_of_command(module: str, description: str, seconds: float = float("inf")) -> tuple[Device, float]:
    """The device that a GPU command runs on, and when it has to stop, from --rehearse and --seconds.

    Raises:
        SystemExit: if there is no GPU and nothing is to be rehearsed.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=seconds, help="stop before this much time has passed")
    parser.add_argument(
        "--rehearse", type=Path, metavar="DIR", help="walk through it without a GPU, tiny, results in DIR"
    )
    arguments = parser.parse_args()
    device = Device(arguments.rehearse)
    if device.rehearsal is None and not torch.cuda.is_available():
        raise SystemExit(f"{module} needs a CUDA GPU; what it measures stays not yet measured")
    return device, time.monotonic() + arguments.seconds


def kept_results(kind: str, device: Device, **empty: Any) -> tuple[Path, dict[str, Any]]:
    """The file of results of this kind, device and commit, and what it holds: ``empty`` where it is new."""
    facts = device.provenance()
    path = results_file(kind, facts, device.results)
    return path, json.loads(path.read_text()) if path.exists() else {**facts, **empty}


def commit() -> str:
    """Short hash of the source tree, with "-dirty" where it was edited; "unknown" outside a repository.

    What the GPU commands themselves write, documentation and block sizes, is no edit: a run that was cut off goes on
    under the same name. See :func:`tuned` for the block sizes.
    """
    revision = _git("rev-parse", "--short", "HEAD")
    edited = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs", f":!{BLOCK_SIZES_FILE}")
    return f"{revision}-dirty" if revision and edited else revision or "unknown"


def tuned() -> str:
    """ "-tuned" where the block sizes are not the committed ones, outside a repository once a tuning began, else ""."""
    if not _git("rev-parse", "HEAD"):
        return "-tuned" if any(RESULTS.glob("tuning_*_unknown.json")) else ""
    return "-tuned" if _git("status", "--porcelain", "--", str(BLOCK_SIZES_FILE)) else ""


def _git(*arguments: str) -> str:
    root = Path(__file__).parent.parent
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=root)
    except FileNotFoundError:
        return ""
    return result.stdout.strip()


def results_file(kind: str, facts: dict[str, Any], directory: Path = RESULTS) -> Path:
    """<kind>_<device>_<date>_<commit>.json: an unfinished one of this device and commit, or a new one."""
    device = facts["device"].replace(" ", "-").replace("/", "-")
    existing = sorted(directory.glob(f"{kind}_{device}_*_{facts['commit']}.json"))
    today = datetime.datetime.now(datetime.UTC).date()
    return existing[-1] if existing else directory / f"{kind}_{device}_{today}_{facts['commit']}.json"


def save(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file in one step, so that an interrupted run leaves the numbers measured before."""
    path.parent.mkdir(exist_ok=True, parents=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
