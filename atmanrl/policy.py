"""Loading the policy of a recipe."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from atmanrl.chat import end_of_turn_ids
from atmanrl.data.ledger import CHECKPOINT as LEDGER_CHECKPOINT
from atmanrl.errors import InputError
from atmanrl.recipe import ModelConfig


def source_of(config: ModelConfig) -> str:
    """What ``from_pretrained`` takes: the configured name, or the directory of the built-in task's checkpoint."""
    return str(LEDGER_CHECKPOINT) if config.name == "ledger" else config.name


def load_policy(config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy and its tokenizer; every end-of-turn token of the tokenizer ends a completion.

    Raises:
        InputError: where ``config.name`` is neither a directory nor a model of the hub.
    """
    name = source_of(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=config.revision)
        model = AutoModelForCausalLM.from_pretrained(
            name,
            revision=config.revision,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
        )
    except OSError as error:
        raise InputError(f"model.name {config.name!r} cannot be loaded: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    ends: Any = model.generation_config.eos_token_id
    # TRL counts padding as the end of a completion by itself, and generate() warns where padding is one of the ends.
    ends = end_of_turn_ids(tokenizer, ends) - {tokenizer.pad_token_id} | {tokenizer.eos_token_id}
    model.generation_config.eos_token_id = sorted(ends)
    return model, tokenizer
