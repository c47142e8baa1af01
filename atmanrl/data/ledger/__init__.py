"""Ledger, the built-in task: a chain of thought whose needed tokens are known, learned by a tiny net."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import datasets

from atmanrl.answers import LEDGER_ANSWER
from atmanrl.config import DataConfig
from atmanrl.data.ledger.generator import TOKEN_CLASSES, classify_tokens, sample_examples
from atmanrl.data.task import Task

__all__ = ["CHECKPOINT", "load"]

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Directory of the starting checkpoint: model, tokenizer and ``record.json``, which says how it was made."""


def load(config: DataConfig) -> Task:
    """Ledger's rows by ``config.seed``; columns prompt, answer and asked (the names asked for)."""
    ledger = config.ledger
    train_size = min(ledger.train_size, config.train_limit or ledger.train_size)
    test_size = min(ledger.test_size, config.test_limit or ledger.test_size)
    train, test = (
        datasets.Dataset.from_list(
            [example.row() for example in islice(sample_examples(ledger, config.seed, held_out=held_out), size)]
        )
        for held_out, size in ((False, train_size), (True, test_size))
    )
    return Task("ledger", train, test, LEDGER_ANSWER.with_mode(config.answers), classify_tokens, TOKEN_CLASSES)
