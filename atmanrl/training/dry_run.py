"""``atmanrl train --dry-run``: what one update takes, from the configuration alone."""

from __future__ import annotations

import math
import os

import torch
from transformers import AutoConfig

from atmanrl.models import source_of, unfilled
from atmanrl.recipe import ModelConfig, Recipe
from atmanrl.rollout import Rollout
from atmanrl.saliency.cost import DecoderShape
from atmanrl.tasks import DataError, load_task
from atmanrl.training.trainer import AtManGRPOConfig
from atmanrl.training.update_cost import Device, Engine, Strategy, Workload, memory, update_time


def describe_update(recipe: Recipe, args: AtManGRPOConfig) -> str:
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


def _steps(recipe: Recipe, args: AtManGRPOConfig) -> str:
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
        f"time              {shares} (estimated with the rates of `update_cost.Device` and completions of "
        f"{work.completion} tokens)",
    ]
