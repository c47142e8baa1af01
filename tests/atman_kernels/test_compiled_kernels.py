"""The production kernels compile for GPUs that are not here, and none is worse than the committed table says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia", reason="ahead-of-time compilation needs Triton's NVIDIA backend")


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    # In this process the kernels may belong to the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


TABLE = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "compiled_kernels.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(version("triton") != TABLE["triton"], reason=f"the table is of Triton {TABLE['triton']}")
def test_production_kernels_compile_without_new_spills_or_longer_main_loops() -> None:
    result = _python("-m", "benchmarks.compiled_kernels", "--quick")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Counts(") >= 20


_REGRESSIONS = """
import json
from benchmarks.compiled import Counts
from benchmarks.compiled_kernels import worse

row = Counts(255, 8, 1000, matrix_instructions=32, matrix_waits=4, main_loops=(500, 900), waited_loads=(0, 1))
changes = [
    {}, {"spill_bytes": 16}, {"main_loops": (530, 900)}, {"matrix_waits": 32}, {"waited_loads": (2, 1)},
    {"shared_bytes": 240000}, {"matrix_instructions": 0}, {"main_loops": (500,), "waited_loads": (0,)},
]
before = json.loads(json.dumps(row._asdict()))
print(json.dumps([worse("sm_90 bfloat16 d128", row._replace(**each), before) for each in changes]))
"""


def test_every_kind_of_regression_is_told() -> None:
    result = _python("-c", _REGRESSIONS)
    assert result.returncode == 0, result.stderr
    none, *found = json.loads(result.stdout)
    assert none == []
    words = (
        "spills 16 B",
        "grew from 500 to 530",
        "serialises",
        "waits for 2 loads",
        "240000 B",
        "no matrix",
        "1 main",
    )
    assert all(word in " ".join(sentences) for word, sentences in zip(words, found, strict=True))


_SPECIALIZATIONS = """
import json
import torch
from atman_kernels import AttentionPlan
from atman_kernels._triton.backward import backward_launches
from atman_kernels._triton.forward import forward_launches
from atman_kernels.problem import AttentionProblem, Gradients
from benchmarks.compiled import specialization

found = set()
for lengths in ([64, 64], [1], [17, 1000, 3], [16] * 5, [333]):
    plan = AttentionPlan(lengths)
    n = sum(lengths)
    q, k, v = (torch.empty(1, n, h, 128, dtype=torch.bfloat16) for h in (6, 2, 2))
    lse, bias = torch.empty(1, 6, n), torch.empty(1, n)
    tables = (plan.sequences, plan.tiles_q, plan.tiles_k)
    problem = AttentionProblem(q, k, v, bias, None, None, *tables, 1.0, True, 7 + n)
    launches = forward_launches("sm_90", q, lse, problem)
    launches += backward_launches("sm_90", Gradients(q, k, v, bias), q, None, q, lse, problem)
    found.add(json.dumps([repr(specialization(launch, "sm_90")) for launch in launches]))
print(json.dumps(len(found)))
"""


def test_new_packed_lengths_and_windows_compile_nothing_new() -> None:
    result = _python("-c", _SPECIALIZATIONS)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == 1


_OFFSETS = r"""
import re
from benchmarks.compiled import compile_launch
from benchmarks.compiled_kernels import Configuration

*_, launch, _ = Configuration("sm_90", permuted=True).launches()
lines = compile_launch(launch, "sm_90").asm["ttir"].splitlines()
# From a group's first head to another: the member of the group times a stride of heads, inside the loops.
first = next(i for i, line in enumerate(lines) if "scf.for" in line)
function = next(line for line in lines if "tt.func public" in line)
# Rows: pointer, strides of batch, time and head.
heads = [re.findall(rf"(%{name}(?:_\d+)?):", function)[3] for name in ("q", "do")]
widened = [match.groups() for line in lines if (match := re.match(r"\s*(%\w+) = arith.extsi (%\w+) :", line))]
wide = {name for name, of in widened if of in heads}
products = [line for line in lines[first:] if "arith.muli" in line and any(f"{name} " in line for name in wide)]
print(launch.kernel.__name__, len(wide), len(products), all(": i64" in line for line in products))
"""


@pytest.mark.slow
def test_heads_of_a_group_may_lie_further_apart_than_32_bits_count() -> None:
    """(B, H, T, D) in memory: two heads of a group are up to GROUP x T x D numbers apart."""
    result = _python("-c", _OFFSETS)
    assert result.returncode == 0, result.stderr
    name, strides, products, are_wide = result.stdout.split()
    # q and do, in the loops with and without a mask.
    assert (name, strides, products, are_wide) == ("backward_keys_kernel", "2", "4", "True")


_HASHES = """
import json
import torch
from triton.runtime import driver
from benchmarks.ahead import Program, launches
from benchmarks.cases import AttentionCase
from benchmarks.compiled import TARGETS, compile_launch


class Hopper:
    def get_current_target(self): return TARGETS["sm_90"]
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0


driver.set_active(Hopper())
small, large = (AttentionCase("", lengths, (2, 1), 64, prefix=3) for lengths in ((256,), (70, 33)))
compiled = launches(Program(small, "forward"), "sm_90", torch.bfloat16, "meta")
ahead = [compile_launch(each, "sm_90").hash for each in compiled]
met = []
for each in launches(Program(large, "forward"), "sm_90", torch.bfloat16, "cpu"):
    options = {"num_warps": each.num_warps, "num_stages": each.num_stages}
    met.append(each.kernel.warmup(grid=(1,), **each.arguments, **options).hash)
print(json.dumps([ahead, met]))
"""


@pytest.mark.slow
def test_a_launch_finds_in_the_cache_what_was_compiled_ahead_for_other_lengths() -> None:
    result = _python("-c", _HASHES)
    assert result.returncode == 0, result.stderr
    ahead, met = json.loads(result.stdout)
    assert ahead == met
