"""What one GRPO update takes: operations and bytes counted from shapes, seconds from a device's assumed rates.

An update is one generation batch: sampling, masks, and ``passes`` uses by the optimiser. Counts follow from the shapes.
Seconds are estimates: every rate they rest on is a field of `Device`, an assumption that the caller states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from atmanrl.saliency.cost import DecoderShape, peak_bytes

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
