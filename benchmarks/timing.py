"""Times peers side by side on a GPU and keeps every number as soon as it is measured.

Most telling first: our kernels and their ceilings on the cases with a target, then the other peers there, then the
other cases; FlexAttention, which compiles anew for every case, last. Our programs are compiled in parallel before
their turn.

    python -m benchmarks.timing                      go on with the results file of this device and commit
    python -m benchmarks.timing --seconds 300        stop in time; the next call continues

Medians of CUDA-event timings with a cold L2 cache (triton.testing.do_bench), TFLOP/s over visible pairs, share of the
matrix rate measured in the same run, peak memory beyond the inputs.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from atman_kernels._triton.launch import BLOCK_SIZES_FILE, block_sizes_in_use
from benchmarks.ahead import Ahead, Program
from benchmarks.cases import TARGET_CASES, AttentionCase, attention_cases, make_inputs
from benchmarks.device import Device, device_of_command, kept_results, save
from benchmarks.peers import PEERS, UnavailableError, inputs_with_gradients

DIRECTIONS = ("forward+backward", "forward")
STARTS = 2
REHEARSAL_CASES = (AttentionCase("tiny", (9, 4), (2, 1), 16), AttentionCase("tiny", (9, 4), (2, 1), 16, prefix=3))


# Ours, then the kernels of cuDNN and FlashAttention-2: what is measured even if nothing else is.
FIRST = ("atman", "atman_fused", "atman_unbiased", "sdpa_cudnn_unbiased", "sdpa_flash_unbiased")
FIRST += ("sdpa_cudnn_extra_column", "sdpa_flash_extra_column", "flash_attn_extra_column")
LAST = ("flex",)


class Measurement(NamedTuple):
    """One row of results to be measured."""

    case: AttentionCase
    direction: str
    peer: str

    @property
    def name(self) -> str:
        """Its name among what was started."""
        return f"{self.case.key}, {self.direction}, {self.peer}"


def in_order(cases: Sequence[AttentionCase]) -> list[Measurement]:
    """Everything to be measured, most telling first; see the module."""
    found = [Measurement(*each) for each in itertools.product(cases, DIRECTIONS, PEERS)]
    positions = {peer: FIRST.index(peer) if peer in FIRST else len(FIRST) for peer in PEERS}

    def rank(each: Measurement) -> tuple[bool, bool, bool]:
        return each.peer in LAST, each.case.key not in TARGET_CASES, each.peer not in FIRST

    return sorted(
        found,
        key=lambda each: (
            *rank(each), cases.index(each.case), DIRECTIONS.index(each.direction), positions[each.peer]
        ),
    )  # fmt: skip


def programs_of(each: Measurement) -> list[Program]:
    """The programs of ours that a measurement runs; none for other peers."""
    if not each.peer.startswith("atman"):
        return []
    biased, fused = not each.peer.endswith("unbiased"), each.peer.endswith("fused")
    kinds = ("forward",) if each.direction == "forward" else ("forward", "fused" if fused else "backward")
    # What a program is compiled for does not depend on the lengths.
    small = each.case._replace(name="", lengths=(256,), prefix=min(each.case.prefix, 1))
    return [Program(small, kind, biased) for kind in kinds]


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
    device, deadline, _ = device_of_command("benchmarks.timing", __doc__)
    path, content = kept_results("attention", device, results=[])
    if "matrix_rate_tflops" not in content:
        content["matrix_rate_tflops"] = matrix_rate(device)
    content["block_sizes"] = "committed" if block_sizes_in_use() == BLOCK_SIZES_FILE else "tuned"
    done = {(row["case"], row["peer"], row["direction"]) for row in content["results"]}
    started: dict[str, int] = content.setdefault("started", {})
    cases = attention_cases() if device.rehearsal is None else REHEARSAL_CASES
    missing = [each for each in in_order(cases) if (each.case.key, each.peer, each.direction) not in done]
    with Ahead(device, [program for each in missing for program in programs_of(each)]) as ahead:
        for each in missing:
            case, direction, peer = each
            for program in programs_of(each):
                ahead.wait(program, deadline)
            if time.monotonic() > deadline:
                print(f"stopped in time; {path} holds {len(content['results'])} results, run again to go on")
                return 0
            # One that was cut off gets a second chance, since time may have run out by itself.
            if started.get(each.name, 0) < STARTS:
                started[each.name] = started.get(each.name, 0) + 1
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
