"""Loading the policy of a recipe."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_flash_attn_2_available

from atmanrl.chat import end_of_turn_ids
from atmanrl.data.ledger import CHECKPOINT as LEDGER_CHECKPOINT
from atmanrl.errors import InputError
from atmanrl.recipe import ModelConfig


def source_of(config: ModelConfig) -> str:
    """What ``from_pretrained`` takes: the configured name, or the directory of the built-in task's checkpoint."""
    return str(LEDGER_CHECKPOINT) if config.name == "ledger" else config.name


def attention_of(config: ModelConfig, *, half: bool) -> str:
    """The attention implementation that "auto" stands for: flash-attn computes in half precision alone."""
    if config.attn_implementation != "auto":
        return config.attn_implementation
    return "flash_attention_2" if half and is_flash_attn_2_available() else "sdpa"


def load_policy(
    config: ModelConfig, *, autocast: bool = False, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy and its tokenizer; every end-of-turn token of the tokenizer ends a completion.

    Args:
        config: which model, in which dtype; ``config.lora`` is not its concern.
        autocast: whether every pass will run in half precision whatever the dtype of the weights.
        device: where the weights go; None: to the GPU where there is one.

    Raises:
        InputError: where ``config.name`` is neither a directory nor a model of the hub, or has no safetensors.
    """
    name = source_of(config)
    dtype = getattr(torch, config.dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=config.revision)
        model: Any = AutoModelForCausalLM.from_pretrained(
            name,
            revision=config.revision,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=attention_of(config, half=autocast or dtype in (torch.bfloat16, torch.float16)),
        )
    except OSError as error:
        raise InputError(f"model.name {config.name!r} cannot be loaded: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    ends: Any = model.generation_config.eos_token_id
    # TRL counts padding as the end of a completion by itself, and generate() warns where padding is one of the ends.
    ends = end_of_turn_ids(tokenizer, ends) - {tokenizer.pad_token_id} | {tokenizer.eos_token_id}
    model.generation_config.eos_token_id = sorted(ends)
    model.to(_default_device() if device is None else device)
    return model, tokenizer


def computing_dtype(model: PreTrainedModel, *, bf16: bool) -> torch.dtype:
    """What a policy trained with ``bf16`` computes in: autocast leaves float32 weights to the optimiser alone."""
    return torch.bfloat16 if bf16 else model.dtype


def _default_device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
