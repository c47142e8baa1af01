"""Loading the policy of a recipe."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_flash_attn_2_available

from atmanrl.chat import end_of_turn_ids
from atmanrl.config import ModelConfig
from atmanrl.errors import InputError
from atmanrl.plain_copy import is_whole
from atmanrl.tasks.ledger import CHECKPOINT as LEDGER_CHECKPOINT


def source_of(config: ModelConfig) -> str:
    """What ``from_pretrained`` takes: the configured name, or the directory of the built-in task's checkpoint."""
    return str(LEDGER_CHECKPOINT) if config.name == "ledger" else os.path.expanduser(config.name)


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
        device: where the weights go; None: to the GPU where there is one. A model that ZeRO-3 shards while it is loaded
            is left on the processes' devices.

    Raises:
        InputError: as `load_model`, and where there is no tokenizer.
    """
    model = load_model(config, autocast=autocast, device=device)
    with _loading(config):
        tokenizer = AutoTokenizer.from_pretrained(source_of(config), revision=config.revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    ends: Any = model.generation_config.eos_token_id
    # TRL counts padding as the end of a completion by itself, and generate() warns where padding is one of the ends.
    ends = end_of_turn_ids(tokenizer, ends) - {tokenizer.pad_token_id} | {tokenizer.eos_token_id}
    model.generation_config.eos_token_id = sorted(ends)
    return model, tokenizer


def load_model(config: ModelConfig, *, autocast: bool = False, device: torch.device | str | None = None) -> Any:
    """The model alone, from safetensors; arguments as of `load_policy`.

    Raises:
        InputError: where ``config.name`` is neither a directory with a model nor a model of the hub, or has no
            safetensors.
    """
    dtype = getattr(torch, config.dtype)
    with _loading(config):
        model: Any = AutoModelForCausalLM.from_pretrained(
            source_of(config),
            revision=config.revision,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=attention_of(config, half=autocast or dtype in (torch.bfloat16, torch.float16)),
        )
    # Under ZeRO-3 transformers has put each process's part on its device, and DeepSpeed moves nothing any more.
    return model.to(_default_device() if device is None else device) if is_whole(model) else model


@contextmanager
def _loading(config: ModelConfig) -> Iterator[None]:
    """What transformers says of a name it cannot load, with the name in front; of a path, what is missing there."""
    path = Path(source_of(config))
    refused = f"model {config.name!r} cannot be loaded"
    if not path.exists() and (path.is_absolute() or config.name.startswith((".", "~"))):
        raise InputError(f"{refused}: there is no such directory")
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{refused}: the directory has no config.json")
    try:
        yield
    except (OSError, ValueError) as error:
        raise InputError(f"{refused}: {error}") from error


def computing_dtype(model: PreTrainedModel, *, bf16: bool) -> torch.dtype:
    """What a policy trained with ``bf16`` computes in: autocast leaves float32 weights to the optimiser alone."""
    return torch.bfloat16 if bf16 else model.dtype


def _default_device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
