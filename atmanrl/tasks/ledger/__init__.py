"""Ledger, the built-in task: a chain of thought whose needed tokens are known, learned by a tiny net.

    prompt  <b> a 6 c 0 b 6 e 8 d 4 ? c b e <cot>
    chain   c 0 . . b 6 ~ d 4 e 8
    answer  <ans> c 0 b 6 e 8 <eos>

Every word is one token, and every row follows from a seed. The chain copies the asked pairs in order; filler words and
true pairs nobody asked for stand in between.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import perm
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets

from atmanrl.answers import LEDGER_ANSWER
from atmanrl.config import DataConfig, LedgerConfig
from atmanrl.tasks.files import DataError
from atmanrl.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Directory of the starting checkpoint: model, tokenizer and ``record.json``, which says how it was made."""

NAMES = tuple("abcdefgh")
VALUES = tuple("0123456789")
FILLER = (".", "~", ",", ";")
BOS, ASK, COT, ANSWER, EOS, PAD, UNKNOWN = "<b>", "?", "<cot>", "<ans>", "<eos>", "<pad>", "<unk>"
WORDS = (PAD, BOS, EOS, UNKNOWN, ASK, COT, ANSWER, *FILLER, *VALUES, *NAMES)

TOKEN_CLASSES = ("needed", "filler", "other")

# One prompt in this many is held out; by its text, so that no choice of seeds can make training and test meet.
HELD_OUT_ONE_IN = 8


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


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A fast word-level tokenizer over `WORDS`; it puts <b> before every text, as Llama's puts its BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


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
