"""Grade-school maths word problems (Cobbe et al. 2021): columns question, answer with the gold after "####"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atmanrl.answers import GSM8K_ANSWER, AnswerFormat
from atmanrl.config import DataConfig
from atmanrl.tasks.files import Source, load_splits, text_of
from atmanrl.tasks.task import Task, as_prompt

SOURCE = Source("openai/gsm8k", subset="main", train_split="train", test_split="test", columns=("question", "answer"))

GOLD_ANSWER = AnswerFormat(kind="number", markers=("####",))

# After Meta's Llama-3 evaluation of GSM8K.
INSTRUCTION = (
    "Given the following problem, reason and give a final answer to the problem.\n"
    "Problem: {question}\n"
    'Your response should end with "The final answer is [answer]" where [answer] is the response to the problem.'
)


def load(config: DataConfig, left_out: list[str] | None = None) -> Task:
    """GSM8K, or any file in its columns; the gold answer loses its thousands separators and keeps its sign."""

    def convert(row: Mapping[str, Any]) -> dict[str, Any]:
        question = text_of(row, "question")
        prompt = as_prompt(INSTRUCTION.format(question=question), config)
        return {"prompt": prompt, "answer": gold_answer(text_of(row, "answer")), "question": question}

    train, test = load_splits(config, SOURCE, convert, left_out)
    return Task("gsm8k", train, test, GSM8K_ANSWER.with_mode(config.answers), left_out=tuple(left_out or ()))


def gold_answer(solution: str) -> str:
    """The number after the last "####" of a worked solution, without currency, unit and thousands separators.

    Raises:
        ValueError: where there is no "####" or no number behind it.
    """
    _, marker, gold = solution.rpartition("####")
    if not marker:
        raise ValueError(f'gold answer has no "####" marker: ...{solution[-40:]!r}')
    found = GOLD_ANSWER.parse(marker + gold)
    if found is None:
        raise ValueError(f'no number after "####" in the gold answer: {gold.strip()!r}')
    return found.value.replace(",", "")
