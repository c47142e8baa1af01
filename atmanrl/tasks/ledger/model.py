"""Ledger's net, a Llama of 0.14 M parameters, and completions from it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

MAX_COMPLETION_TOKENS = 64


def build_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A fresh net with random weights; grouped heads and tied embeddings, as in the models it stands for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def complete(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prefixes: Sequence[Sequence[int]],
    *,
    sample: bool = True,
    seed: int = 0,
) -> list[list[int]]:
    """One completion of each prefix, up to and without <eos>: sampled at temperature 1, or greedy.

    Prefixes are token ids; those of one length make a batch, so that nothing is padded.
    """
    torch.manual_seed(seed)
    completions: dict[int, list[int]] = {}
    by_length = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))
    for _, group in groupby(by_length, key=lambda i: len(prefixes[i])):
        indices = list(group)
        batch = _generate(model, tokenizer, [prefixes[i] for i in indices], sample)
        completions.update(zip(indices, batch, strict=True))
    return [completions[i] for i in range(len(prefixes))]


def _generate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prefixes: Sequence[Sequence[int]], sample: bool
) -> list[list[int]]:
    input_ids = torch.tensor(prefixes, device=model.device)
    sampling: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}
    output = model.generate(  # type: ignore[misc]
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=sample,
        max_new_tokens=MAX_COMPLETION_TOKENS,
        **sampling,
    )
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    completions = output[:, input_ids.shape[1] :].tolist()
    return [ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))] for ids in completions]
