"""A task: two data sets of prompts and an answer format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from atmanrl.answers import AnswerFormat
from atmanrl.config import DataConfig

Prompt = str | list[dict[str, str]]
TokenClassifier = Callable[[Mapping[str, Any], Sequence[str]], list[str]]


@dataclass(frozen=True)
class Task:
    """A task: rows to train on, rows to test on, and how its answers are read.

    Attributes:
        name: "ledger", "gsm8k" or "mmlu".
        train: columns "prompt" (a string, or a list of chat messages), "answer" (the gold answer, a string) and the
            task's own columns.
        test: held-out rows with the same columns; no prompt of ``train`` is among them in Ledger.
        answer_format: finds an answer and its marker in a completion and compares answers.
        classify_tokens: for tasks whose truth is known, ``classify_tokens(row, token_strings)`` names the class of each
            token of a completion; None elsewhere.
        token_classes: the names ``classify_tokens`` may return, in the order reports show them.
        left_out: place and reason of every test row that could not be used, where the loading was told to go on.
    """

    name: str
    train: datasets.Dataset
    test: datasets.Dataset
    answer_format: AnswerFormat
    classify_tokens: TokenClassifier | None = None
    token_classes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def as_prompt(instruction: str, config: DataConfig) -> Prompt:
    """``instruction`` as messages ("chat") or as a string that a base model continues ("plain").

    Chat messages are rendered by the tokenizer's own chat template later, where its special tokens are known.
    """
    if config.prompt_style == "plain":
        return f"{instruction}\nResponse:"
    system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
    return [*system, {"role": "user", "content": instruction}]
