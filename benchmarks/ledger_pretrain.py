"""Pre-trains Ledger's starting checkpoint and measures it: ``python -m benchmarks.ledger_pretrain --output DIR``.

Plain supervised training on generated chains of thought. In some examples the chain's values are random, the answer
follows the chain rather than the prompt, and the loss on the chain is masked: the net has to read its chain, and yet
never learns to write a wrong one. Measured are accuracy, filler, and which words of its chain the answer follows.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import atman_kernels.hf  # noqa: F401
from atmanrl.answers import LEDGER_ANSWER, split_completion
from atmanrl.config import LedgerConfig
from atmanrl.tasks.ledger import (
    ANSWER,
    EOS,
    FILLER,
    NAMES,
    VALUES,
    Example,
    build_tokenizer,
    classify_tokens,
    sample_chain,
    sample_examples,
)

RECORD = "record.json"


@dataclass(frozen=True)
class PretrainConfig:
    """How the starting checkpoint is trained.

    Attributes:
        steps: AdamW steps.
        batch_size: examples per step, never repeated.
        lr: peak step size; linear warm-up, then a cosine down to a tenth.
        warmup: steps of the warm-up.
        weight_decay: of AdamW; large, so that attention stays soft enough for a suppressed token to be missed.
        log_every: steps between the losses that are recorded.
        evaluated: held-out prompts that the result is measured on, a tenth of them by intervention.
        seed: of weights and examples.
        ledger: numbers of the task.
    """

    steps: int = 2400
    batch_size: int = 64
    lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.2
    log_every: int = 50
    evaluated: int = 1000
    seed: int = 0
    ledger: LedgerConfig = field(default_factory=LedgerConfig)


@dataclass(frozen=True)
class Batch:
    """Padded token ids (B, T) and the weight (B, T) of predicting each of them; 0 on prompts and padding."""

    input_ids: torch.Tensor
    weights: torch.Tensor


def batches(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[Batch]:
    """Endless training batches; a function of the configuration alone."""
    rng = random.Random(f"{config.seed} chains")
    examples = sample_examples(config.ledger, config.seed, held_out=False)
    while True:
        encoded = [_encode(example, config, tokenizer, rng) for example in islice(examples, config.batch_size)]
        length = max(len(ids) for ids, _ in encoded)
        pad = tokenizer.pad_token_id
        yield Batch(
            torch.tensor([[*ids, *[pad] * (length - len(ids))] for ids, _ in encoded]),
            torch.tensor([[*weights, *[0.0] * (length - len(weights))] for _, weights in encoded]),
        )


def pretrain(
    config: PretrainConfig, tokenizer: PreTrainedTokenizerBase, *, steps: int | None = None
) -> tuple[LlamaForCausalLM, dict[int, float]]:
    """Trains a fresh net; returns it with the mean loss of every ``log_every`` steps, keyed by the last of them.

    ``steps`` ends the run early without changing its learning-rate schedule.
    """
    torch.manual_seed(config.seed)
    model = build_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / config.warmup, total_iters=config.warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps - config.warmup, config.lr / 10),
        ],
        milestones=[config.warmup],
    )
    losses: dict[int, float] = {}
    recent: list[float] = []
    model.train()
    for step, batch in enumerate(islice(batches(config, tokenizer), steps or config.steps), start=1):
        loss = _loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        if step % config.log_every == 0:
            losses[step] = sum(recent) / len(recent)
            recent.clear()
    return model.eval(), losses


def record(
    config: PretrainConfig, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, losses: dict[int, float]
) -> dict[str, Any]:
    """How a checkpoint was made and what it measures on held-out prompts."""
    examples = list(islice(sample_examples(config.ledger, config.seed, held_out=True), config.evaluated))
    rows = [example.row() for example in examples]
    intervened = examples[: config.evaluated // 10]
    return {
        "config": asdict(config),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "losses": losses,
        "measured": {"prompts": len(rows), **measure(model, tokenizer, rows)},
        "interventions": measure_interventions(model, tokenizer, intervened, config.ledger),
        "suppression": measure_suppression(model, tokenizer, intervened, config.ledger),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, measures and saves; prints the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ledger_pretrain", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory the checkpoint is written to")
    numbers = [f for f in fields(PretrainConfig) if f.name != "ledger"]
    for option in numbers:
        parser.add_argument(f"--{option.name}", type=type(option.default), default=option.default)
    arguments = parser.parse_args(argv)
    config = PretrainConfig(**{option.name: getattr(arguments, option.name) for option in numbers})
    # A net this small gains nothing from threads, and one thread gives the same sums on every machine.
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    start = time.perf_counter()
    model, losses = pretrain(config, tokenizer)
    seconds = time.perf_counter() - start
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    command = " ".join(["python -m benchmarks.ledger_pretrain", *(sys.argv[1:] if argv is None else argv)])
    made = {"command": command, "seconds": round(seconds, 1), **record(config, model, tokenizer, losses)}
    (arguments.output / RECORD).write_text(json.dumps(made, indent=2) + "\n")
    print(
        json.dumps(
            {
                key: made[key]
                for key in ("command", "seconds", "parameters", "measured", "interventions", "suppression")
            },
            indent=2,
        )
    )


def _encode(
    example: Example, config: PretrainConfig, tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> tuple[list[int], list[float]]:
    made_up = rng.random() < config.ledger.random_value_fraction
    values = {name: rng.choice(VALUES) for name in example.pairs} if made_up else example.pairs
    chain = sample_chain(example, config.ledger, rng, values)
    if made_up:
        chain = [_maybe_random_name(word, config.ledger, rng) for word in chain]
    answer = [ANSWER, *example.answer_from(values).split(), EOS]
    prompt = tokenizer.encode(example.prompt)
    ids = [*prompt, *(tokenizer.convert_tokens_to_ids(word) for word in [*chain, *answer])]
    chain_weights = [0.0 if made_up else 1.0] * (len(chain) + 1)
    answer_weights = [1.0] * (len(answer) - 1)
    return ids, [*[0.0] * len(prompt), *chain_weights, *answer_weights]


def _maybe_random_name(word: str, config: LedgerConfig, rng: random.Random) -> str:
    return rng.choice(NAMES) if word in NAMES and rng.random() < config.random_name_probability else word


def _loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1]
    targets, weights = batch.input_ids[:, 1:], batch.weights[:, 1:]
    losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return (losses * weights).sum() / weights.sum()


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


MAX_COMPLETION_TOKENS = 64


def build_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A fresh net with random weights; grouped heads and tied embeddings, as in the models it stands for."""
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


if __name__ == "__main__":
    main()
