"""Small random models of the supported families, and batches to run them on."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import atman_kernels.hf  # noqa: F401

WINDOW = 5
VOCABULARY = 61

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    # Far above the usual 0.02, so that attention is not nearly uniform and a wrong mask shows.
    "initializer_range": 0.4,
}
_WINDOW_AFTER_FIRST_LAYER = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}

_FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "mistral": (transformers.MistralConfig, {"sliding_window": WINDOW}),
    "qwen2": (transformers.Qwen2Config, _WINDOW_AFTER_FIRST_LAYER),
    "qwen3": (transformers.Qwen3Config, _WINDOW_AFTER_FIRST_LAYER),
    "gemma2": (transformers.Gemma2Config, {"sliding_window": WINDOW, "attn_logit_softcapping": None}),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
}
FAMILIES = tuple(_FAMILIES)


def random_model(family: str, attn_implementation: str = "atman", **overrides: object) -> PreTrainedModel:
    """The same weights for the same family at every call, in evaluation mode."""
    make_config, settings = _FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make_config(**{**_SHAPE, **settings, **overrides}))
    if attn_implementation == "sdpa":
        # Some versions of transformers refuse it to Gemma 2, also without the softcapping that it cannot compute.
        model.config._attn_implementation = "sdpa"
    else:
        model.set_attn_implementation(attn_implementation)
    return model.eval()


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    """Token ids without the padding and start tokens."""
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def padding_mask(lengths: list[int], side: str) -> Tensor:
    """(B, max(lengths)) int64, zeros on the given side."""
    position = torch.arange(max(lengths))
    mask = position < torch.tensor(lengths)[:, None]
    return (mask.flip(1) if side == "left" else mask).long()


def window_of_layers(model: PreTrainedModel) -> list[int | None]:
    """Each layer's window, read from the configuration."""
    window = getattr(model.config, "sliding_window", None)
    kinds = getattr(model.config, "layer_types", None) or ["sliding_attention"] * model.config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
