"""Ledger, the built-in task: a chain of thought whose needed tokens are known, learned by a tiny net."""

from __future__ import annotations

from itertools import islice
from math import perm
from pathlib import Path

import datasets

from atmanrl.answers import LEDGER_ANSWER
from atmanrl.config import DataConfig, LedgerConfig
from atmanrl.tasks.files import DataError
from atmanrl.tasks.ledger.generator import HELD_OUT_ONE_IN, TOKEN_CLASSES, classify_tokens, sample_examples
from atmanrl.tasks.ledger.vocabulary import NAMES, VALUES
from atmanrl.tasks.task import Task

__all__ = ["CHECKPOINT", "load"]

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Directory of the starting checkpoint: model, tokenizer and ``record.json``, which says how it was made."""


def load(config: DataConfig, left_out: list[str] | None = None) -> Task:
    """Ledger's rows by ``config.seed``; columns prompt, answer and asked (the names asked for).

    Raises:
        DataError: where the ledger's numbers leave too few distinct prompts, or need more names than there are.
    """
    ledger = config.ledger
    train_size = min(ledger.train_size, config.train_limit or ledger.train_size)
    test_size = min(ledger.test_size, config.test_limit or ledger.test_size)
    _check_supply(ledger, train_size, test_size)
    train, test = (
        datasets.Dataset.from_list(
            [example.row() for example in islice(sample_examples(ledger, config.seed, held_out=held_out), size)]
        )
        for held_out, size in ((False, train_size), (True, test_size))
    )
    return Task("ledger", train, test, LEDGER_ANSWER.with_mode(config.answers), classify_tokens, TOKEN_CLASSES)


def _check_supply(ledger: LedgerConfig, train_size: int, test_size: int) -> None:
    if ledger.pairs > len(NAMES):
        raise DataError(f"pairs must be at most {len(NAMES)}, the number of names, got {ledger.pairs}")
    distinct = perm(len(NAMES), ledger.pairs) * len(VALUES) ** ledger.pairs * perm(ledger.pairs, ledger.asked)
    held_out = distinct // HELD_OUT_ONE_IN
    # Half of each side, so that drawing distinct prompts never becomes a search for the last ones.
    for name, size, supply in (("train", train_size, distinct - held_out), ("test", test_size, held_out)):
        if size > supply // 2:
            raise DataError(
                f"{ledger.pairs} pairs of which {ledger.asked} are asked make about {supply} {name} prompts; "
                f"{name}_size must be at most {supply // 2}, got {size}"
            )
