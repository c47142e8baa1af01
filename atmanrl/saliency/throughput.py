"""Throughput of mask optimisation: the engine and its peers on one problem, in one run, on one device."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from atmanrl.rollout import Rollout
from atmanrl.saliency.cost import DecoderShape, necessary_flops
from atmanrl.saliency.decoder import FrozenDecoder, why_unsupported
from atmanrl.saliency.likelihood import ModelLikelihood, frozen
from atmanrl.saliency.packing import pack, whole
from atmanrl.saliency.peers import (
    LossesAndGradient,
    PeerArm,
    batched_flex,
    batched_sdpa,
    captured,
    in_groups,
    packed_engine,
    paper_style_loop,
)

# Two readings of "30 M parameters with 32 k words": most of them in the layers, or in the two embeddings.
SHAPES = {
    "llama-30m": LlamaConfig(
        vocab_size=32000, hidden_size=384, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=6,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, tie_word_embeddings=True,
    ),
    "llama-30m-untied": LlamaConfig(
        vocab_size=32000, hidden_size=384, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
    ),
    "llama-3.2-3b": LlamaConfig(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, tie_word_embeddings=True,
    ),
}  # fmt: skip


def _fast(model: PreTrainedModel, rollouts: Sequence[Rollout]) -> LossesAndGradient:
    return packed_engine(model, rollouts, FrozenDecoder)


ARMS: dict[str, PeerArm] = {
    "fast": _fast,
    "fast-captured": captured(_fast),
    "general": lambda model, rollouts: packed_engine(model, rollouts, ModelLikelihood),
    "paper": paper_style_loop,
    "paper-answer-logits": lambda model, rollouts: paper_style_loop(model, rollouts, answer_logits_only=True),
    "sdpa": batched_sdpa,
    # Whole batches of s x s scores outgrow a CPU's caches.
    "sdpa-by-8": in_groups(batched_sdpa, 8),
    "flex": batched_flex,
}
# Compiled code and replayed graphs pass the counter by.
_UNCOUNTED = ("flex", "fast-captured")


@dataclass(frozen=True)
class Measurement:
    """One arm's step: losses and gradients of all rollouts.

    Attributes:
        seconds: of the fastest step.
        flops: executed by one step as torch.utils.flop_counter counts them, None if unknown (compiled code, graphs).
        peak_bytes: highest memory above what was there before, None if unknown.
        gradient_error: largest difference from the first arm's gradient, relative to its largest entry.
        skipped: why the arm did not run, else None.
    """

    arm: str
    seconds: float = float("nan")
    flops: int | None = None
    peak_bytes: int | None = None
    gradient_error: float = float("nan")
    skipped: str | None = None


def random_model(shape: str, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A Llama of a named shape with random weights.

    Raises:
        ValueError: for an unknown name.
    """
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}; choose one of {', '.join(SHAPES)}")
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaForCausalLM(SHAPES[shape])
    converted: PreTrainedModel = model.to(dtype)
    return converted


def random_problem(
    vocabulary: int, *, queries: int, rollouts: int, prompt: int, cot: tuple[int, int], answer: int
) -> list[Rollout]:
    """``queries`` x ``rollouts`` random token sequences with chains of thought of ``cot`` = (least, most) tokens."""
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocabulary, (n,), generator=generator).tolist())

    problem = []
    for _ in range(queries):
        shared = ids(prompt)
        for _ in range(rollouts):
            length = int(torch.randint(cot[0], cot[1] + 1, (), generator=generator))
            problem.append(Rollout(shared, ids(length), ids(answer)))
    return problem


def necessary_per_step(model: PreTrainedModel, rollouts: Sequence[Rollout]) -> int | None:
    """Operations of one step that nothing can leave out; see :func:`atmanrl.saliency.cost.necessary_flops`.

    None for a model whose layers are not counted there.
    """
    try:
        shape = DecoderShape.of(model)
    except ValueError:
        return None
    return necessary_flops(
        shape, pack([whole(rollout) for rollout in rollouts], device=torch.device("cpu")), _windows(model)
    )


def _windows(model: PreTrainedModel) -> list[int | None]:
    config = model.config.get_text_config(decoder=True)
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large product of random square matrices: what the device's matrix units reach."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(_seconds(lambda: a @ b, device) for _ in range(10))


def measure(
    model: PreTrainedModel, rollouts: Sequence[Rollout], arms: Sequence[str], *, steps: int
) -> Iterator[Measurement]:
    """Run the named arms one after another: one step each to warm up, one to count, then ``steps`` timed ones.

    A step is forward and backward of all rollouts' losses. AdamW and the work per batch are excluded.

    Raises:
        ValueError: for an unknown arm.
    """
    check_arms(arms)
    bias = torch.full((sum(len(rollout.cot_ids) for rollout in rollouts),), -4.0, device=model.device)
    first: Tensor | None = None
    for name in arms:
        reason = _why_not(name, model, rollouts)
        if reason is not None:
            yield Measurement(name, skipped=reason)
            continue
        with frozen(model), _peak_memory(model.device) as peak:
            step = ARMS[name](model, rollouts)
            step(bias)
            with FlopCounterMode(display=False) as counter:
                gradient = step(bias)[1]
            seconds = min(_seconds(partial(step, bias), model.device) for _ in range(steps))
            del step
        first = gradient if first is None else first
        error = float((gradient - first).abs().max() / first.abs().max())
        flops = None if name in _UNCOUNTED else counter.get_total_flops()
        yield Measurement(name, seconds, flops, peak(), error)


def check_arms(arms: Sequence[str]) -> None:
    """Raises ValueError, naming the known arms, for an unknown one."""
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise ValueError(f"unknown arm {unknown[0]!r}; choose from {', '.join(ARMS)}")


def _why_not(arm: str, model: PreTrainedModel, rollouts: Sequence[Rollout]) -> str | None:
    if arm.startswith("fast") and (reason := why_unsupported(model)) is not None:
        return reason
    if arm == "fast-captured" and model.device.type != "cuda":
        return "there are no CUDA graphs on this device"
    windows = [window for window in _windows(model) if window is not None]
    if not arm.startswith(("fast", "general")) and windows and min(windows) < max(map(len, rollouts)):
        return f"written for full attention, the model has a window of {min(windows)}"
    if arm == "flex" and model.device.type != "cuda":
        return "FlexAttention has no backward on this device"
    return None


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Yields a function that says, after the block, how far memory use rose inside it at most."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    resets, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not resets.exists():
        yield lambda: None
        return

    def field(name: str) -> int:
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))

    # What the C library holds back from earlier arms would hide this one's use.
    gc.collect()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    # Writing 5 resets the peak of the resident set.
    resets.write_text("5")
    before = field("VmRSS:")
    peak: list[int] = []
    yield lambda: peak[0]
    peak.append(field("VmHWM:") - before)
