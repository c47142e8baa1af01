"""Pre-trains Ledger's starting checkpoint: ``python -m atmanrl.tasks.ledger.pretrain --output DIR``.

Plain supervised training on generated chains of thought. In some examples the chain's values are random, the answer
follows the chain rather than the prompt, and the loss on the chain is masked: the net has to read its chain, and yet
never learns to write a wrong one.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from atmanrl.config import LedgerConfig
from atmanrl.tasks.ledger.generator import Example, sample_chain, sample_examples
from atmanrl.tasks.ledger.measure import measure, measure_interventions, measure_suppression
from atmanrl.tasks.ledger.model import build_model
from atmanrl.tasks.ledger.vocabulary import ANSWER, EOS, NAMES, VALUES, build_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

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
    import transformers

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
    parser = argparse.ArgumentParser(prog="python -m atmanrl.tasks.ledger.pretrain", description=__doc__)
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
    command = " ".join(["python -m atmanrl.tasks.ledger.pretrain", *(sys.argv[1:] if argv is None else argv)])
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


if __name__ == "__main__":
    main()
