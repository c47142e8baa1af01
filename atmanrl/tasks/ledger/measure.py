"""What is measured on a net that solves Ledger: accuracy, filler, and which words of its chain the answer follows."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

import atman_kernels.hf  # noqa: F401
from atmanrl.answers import LEDGER_ANSWER, split_completion
from atmanrl.config import LedgerConfig
from atmanrl.tasks.ledger.generator import Example, classify_tokens, sample_chain
from atmanrl.tasks.ledger.model import complete
from atmanrl.tasks.ledger.vocabulary import ANSWER, FILLER, NAMES, VALUES

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase


def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], *, seed: int = 0
) -> dict[str, float]:
    """Accuracy of one sampled answer per row; tokens, filler and needed values per chain of thought."""
    completions = complete(model, tokenizer, [tokenizer.encode(row["prompt"]) for row in rows], seed=seed)
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


def measure_interventions(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Example],
    config: LedgerConfig,
    *,
    seed: int = 0,
) -> dict[str, dict[str, int]]:
    """How often the greedy answer changes when one word of the chain of thought is replaced by another of its sort.

    Each example gets one reference chain; each of its words is replaced once. Returns, per kind of word ("needed
    value", "other value", "asked name", "other name", "filler"), how many were replaced and how many answers changed;
    under "intact chain", how many chains there were and how many led to a wrong answer as they stood.
    """
    rng = random.Random(seed)
    kinds: list[str] = []
    prefixes: list[list[int]] = []
    intact: list[int] = []
    golds: list[str] = []
    for example in examples:
        chain = sample_chain(example, config, rng, example.pairs)
        classes = classify_tokens(example.row(), chain)
        variants = [chain, *(_substitute(chain, i, rng) for i in range(len(chain)))]
        intact += [len(kinds)] * len(variants)
        golds += [example.answer] * len(variants)
        kinds += ["intact chain", *(_kind(word, c, example) for word, c in zip(chain, classes, strict=True))]
        prefixes += [tokenizer.encode(f"{example.prompt} {' '.join(variant)} {ANSWER}") for variant in variants]
    answers = [str(tokenizer.decode(ids)) for ids in complete(model, tokenizer, prefixes, sample=False)]
    counts: dict[str, dict[str, int]] = defaultdict(lambda: {"replaced": 0, "changed": 0})
    for kind, answer, base, gold in zip(kinds, answers, intact, golds, strict=True):
        expected = gold if kind == "intact chain" else answers[base]
        counts[kind]["replaced"] += 1
        counts[kind]["changed"] += answer.split() != expected.split()
    return dict(counts)


@torch.no_grad()
def measure_suppression(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: LedgerConfig,
    *,
    bias: float = -4.0,
    seed: int = 0,
) -> dict[str, float]:
    """Mean loss of the gold answer's tokens, in nats, behind a reference chain seen as it is and under ``bias``.

    ``bias`` (natural log) is added to the attention score of every chain token: the paper's mask at its start. A task
    whose answers survive it gives a mask nothing to restore.
    """
    rng = random.Random(seed)
    attention = model.config._attn_implementation
    model.set_attn_implementation("atman")
    losses = []
    for example in examples:
        chain = sample_chain(example, config, rng, example.pairs)
        before = len(tokenizer.encode(example.prompt))
        ids = torch.tensor([tokenizer.encode(f"{example.prompt} {' '.join(chain)} {ANSWER} {example.answer}")] * 2)
        key_bias = torch.zeros(ids.shape)
        key_bias[1, before : before + len(chain)] = bias
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), key_bias=key_bias, use_cache=False).logits
        nll = cross_entropy(logits.transpose(1, 2)[..., :-1], ids[:, 1:], reduction="none")
        losses.append(nll[:, before + len(chain) :].mean(1))
    model.set_attn_implementation(attention)
    intact, suppressed = torch.stack(losses).mean(0).tolist()
    return {"chains": len(examples), "bias": bias, "loss_intact": intact, "loss_suppressed": suppressed}


def _substitute(chain: Sequence[str], position: int, rng: random.Random) -> list[str]:
    word = chain[position]
    sort = next(words for words in (VALUES, NAMES, FILLER) if word in words)
    return [*chain[:position], rng.choice([other for other in sort if other != word]), *chain[position + 1 :]]


def _kind(word: str, token_class: str, example: Example) -> str:
    if word in VALUES:
        return "needed value" if token_class == "needed" else "other value"
    if word in NAMES:
        return "asked name" if word in example.asked else "other name"
    return "filler"
