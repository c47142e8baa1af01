"""What a kernel compiles to, without a GPU: registers, spills, shared memory and the instructions of its main loops.

Kernels are compiled ahead of time with exactly the signature and specialisation that a launch with the given tensors
has. Must run in a process where Triton's interpreter is off.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from atman_kernels._triton.launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Largest shared memory of one program, in bytes.
SHARED_CAPACITY = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
_NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# wgmma, tcgen05 and mma in the machine code of their generations.
_MATRIX = re.compile(r"\b(?:[HIQ]GMMA|UTC[A-Z]*MMA|[HID]MMA)\b")
# A load into registers, and the barrier that a bulk copy gets for itself where the compiler did not pipeline it.
_WAITED_LOAD = re.compile(r"\bLDG\.|\bSYNCS\.EXCH\b")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
_BRANCH = re.compile(r"\bBRA(?:\.\w+)* (?:`\(\S+\)|!?U?P\d+, )*\s*(0x[0-9a-f]+)")


class Counts(NamedTuple):
    """Static cost of one compiled kernel.

    ``main_loops`` lists the non-matrix instructions of each matrix loop, and ``waited_loads`` how many loads of global
    memory each one waits for in the pass that issues them. ``matrix_waits`` counts where warps wait for asynchronous
    matrix instructions: with as many waits as instructions the assembler has serialised them.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix_instructions: int
    matrix_waits: int
    main_loops: tuple[int, ...]
    waited_loads: tuple[int, ...]


def specialization(launch: Launch, target: str) -> tuple[Any, ...]:
    """What a launch is compiled for: equal values mean that no second compilation happens."""
    backend = make_backend(TARGETS[target])
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, found, options = bind(
        **launch.arguments, num_warps=launch.num_warps, num_stages=launch.num_stages, debug=False
    )
    return launch.kernel._pack_args(backend, options, bound, found, options)


def compile_launch(launch: Launch, target: str) -> Any:
    """The compiled kernel of a launch for "sm_80", "sm_90", "sm_100" or "gfx942"."""
    options, signature, constexprs, attributes = specialization(launch, target)
    source = ASTSource(launch.kernel, signature, constexprs, attributes)
    return triton.compile(source, target=TARGETS[target], options=options.__dict__)


def count(compiled: Any) -> Counts:
    """Read the counts of a compiled kernel from its machine code; main loops for NVIDIA targets only."""
    if "amdgcn" in compiled.asm:
        assembly = compiled.asm["amdgcn"]
        fields = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", assembly))
        return Counts(
            registers=int(fields["vgpr_count"]),
            spill_bytes=4 * (int(fields["vgpr_spill_count"]) + int(fields["sgpr_spill_count"])),
            shared_bytes=compiled.metadata.shared,
            matrix_instructions=len(re.findall(r"\bv_mfma_", assembly)),
            matrix_waits=0,
            main_loops=(),
            waited_loads=(),
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        listing = _cuobjdump("-sass", file.name)
    fields = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    instructions = [(int(address, 16), text) for address, text in _INSTRUCTION.findall(listing)]
    loops = _main_loops(instructions)
    return Counts(
        registers=int(fields["REG"]),
        spill_bytes=int(fields["STACK"]) + int(fields["LOCAL"]),
        shared_bytes=compiled.metadata.shared,
        matrix_instructions=sum(1 for _, text in instructions if _MATRIX.search(text)),
        matrix_waits=sum(1 for _, text in instructions if "WARPGROUP.DEPBAR" in text),
        main_loops=tuple(sum(not _MATRIX.search(text) for text in body) for body in loops),
        waited_loads=tuple(sum(bool(_WAITED_LOAD.search(text)) for text in body) for body in loops),
    )


def _main_loops(instructions: list[tuple[int, str]]) -> list[list[str]]:
    """The bodies of the innermost loops with matrix instructions, in the order of their addresses."""
    loops = []
    for address, text in instructions:
        branch = _BRANCH.search(text)
        if branch and int(branch[1], 16) < address:
            loops.append((int(branch[1], 16), address))
    # Waits that outlast their first try stand at the end of the kernel and branch back into the middle of a loop.
    loops = [loop for loop in loops if not any(first < loop[0] <= last < loop[1] for first, last in loops)]
    bodies = {(first, last): [text for at, text in instructions if first <= at <= last] for first, last in loops}
    bodies = {loop: body for loop, body in bodies.items() if any(_MATRIX.search(text) for text in body)}
    return [
        body
        for (first, last), body in sorted(bodies.items())
        if not any((f, e) != (first, last) and first <= f and e <= last for f, e in bodies)
    ]


def _cuobjdump(option: str, path: str) -> str:
    command = [str(_NVIDIA_TOOLS / "cuobjdump"), option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
