"""Ledger's words and its tokenizer: every word is one token."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAMES = tuple("abcdefgh")
VALUES = tuple("0123456789")
FILLER = (".", "~", ",", ";")
BOS, ASK, COT, ANSWER, EOS, PAD, UNKNOWN = "<b>", "?", "<cot>", "<ans>", "<eos>", "<pad>", "<unk>"
WORDS = (PAD, BOS, EOS, UNKNOWN, ASK, COT, ANSWER, *FILLER, *VALUES, *NAMES)


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
