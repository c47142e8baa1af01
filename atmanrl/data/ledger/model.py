"""Ledger's net: a Llama of about 0.14 M parameters, and what is measured on it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from atmanrl.answers import LEDGER_ANSWER
from atmanrl.data.ledger.generator import classify_tokens
from atmanrl.rollouts import split_completion

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

    The prefixes are token ids of one common length, so that a batch needs no padding.
    """
    torch.manual_seed(seed)
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


def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], *, seed: int = 0
) -> dict[str, float]:
    """Accuracy of one sampled answer per row; tokens, filler and needed values per chain of thought."""
    prompts = [tokenizer.encode(row["prompt"]) for row in rows]
    completions = complete(model, tokenizer, prompts, seed=seed)
    correct, cot_tokens, filler, needed = 0, 0, 0, 0
    for row, ids in zip(rows, completions, strict=True):
        split = split_completion(ids, tokenizer, LEDGER_ANSWER)
        correct += split.answer is not None and LEDGER_ANSWER.matches(split.answer.value, row["answer"])
        classes = classify_tokens(row, tokenizer.convert_ids_to_tokens(list(split.cot_ids)))
        cot_tokens += len(classes)
        filler += classes.count("filler")
        needed += classes.count("needed")
    n = len(rows)
    return {"accuracy": correct / n, "cot_tokens": cot_tokens / n, "filler": filler / n, "needed": needed / n}


def answer_after(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, chain: Sequence[str]
) -> tuple[str, ...] | None:
    """The greedy answer, as words, to a prompt and a given chain of thought; None where it cannot be parsed."""
    marker = "<ans>"
    prefix = tokenizer.encode(f"{prompt} {' '.join(chain)} {marker}")
    answer = tokenizer.decode(complete(model, tokenizer, [prefix], sample=False)[0])
    parsed = LEDGER_ANSWER.parse(f"{marker} {answer}")
    return None if parsed is None else tuple(parsed.value.split())


def substitute(chain: Sequence[str], position: int, choices: Sequence[str], rng: random.Random) -> list[str]:
    """``chain`` with the word at ``position`` replaced by another of ``choices``."""
    other = rng.choice([word for word in choices if word != chain[position]])
    return [*chain[:position], other, *chain[position + 1 :]]
