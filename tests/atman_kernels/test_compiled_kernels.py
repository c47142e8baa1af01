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


_OFFSETS = """
import re
from benchmarks.compiled import compile_launch
from benchmarks.compiled_kernels import Configuration

# The member of a group and the row or key of a tile times a stride: no product of two 32-bit numbers that are not
# constants may become part of an address.
for launch in Configuration("sm_90", permuted=True, prefix=True).launches():
    text = compile_launch(launch, "sm_90").asm["ttir"]
    strides = set(re.findall(r"(%stride_(?:q|do)h)\\\\b[^,]*: i(?:32|64)", text))
    widened = {new for new, old in re.findall(r"(%[\\\\w#]+) = arith.extsi (%stride_\\\\w+) : i32 to i64", text)}
    narrow = re.findall(r"arith.muli [^:]*%stride_(?:q|do)h\\\\b[^:]*: i32", text)
    wide = re.findall(r"arith.muli [^:]*(%stride_(?:q|do)h\\\\w*)[^:]*: i64", text)
    print(launch.kernel.__name__, len(narrow), len(wide))
"""
