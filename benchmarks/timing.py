"""Times peers side by side on a GPU and keeps every number as soon as it is measured.

    python -m benchmarks.timing                      go on with the results file of this device and commit
    python -m benchmarks.timing --seconds 300        stop in time; the next call continues

Medians of CUDA-event timings with a cold L2 cache (triton.testing.do_bench), TFLOP/s over visible pairs, share of the
matrix rate measured in the same run, peak memory beyond the inputs.
"""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

import torch

from benchmarks.cases import AttentionCase, attention_cases, make_inputs
from benchmarks.device import Device, device_of_command, kept_results, save, tuned
from benchmarks.peers import PEERS, UnavailableError, inputs_with_gradients

DIRECTIONS = ("forward+backward", "forward")
STARTS = 2
REHEARSAL_CASES = (AttentionCase("tiny", (9, 4), (2, 1), 16), AttentionCase("tiny", (9, 4), (2, 1), 16, prefix=3))


def matrix_rate(device: Device) -> float:
    """TFLOP/s of torch.matmul on random square matrices, 8192 on a GPU."""
    n = 8192 if device.rehearsal is None else 64
    a, b = (torch.randn(n, n, dtype=device.dtype, device=device.name) for _ in range(2))
    return 2 * n**3 / (device.milliseconds(lambda: a @ b, 25, 100) * 1e9)


def measure(case: AttentionCase, peer: str, direction: str, device: Device) -> dict[str, Any]:
    """One row of results: milliseconds, TFLOP/s and peak MiB, or why the peer did not run."""
    row: dict[str, Any] = {"case": case.key, "peer": peer, "direction": direction}
    try:
        x = make_inputs(case, device.dtype, device.name)
        compute = PEERS[peer](case, x)
        wanted = inputs_with_gradients(peer, x)

        def forward_and_backward() -> None:
            torch.autograd.grad(compute(), wanted, x.do)

        run = torch.no_grad()(compute) if direction == "forward" else forward_and_backward
        row["peak_mib"] = round(device.peak_bytes(run) / 2**20, 1)
        row["ms"] = device.milliseconds(run, 20, 80)
        row["tflops"] = case.flops(direction) / (row["ms"] * 1e9)
    except UnavailableError as reason:
        row["unavailable"] = str(reason)
    except torch.OutOfMemoryError:
        row["unavailable"] = "out of memory"
    except Exception as error:
        # A refusal of a shape, in whatever class it says so, is a result and not the end of the run.
        if peer.startswith("atman") and device.rehearsal is not None:
            raise
        row["unavailable"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return row


def main() -> int:
    device, deadline = device_of_command("benchmarks.timing", __doc__)
    path, content = kept_results(f"attention{tuned()}", device, results=[])
    if "matrix_rate_tflops" not in content:
        content["matrix_rate_tflops"] = matrix_rate(device)
    content["block_sizes"] = "tuned" if tuned() else "committed"
    done = {(row["case"], row["peer"], row["direction"]) for row in content["results"]}
    started: dict[str, int] = content.setdefault("started", {})
    cases = attention_cases() if device.rehearsal is None else REHEARSAL_CASES
    for case, direction, peer in itertools.product(cases, DIRECTIONS, PEERS):
        if (case.key, peer, direction) in done:
            continue
        if time.monotonic() > deadline:
            print(f"stopped in time; {path} holds {len(content['results'])} results, run again to go on")
            return 0
        name = f"{case.key}, {direction}, {peer}"
        # One that was cut off gets a second chance, since time may have run out by itself.
        if started.get(name, 0) < STARTS:
            started[name] = started.get(name, 0) + 1
            save(path, content)
            with device.kernels():
                row = measure(case, peer, direction, device)
        else:
            row = {"case": case.key, "peer": peer, "direction": direction, "unavailable": "did not return"}
        content["results"].append(row)
        save(path, content)
        # After an illegal access nothing works in this process: it ends here, the next one goes on behind it.
        device.release()
        shown = row.get("unavailable") or f"{row['ms']:.3f} ms, {row['tflops']:.0f} TFLOP/s"
        print(f"{case.key:24} {direction:16} {peer:26} {shown}", flush=True)
    print(f"complete: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
