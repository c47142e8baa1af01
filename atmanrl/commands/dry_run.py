"""``atmanrl train --dry-run``: what one update takes, from the configuration alone."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from atmanrl.data import DataError, load_task
from atmanrl.policy import source_of
from atmanrl.recipe import ModelConfig, Recipe
from atmanrl.trainer import AtManGRPOConfig


def describe_update(recipe: Recipe, args: AtManGRPOConfig) -> str:
    """Sizes, steps, tokens, memory and shares of the arithmetic, one fact per line."""
    return "\n".join(
        [args.arithmetic.describe(), _steps(recipe, args), _tokens(args), _memory(recipe.model), operation_shares(args)]
    )


def operation_shares(args: AtManGRPOConfig) -> str:
    """How an update's matrix operations divide, prompts left out.

    A completion token costs a model of n parameters about 2n operations when it is sampled, 4n per mask step (a forward
    pass and a frozen backward pass), and 6n per pass of the update, with 2n more for the old log-probabilities. Time
    divides otherwise: sampling waits for memory and uses a small part of a device's arithmetic.
    """
    scored = args.saliency_weight or args.log_saliency
    parts = {
        "generation": 2,
        "saliency": 4 * args.mask.steps if scored else 0,
        "update": 6 * args.num_iterations + (2 if args.num_iterations > 1 else 0),
    }
    shares = ", ".join(f"{name} {cost / sum(parts.values()):.0%}" for name, cost in parts.items())
    return f"operations        {shares} (of the matrix operations, not of the time)"


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


def _memory(config: ModelConfig) -> str:
    try:
        model_config = AutoConfig.from_pretrained(source_of(config), revision=config.revision)
    except OSError as error:
        return f"memory            unknown: {str(error).splitlines()[0]}"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = parameters * torch.finfo(getattr(torch, config.dtype)).bits / 8 / 2**30
    return (
        f"memory            {parameters / 1e6:.4g} M parameters in {config.dtype}: weights {size:.3g} + gradients "
        f"{size:.3g} + AdamW {2 * size:.3g} = {4 * size:.3g} GiB on one process, activations not counted"
    )
