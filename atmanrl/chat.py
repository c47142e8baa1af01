"""Chat models' special tokens: one BOS at the start of a prompt, every end-of-turn token at the end of a completion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A tokenizer names one of them as its EOS; a model may have learned to stop with another (Llama 3: <|eot_id|>, while
# the base tokenizer says <|end_of_text|>).
END_OF_TURN = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<eos>",
    "</s>",
    "<|end|>",
)


def end_of_turn_ids(
    tokenizer: PreTrainedTokenizerBase, generation_eos: int | Sequence[int] | None = None
) -> frozenset[int]:
    """Every token id that ends a completion of this model.

    Args:
        tokenizer: its EOS, its padding token and whichever of `END_OF_TURN` are special tokens of its vocabulary.
        generation_eos: ``model.generation_config.eos_token_id``, one id or several.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = [name for name in END_OF_TURN if name in special]
    ids = {*_ids(tokenizer.eos_token_id), *_ids(tokenizer.pad_token_id), *_ids(generation_eos)}
    return frozenset(ids.union(*(_ids(tokenizer.convert_tokens_to_ids(name)) for name in names)))


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Mapping[str, str]],
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a prompt: messages through the chat template with the assistant's turn opened, strings as they are.

    The BOS stands once: Llama-3's template writes it, and so does its tokenizer around every text.

    Args:
        tokenizer: whose ids and template.
        prompt: text or messages.
        template_kwargs: what else the template reads, such as Qwen3's ``enable_thinking``.

    Raises:
        ValueError: for messages where the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    else:
        if tokenizer.chat_template is None:
            raise ValueError(
                "the tokenizer has no chat template, so messages cannot be rendered; give the prompt as text "
                '(a task: set data.prompt_style to "plain")'
            )
        text = tokenizer.apply_chat_template(
            [dict(m) for m in prompt], tokenize=False, add_generation_prompt=True, **(template_kwargs or {})
        )
        ids = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    while bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        ids = ids[1:]
    return list(ids)


def _ids(value: int | Iterable[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
