"""A Llama-3-like tokenizer, a tiny Llama and a GSM8K file, all made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, END_OF_TEXT, EOT, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"
SPECIAL = (BOS, END_OF_TEXT, "<|start_header_id|>", "<|end_header_id|>", EOT, PAD)

CORPUS = [
    "Janet sells 16 eggs a day. She eats 3 and bakes 4. 16 - 3 - 4 = 9 eggs. 9 * 2 = 18 dollars.",
    "The final answer is 18. The final answer is $1,234.50. The final answer is -7",
    "The best answer is B. So the best answer is (C).",
    "Given the following problem, reason and give a final answer to the problem.",
    "café naïve 中文 数字 🙂 🙃 \\boxed{18} #### 72\n\n",
]

# As Llama 3 has it: the template writes the BOS itself.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

PROBLEMS = [
    {
        "question": f"Tom has {a} apples and buys {b} more. How many has he?",
        "answer": f"{a} + {b} = {a + b}\n#### {a + b}",
    }
    for a, b in ((3, 4), (10, 5), (6, 6), (21, 9), (2, 7), (8, 8), (40, 2), (1, 1), (15, 4), (9, 12), (30, 3), (7, 5))
]


def byte_level_tokenizer(
    *, vocab_size: int = 400, eos: str = EOT, chat_template: str | None = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Llama 3's special tokens, which puts its BOS before every text as Llama 3's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=eos,
        pad_token=PAD,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def llama(vocab_size: int, *, seed: int = 0, **overrides: int) -> LlamaForCausalLM:
    """A Llama with random weights: two layers, four query and two key-value heads of 16."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**sizes, **overrides})).eval()


def write_gsm8k(path: Path, rows: list[dict[str, str]] | None = None) -> Path:
    """A JSONL file in GSM8K's columns."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or PROBLEMS), encoding="utf-8")
    return path
