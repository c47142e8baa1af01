"""Cost of one GRPO update; ``atmanrl train --dry-run`` prints it from the configuration alone.

Operations and bytes are counted from shapes, seconds follow from a device's assumed rates.

An update is one generation batch: sampling, masks, and ``passes`` uses by the optimiser. Counts follow from the shapes.
Seconds are estimates: every rate they rest on is a field of `Device`, an assumption that the caller states.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import AutoConfig

from atmanrl.config import ModelConfig
from atmanrl.models import source_of, unfilled
from atmanrl.rollout import Rollout
from atmanrl.saliency.cost import DecoderShape, peak_bytes
from atmanrl.settings import Settings
from atmanrl.tasks import DataError, load_task
from atmanrl.training.config import AtManGRPOConfig

Strategy = Literal["ddp", "fsdp2", "lora"]
Engine = Literal["transformers", "vllm"]


@dataclass(frozen=True)
class Device:
    """A GPU and how it is connected. Assumptions, none of them measured here.

    Attributes:
        matrix_rate: bf16 operations per second of large matrix products; bandwidth: of its memory, bytes per second.
            saliency_share, update_share: part of ``matrix_rate`` that mask steps and update passes reach.
        bandwidth_share: part of ``bandwidth`` that a decoding step reaches.
        decode_overhead, engine_overhead: seconds that a decoding step takes beside reading memory, in transformers and
            in an engine that replays captured graphs.
        link, network: bytes per second and GPU inside a node and between nodes; gpus_per_node.
    """

    matrix_rate: float = 8.0e14
    bandwidth: float = 3.35e12
    saliency_share: float = 0.5
    update_share: float = 0.35
    bandwidth_share: float = 0.6
    decode_overhead: float = 0.025
    engine_overhead: float = 0.003
    link: float = 3.0e11
    network: float = 4.0e10
    gpus_per_node: int = 8


@dataclass(frozen=True)
class Workload:
    """One generation batch over all GPUs.

    Attributes:
        queries, group: prompts, and rollouts of each.
        prompt, completion: mean tokens; longest: of the longest completion; answer: tokens of the answer.
        passes: of the optimiser over the batch; mask_steps: of the mask optimisation, 0 without saliency.
        micro_batch: rollouts per forward and backward; checkpointing: activations are computed again in the backward.
    """

    queries: int = 8
    group: int = 8
    prompt: int = 150
    completion: int = 200
    longest: int = 1024
    answer: int = 4
    passes: int = 2
    mask_steps: int = 200
    micro_batch: int = 2
    checkpointing: bool = True

    @property
    def rollouts(self) -> int:
        """Completions of the batch."""
        return self.queries * self.group


@dataclass(frozen=True)
class UpdateTime:
    """Seconds of the parts of an update; ``communication`` between processes is counted apart, not hidden in them."""

    generation: float
    saliency: float
    update: float
    communication: float

    @property
    def total(self) -> float:
        """Seconds, the parts one after another."""
        return self.generation + self.saliency + self.update + self.communication


def layer_parameters(shape: DecoderShape) -> int:
    """Weights of all layers: L (2 h dq + 2 h dkv + 3 h m), norms left out."""
    return shape.layers * shape.hidden * (2 * shape.width_q + 2 * shape.width_kv + 3 * shape.mlp)


def parameters(shape: DecoderShape) -> int:
    """Weights with one embedding, tied to the head."""
    return layer_parameters(shape) + shape.vocabulary * shape.hidden


def saliency_flops(shape: DecoderShape, work: Workload) -> float:
    """Operations of the masks of a batch: mask_steps x (forward + frozen backward) over the completion rows, 4 per
    weight and row, the vocabulary for answer rows alone, attention 4 dq forward and 10 dq backward per visible pair.
    """
    rows = work.completion - 1
    pairs = rows * (rows + 1) / 2
    linear = 4 * (layer_parameters(shape) * rows + shape.vocabulary * shape.hidden * work.answer)
    attention = shape.layers * shape.width_q * (14 * pairs + 10 * rows * work.prompt)
    once = 2 * layer_parameters(shape) * work.prompt * work.queries
    return work.mask_steps * work.rollouts * (linear + attention) + (once if work.mask_steps else 0)


def update_flops(shape: DecoderShape, work: Workload) -> float:
    """Operations of the passes: 6 per weight and token, 8 where activations are computed again, and one forward for
    the old log-probabilities where there is more than one pass; the vocabulary for completion tokens alone.
    """
    tokens, head = work.prompt + work.completion, shape.vocabulary * shape.hidden * work.completion
    forward = 2 * (layer_parameters(shape) * tokens + head)
    attention = shape.layers * 2 * shape.width_q * tokens**2
    per_pass = (4 if work.checkpointing else 3) * forward + (4.5 if work.checkpointing else 3.5) * attention
    old = forward + attention if work.passes > 1 else 0
    return work.rollouts * (work.passes * per_pass + old)


def generation_seconds(
    shape: DecoderShape, work: Workload, device: Device, *, gpus: int, strategy: Strategy, engine: Engine
) -> float:
    """Every decoding step reads all weights and the keys and values of the rollouts still running, which end evenly
    until the longest does.

    transformers decodes through autocast, which reads float32 weights, writes bf16 ones and reads those: 8 bytes per
    weight and step instead of 2, except with frozen bf16 weights or where shards are gathered in bf16.
    """
    per_weight = 8 if engine == "transformers" and strategy == "ddp" else 2
    overhead = device.decode_overhead if engine == "transformers" else device.engine_overhead
    running = work.rollouts / gpus * work.completion / work.longest
    cache = 2 * 2 * shape.layers * shape.width_kv * running * (work.prompt + work.longest / 2)
    read = per_weight * parameters(shape) + cache
    return work.longest * (read / (device.bandwidth_share * device.bandwidth) + overhead)


def update_time(
    shape: DecoderShape,
    work: Workload,
    device: Device,
    *,
    gpus: int = 1,
    strategy: Strategy = "ddp",
    engine: Engine = "transformers",
    samplers: int = 0,
) -> UpdateTime:
    """Seconds of one update on ``gpus`` training devices.

    Args:
        shape: of the policy; work: the batch, over all devices; device: what is assumed.
        gpus: training processes, with at least one rollout of the batch for each.
        strategy: how weights, gradients and optimiser lie on them.
        engine: what samples; "vllm" decodes without launch gaps from bf16 weights handed over once per update.
        samplers: devices that do nothing but sample; 0: the training devices sample.

    Raises:
        ValueError: for more devices than rollouts.
    """
    if gpus > work.rollouts:
        raise ValueError(f"{gpus} devices have no work in a batch of {work.rollouts} rollouts")
    rate = device.link if gpus + samplers <= device.gpus_per_node else device.network
    share, weights = (gpus - 1) / gpus, 2 * parameters(shape)
    moved = 0.0
    if strategy == "ddp":
        moved += work.passes * 2 * share * 2 * weights
    if strategy == "fsdp2":
        # Two gatherings and one scattering per micro-batch, one gathering for the masks, one per decoding step.
        micro_batches = max(1.0, work.rollouts / gpus / work.micro_batch)
        decoding = work.longest if engine == "transformers" else 0
        moved += share * weights * (3 * work.passes * micro_batches + bool(work.mask_steps) + decoding)
    if engine == "vllm" and (strategy == "fsdp2" or samplers):
        moved += weights
    return UpdateTime(
        generation=generation_seconds(shape, work, device, gpus=samplers or gpus, strategy=strategy, engine=engine),
        saliency=saliency_flops(shape, work) / gpus / (device.saliency_share * device.matrix_rate),
        update=update_flops(shape, work) / gpus / (device.update_share * device.matrix_rate),
        communication=moved / rate,
    )


def memory(
    shape: DecoderShape, work: Workload, *, gpus: int = 1, strategy: Strategy = "ddp", colocated: bool = False
) -> tuple[float, float]:
    """Bytes on each training device at their peak (while masks are optimised, while the policy is updated).

    "ddp" and "fsdp2" keep float32 weights, gradients and the two moments of AdamW, 16 bytes per weight; "lora" keeps
    frozen bf16 weights, its adapters being small. Masks run on a bf16 copy, which bf16 weights do not need, without
    gradients beside it; their rows are taken all at once, an upper bound, because the engine splits what does not fit.
    Micro-batches are of the longest completions. A colocated engine keeps bf16 weights of its own and the keys and
    values of its rollouts.
    """
    n = parameters(shape)
    shards = gpus if strategy == "fsdp2" else 1
    state, gradients = (2 * n, 0.0) if strategy == "lora" else (16 * n / shards, 4 * n / shards)
    share = -(-work.rollouts // gpus)
    if colocated:
        state += 2 * n + 4 * shape.layers * shape.width_kv * share * (work.prompt + work.longest)
    prompts = -(-share // work.group) * work.prompt
    masks = peak_bytes(shape, 2, share * (work.completion - 1), share * work.answer, prompts, on_cpu=False)
    tokens = work.micro_batch * (work.prompt + work.longest)
    layer = 2 * (4 * shape.hidden + 2 * shape.width_q + 2 * shape.width_kv + 4 * shape.mlp)
    activations = tokens * (shape.layers * 2 * shape.hidden + layer if work.checkpointing else shape.layers * layer)
    # The bf16 weights that autocast made are kept for the backward, two layers of shards are gathered at a time.
    cast = 2 * n / (shape.layers if work.checkpointing else 1) if strategy == "ddp" else 4 * n / shape.layers
    # bf16 logits, their float32 copy and its gradient.
    logits = 10 * work.micro_batch * work.longest * shape.vocabulary
    copy = 0 if strategy == "lora" else 2 * n
    scoring = copy + masks if work.mask_steps else 0.0
    return state - gradients + scoring, state + activations + cast + logits


def describe_update(recipe: Settings, args: AtManGRPOConfig) -> str:
    """Sizes, steps, tokens, memory, shares of the arithmetic and of the time, one fact per line."""
    return "\n".join(
        [
            args.arithmetic.describe(),
            _steps(recipe, args),
            _tokens(args),
            *_memory_and_time(recipe.model, args),
            operation_shares(args),
        ]
    )


def operation_shares(args: AtManGRPOConfig) -> str:
    """How an update's matrix operations divide, prompts left out.

    A completion token costs a model of n parameters about 2n operations when it is sampled, 2n per pass of its scoring
    (a mask step is a forward pass and a frozen backward pass), and 6n per pass of the update, with 2n more for the old
    log-probabilities. Time divides otherwise: sampling waits for memory and uses a small part of a device's arithmetic.
    """
    parts = {
        "generation": 2,
        "saliency": 4 * _scoring_steps(args),
        "update": 6 * args.num_iterations + (2 if args.num_iterations > 1 else 0),
    }
    shares = ", ".join(f"{name} {cost / sum(parts.values()):.0%}" for name, cost in parts.items())
    return f"operations        {shares} (of the matrix operations, not of the time)"


def _scoring_steps(args: AtManGRPOConfig) -> int:
    """Steps of a forward and a frozen backward pass that scoring the longest completion takes; 0: none is scored."""
    if not args.scores_tokens:
        return 0
    if args.estimator().name == "mask":
        return args.mask.steps
    longest = Rollout((0,), (0,) * max(1, int(args.max_completion_length or 0) - 1), (0,))
    return math.ceil(args.estimator().passes(longest).total / 2)


def _steps(recipe: Settings, args: AtManGRPOConfig) -> str:
    if args.max_steps > 0:
        return f"steps             {args.max_steps} optimiser steps (max_steps)"
    try:
        examples = len(load_task(recipe.data).train)
    except DataError as error:
        return f"steps             unknown: {error}"
    steps = args.arithmetic.optimizer_steps(examples, args.num_train_epochs)
    batches = examples // args.arithmetic.queries
    return (
        f"steps             {examples} examples -> {batches} generation batches x "
        f"{args.arithmetic.steps_per_generation} steps x {args.num_train_epochs:g} epochs = {steps} optimiser steps"
    )


def _tokens(args: AtManGRPOConfig) -> str:
    rollouts, length = args.arithmetic.generation_batch_size, args.max_completion_length
    return f"tokens            at most {rollouts} x {length} = {rollouts * length} sampled per generation batch"


def _memory_and_time(config: ModelConfig, args: AtManGRPOConfig) -> list[str]:
    try:
        model_config = AutoConfig.from_pretrained(source_of(config), revision=config.revision)
    except OSError as error:
        return [f"memory            unknown: {str(error).splitlines()[0]}"]
    dtype = getattr(torch, config.dtype)
    model = unfilled(model_config, dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = parameters * torch.finfo(dtype).bits / 8 / 2**30
    where = "over all processes" if _is_sharded() else "per process"
    held = "" if config.lora else f" + gradients {size:.3g} + AdamW {2 * size:.3g} = {4 * size:.3g} GiB"
    lines = [
        f"memory            {parameters / 1e6:.4g} M parameters in {config.dtype}: weights {size:.3g}{held} {where}"
    ]
    try:
        shape = DecoderShape.of(model)
    except ValueError:
        return lines
    return [*lines, *_estimates(shape, args, _strategy(config))]


def _strategy(config: ModelConfig) -> Strategy:
    return "lora" if config.lora else "fsdp2" if _is_sharded() else "ddp"


def _is_sharded() -> bool:
    """Whether the launcher, which speaks through the environment, will shard the weights."""
    fsdp, stage = (os.environ.get(f"ACCELERATE_{name}") for name in ("USE_FSDP", "DEEPSPEED_ZERO_STAGE"))
    return fsdp == "true" or stage == "3"


def _estimates(shape: DecoderShape, args: AtManGRPOConfig, strategy: Strategy) -> list[str]:
    longest = int(args.max_completion_length or 0)
    work = Workload(
        queries=args.arithmetic.queries,
        group=args.arithmetic.num_generations,
        completion=max(2, longest // 4),
        longest=longest,
        passes=args.num_iterations,
        mask_steps=_scoring_steps(args),
        micro_batch=args.per_device_train_batch_size,
        checkpointing=bool(args.gradient_checkpointing),
    )
    processes = args.arithmetic.processes
    engine: Engine = "vllm" if args.use_vllm else "transformers"
    # With its sleep mode a colocated engine hands its memory back between two samplings.
    colocated = bool(args.use_vllm) and args.vllm_mode == "colocate" and not args.vllm_enable_sleep_mode
    masks, update = memory(shape, work, gpus=processes, strategy=strategy, colocated=colocated)
    time = update_time(shape, work, Device(), gpus=processes, strategy=strategy, engine=engine)
    parts = {"generation": time.generation, "saliency": time.saliency, "update": time.update}
    shares = ", ".join(f"{name} {seconds / sum(parts.values()):.0%}" for name, seconds in parts.items())
    return [
        f"peak memory       {masks / 2**30:.3g} GiB optimising masks, {update / 2**30:.3g} GiB in an update pass "
        f"(estimated for bf16 on a GPU)",
        f"time              {shares} (estimated with the rates of `plan.Device` and completions of "
        f"{work.completion} tokens)",
    ]
