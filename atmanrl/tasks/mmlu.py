"""Multiple choice over 57 subjects (Hendrycks et al. 2021): columns question, subject, choices, answer (0-3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atmanrl.answers import MMLU_ANSWER
from atmanrl.config import DataConfig
from atmanrl.tasks.files import Source, load_splits, text_of
from atmanrl.tasks.task import Task, as_prompt

LETTERS = "ABCD"
SOURCE = Source(
    "cais/mmlu",
    subset="all",
    train_split="auxiliary_train",
    test_split="test",
    columns=("question", "subject", "choices", "answer"),
)

# After Meta's Llama-3 evaluation of MMLU with chain of thought.
INSTRUCTION = (
    "Given the following question and four candidate answers (A, B, C and D), choose the best answer.\n"
    "Question: {question}\n"
    "{choices}\n"
    'Reason about the question first. Your response should end with "The best answer is [letter]." where [letter] is '
    "one of A, B, C or D."
)


def load(config: DataConfig, left_out: list[str] | None = None) -> Task:
    """MMLU, or any file in its columns; the gold answer is a letter."""

    def convert(row: Mapping[str, Any]) -> dict[str, Any]:
        question = text_of(row, "question")
        choices = row["choices"]
        if not isinstance(choices, list) or len(choices) != len(LETTERS):
            raise ValueError(f"choices must be a list of {len(LETTERS)}, got {choices!r}")
        if not all(isinstance(choice, str | int | float) and str(choice).strip() for choice in choices):
            raise ValueError(f"choices must be texts, got {choices!r}")
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
        prompt = as_prompt(INSTRUCTION.format(question=question, choices=listed), config)
        answer = gold_letter(row["answer"])
        return {"prompt": prompt, "answer": answer, "question": question, "subject": text_of(row, "subject")}

    train, test = load_splits(config, SOURCE, convert, left_out)
    return Task("mmlu", train, test, MMLU_ANSWER.with_mode(config.answers), left_out=tuple(left_out or ()))


def gold_letter(answer: object) -> str:
    """The letter of a gold answer given as index 0-3 (an integer or its digit) or as the letter itself.

    Raises:
        ValueError: for anything else.
    """
    text = str(answer).strip()
    if not isinstance(answer, bool) and text in ("0", "1", "2", "3"):
        return LETTERS[int(text)]
    if text in LETTERS and len(text) == 1:
        return text
    raise ValueError(f"gold answer must be 0, 1, 2 or 3 (or A to D), got {answer!r}")
