"""Times peers side by side on a GPU and keeps every number as soon as it is measured.

    python -m benchmarks.timing                      go on with the results file of this device and commit
    python -m benchmarks.timing --seconds 300        stop in time; the next call continues

Medians of CUDA-event timings with a cold L2 cache (triton.testing.do_bench), TFLOP/s over visible pairs, share of the
matrix rate measured in the same run, peak memory beyond the inputs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

from benchmarks.cases import AttentionCase, attention_cases, make_inputs
from benchmarks.peers import PEERS, UnavailableError

RESULTS = Path(__file__).parent / "results"
DIRECTIONS = ("forward+backward", "forward")
_PACKAGES = ("torch", "triton", "flash-attn", "flash-linear-attention")


def provenance() -> dict[str, Any]:
    """Device, versions and commit that a result belongs to."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"device": torch.cuda.get_device_name(), "commit": commit(), "versions": versions}


def commit() -> str:
    """Short hash of the source tree, with "-dirty" where it was edited; "unknown" outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return result.stdout.strip() or "unknown"


def results_file(kind: str, facts: dict[str, Any]) -> Path:
    """results/<kind>_<device>_<date>_<commit>.json: an unfinished one of this device and commit, or a new one."""
    device = facts["device"].replace(" ", "-").replace("/", "-")
    existing = sorted(RESULTS.glob(f"{kind}_{device}_*_{facts['commit']}.json"))
    today = datetime.datetime.now(datetime.UTC).date()
    return existing[-1] if existing else RESULTS / f"{kind}_{device}_{today}_{facts['commit']}.json"


def save(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file in one step, so that an interrupted run leaves the numbers measured before."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def matrix_rate(dtype: torch.dtype = torch.bfloat16) -> float:
    """TFLOP/s of torch.matmul on random 8192 x 8192 matrices."""
    a, b = (torch.randn(8192, 8192, dtype=dtype, device="cuda") for _ in range(2))
    return 2 * 8192**3 / (do_bench(lambda: a @ b, return_mode="median") * 1e9)


def measure(case: AttentionCase, peer: str, direction: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """One row of results: milliseconds, TFLOP/s and peak MiB, or why the peer did not run."""
    row: dict[str, Any] = {"case": case.key, "peer": peer, "direction": direction}
    try:
        x = make_inputs(case, dtype, "cuda")
        compute = PEERS[peer](case, x)
        wanted = [t for t in x.differentiable if peer_uses(peer, t is x.key_bias)]

        def forward_and_backward() -> None:
            torch.autograd.grad(compute(), wanted, x.do)

        run = forward_and_backward
        if direction == "forward":
            run = torch.no_grad()(compute)
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        row["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
        row["ms"] = do_bench(run, warmup=20, rep=80, return_mode="median")
        row["tflops"] = case.flops(direction) / (row["ms"] * 1e9)
    except UnavailableError as reason:
        row["unavailable"] = str(reason)
    except torch.OutOfMemoryError:
        row["unavailable"] = "out of memory"
    except (RuntimeError, NotImplementedError) as error:
        # A peer's refusal of a shape is a result, not the end of the run.
        row["unavailable"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    torch.cuda.empty_cache()
    return row


def peer_uses(peer: str, is_bias: bool) -> bool:
    """Whether a peer has a gradient for an input: the ones without bias have none for it."""
    return not (is_bias and peer.endswith("unbiased"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop before this much time has passed")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.timing needs a CUDA GPU; the results stay not yet measured", file=sys.stderr)
        return 1
    deadline = time.monotonic() + arguments.seconds
    facts = provenance()
    path = results_file("attention", facts)
    content = json.loads(path.read_text()) if path.exists() else {**facts, "results": []}
    if "matrix_rate_tflops" not in content:
        content["matrix_rate_tflops"] = matrix_rate()
    done = {(row["case"], row["peer"], row["direction"]) for row in content["results"]}
    for case in attention_cases():
        for direction in DIRECTIONS:
            for peer in PEERS:
                if (case.key, peer, direction) in done:
                    continue
                if time.monotonic() > deadline:
                    print(f"stopped in time; {path} holds {len(content['results'])} results, run again to go on")
                    return 0
                row = measure(case, peer, direction)
                content["results"].append(row)
                save(path, content)
                shown = row.get("unavailable") or f"{row['ms']:.3f} ms, {row['tflops']:.0f} TFLOP/s"
                print(f"{case.key:24} {direction:16} {peer:26} {shown}", flush=True)
    print(f"complete: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
