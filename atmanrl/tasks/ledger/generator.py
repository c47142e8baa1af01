"""Ledger's rows: prompts, gold answers and reference chains of thought, all from a seed.

    prompt  <b> a 6 c 0 b 6 e 8 d 4 ? c b e <cot>
    chain   c 0 . . b 6 ~ d 4 e 8
    answer  <ans> c 0 b 6 e 8 <eos>

The chain copies the asked pairs in order; filler words and true pairs nobody asked for stand in between.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atmanrl.config import LedgerConfig
from atmanrl.tasks.ledger.vocabulary import ANSWER, ASK, COT, FILLER, NAMES, VALUES

TOKEN_CLASSES = ("needed", "filler", "other")

# One prompt in this many is held out; by its text, so that no choice of seeds can make training and test meet.
HELD_OUT_ONE_IN = 8


@dataclass(frozen=True)
class Example:
    """One ledger with the names that are asked for; the prompt leaves <b> to the tokenizer."""

    pairs: Mapping[str, str]
    asked: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return " ".join([*_flat(self.pairs.items()), ASK, *self.asked, COT])

    @property
    def answer(self) -> str:
        return self.answer_from(self.pairs)

    def answer_from(self, values: Mapping[str, str]) -> str:
        """The asked names with these values: the answer that a chain which found ``values`` leads to."""
        return " ".join(_flat((name, values[name]) for name in self.asked))

    @property
    def held_out(self) -> bool:
        return zlib.crc32(self.prompt.encode()) % HELD_OUT_ONE_IN == 0

    def row(self) -> dict[str, Any]:
        """The columns of the data set."""
        return {"prompt": self.prompt, "answer": self.answer, "asked": list(self.asked)}


def sample_examples(config: LedgerConfig, seed: int, *, held_out: bool) -> Iterator[Example]:
    """Endless distinct examples; ``held_out`` chooses the side of the split that is fixed for all seeds."""
    rng = random.Random(f"{seed} {held_out}")
    seen: set[str] = set()
    while True:
        names = rng.sample(NAMES, config.pairs)
        pairs = {name: rng.choice(VALUES) for name in names}
        example = Example(pairs, tuple(rng.sample(names, config.asked)))
        if example.held_out == held_out and example.prompt not in seen:
            seen.add(example.prompt)
            yield example


def sample_chain(example: Example, config: LedgerConfig, rng: random.Random, values: Mapping[str, str]) -> list[str]:
    """A chain of thought for ``example`` that finds ``values`` (the ledger's own, or others), word by word."""
    others = [name for name in example.pairs if name not in example.asked]
    words: list[str] = []
    for position, name in enumerate(example.asked):
        if position:
            words += _interlude(others, config, rng, values)
        words += [name, values[name]]
    return words


def classify_tokens(row: Mapping[str, Any], tokens: Sequence[str]) -> list[str]:
    """The class of each token of a completion: "needed", "filler" or "other".

    Needed are the values that stand behind an asked name in the chain of thought: substituting one changes the answer.
    Filler are the filler words. Everything else is "other": names, looked-up pairs nobody asked for, the answer.
    """
    asked = set(row["asked"])
    words = [token.strip() for token in tokens]
    end = words.index(ANSWER) if ANSWER in words else len(words)
    classes = ["other"] * len(words)
    for i, word in enumerate(words[:end]):
        if word in FILLER:
            classes[i] = "filler"
        elif word in VALUES and i and words[i - 1] in asked:
            classes[i] = "needed"
    return classes


def _interlude(others: Sequence[str], config: LedgerConfig, rng: random.Random, values: Mapping[str, str]) -> list[str]:
    words: list[str] = []
    while rng.random() < config.filler_probability:
        words.append(rng.choice(FILLER))
    if others and rng.random() < config.lookup_probability:
        name = rng.choice(others)
        words += [name, values[name]]
    return words


def _flat(pairs: Any) -> list[str]:
    return [word for pair in pairs for word in pair]
