"""Random causal LMs of a few thousand parameters, one per architecture that the saliency engine is tested on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from atmanrl import Rollout

VOCABULARY = 61
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 96,
    # Wide enough that attention is far from uniform and every token's gradient far from rounding noise.
    "initializer_range": 0.25,
    "pad_token_id": 0,
}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE)),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE, tie_word_embeddings=True)),
    "llama biased": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE, attention_bias=True, mlp_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**_SHAPE, use_sliding_window=True, sliding_window=7, layer_types=_SLIDING)
    ),
    "mistral window": lambda: MistralForCausalLM(MistralConfig(**_SHAPE, sliding_window=7)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**_SHAPE, sliding_window=7, layer_types=_SLIDING, query_pre_attn_scalar=16)
    ),
}


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A freshly initialised model of the family, the same on every call."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    for name, parameter in model.named_parameters():
        # Norm weights and biases start at constants, which would hide a missing or doubled one.
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name and "gemma" not in family else 0.0, std=0.2)
    return model.to(dtype)


def random_rollouts(
    lengths: Sequence[tuple[int, int, int]], *, per_prompt: int = 2, prompt_length: int = 6, seed: int = 0
) -> list[Rollout]:
    """Rollouts with (CoT, marker, answer) tokens as given; ``per_prompt`` successive ones share a prompt."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (n,), generator=generator).tolist()

    prompts = [ids(prompt_length + 3 * i) for i in range(-(-len(lengths) // per_prompt))]
    return [
        Rollout(prompts[index // per_prompt], ids(cot), ids(answer), ids(marker))
        for index, (cot, marker, answer) in enumerate(lengths)
    ]
