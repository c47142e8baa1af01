"""Sampling completions of held-out prompts from any Hugging Face causal model."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from atmanrl.models import end_of_turn_ids
from atmanrl.progress import track

logger = logging.getLogger(__name__)

# What names the checkpoint's tokens, its file and its cache, and is no way of drawing the next token.
_NO_SAMPLING = frozenset(
    (
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version"),
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile"),
    )
)


@dataclass(frozen=True)
class GenerationSettings:
    """How completions are drawn.

    Attributes:
        max_new_tokens: length limit; a completion that reaches it counts as truncated.
        temperature: of the sampling; 0 decodes greedily.
        samples: completions per prompt.
        batch_size: prompts per batch. The draws depend on it, as they do on the seed.
    """

    max_new_tokens: int = 1024
    temperature: float = 1.0
    samples: int = 1
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must not be negative, and finite, got {self.temperature}")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"{self.samples} samples at temperature 0 would all be the same completion")


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    seed: int,
    progress: bool = False,
) -> list[list[list[int]]]:
    """Completions of token-id prompts, left padded in batches; end-of-turn tokens are kept, padding is not.

    The generation config of the model's checkpoint is ignored but for its EOS, so that only ``settings`` and ``seed``
    decide; `recipe_alone` says once what it would have changed. The model's mode and the global random state are as
    before on return.

    Returns:
        ``settings.samples`` lists of token ids per prompt.

    Raises:
        ValueError: for an empty prompt, or one that leaves no room in the model's context, with the numbers.
    """
    _check_context(model, prompts, settings)
    ends = end_of_turn_ids(tokenizer, model.generation_config.eos_token_id)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    sampling = {"temperature": settings.temperature, "top_p": 1.0, "top_k": 0} if settings.temperature else {}
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=settings.temperature > 0,
        num_return_sequences=settings.samples,
        pad_token_id=pad,
        eos_token_id=sorted(ends) or None,
        **sampling,
    )
    completions: list[list[list[int]]] = []
    draw: Any = model.generate
    with _evaluating(model), _seeded(model.device, seed), recipe_alone(model, config):
        starts = range(0, len(prompts), settings.batch_size)
        for start in track(starts, "generating", progress):
            batch = prompts[start : start + settings.batch_size]
            width = max(len(prompt) for prompt in batch)
            ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in batch])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
            sequences = draw(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
            )
            rows = [_until_end(row, ends) for row in sequences[:, width:].tolist()]
            completions += [rows[i : i + settings.samples] for i in range(0, len(rows), settings.samples)]
    return completions


@contextmanager
def recipe_alone(model: Any, recipe: GenerationConfig | None) -> Iterator[None]:
    """Within, ``generate`` finds no sampling setting of the checkpoint to fill ``recipe``'s gaps with.

    transformers takes every field that a caller leaves unset from ``model.generation_config``: a repetition penalty,
    forbidden tokens, a least length. A warning names those that would have changed ``recipe``, once per process and
    set of values. The generation config is as before on exit, and is saved with the model as it was loaded.

    Args:
        model: with the method ``generate``; may be wrapped, by PEFT for one.
        recipe: what will be passed to ``generate``; None: nothing, the tokens are drawn elsewhere.
    """
    if recipe is None:
        yield
        return
    config = model.generation_config
    if ignored := _ignored(config, recipe):
        _say_once(ignored)
    kept = dict(vars(config))
    neutral = GenerationConfig(**{name: kept.get(name) for name in _NO_SAMPLING if name in kept})
    # In place: wrappers and wrapped share the object.
    vars(config).clear()
    vars(config).update(vars(neutral))
    try:
        yield
    finally:
        vars(config).clear()
        vars(config).update(kept)


def _ignored(config: GenerationConfig, recipe: GenerationConfig) -> dict[str, Any]:
    """The settings of ``config`` that differ from what ``recipe``, or else the defaults, say."""
    defaults = {**GenerationConfig().to_dict(), **GenerationConfig._get_default_generation_params(), "top_k": 0}
    decided = {**defaults, **{name: value for name, value in recipe.to_dict().items() if value is not None}}
    return {
        name: value
        for name, value in sorted(config.to_dict().items())
        if not name.startswith("_")
        and name not in _NO_SAMPLING
        and value is not None
        and not (value is False and decided.get(name) is None)
        and not (name == "max_length" and recipe.max_new_tokens is not None)
        and value != decided.get(name)
    }


_said: set[str] = set()


def _say_once(ignored: Mapping[str, Any]) -> None:
    message = ", ".join(f"{name}={json.dumps(value, default=str)}" for name, value in ignored.items())
    if message not in _said:
        _said.add(message)
        logger.warning(
            "the checkpoint's generation config is ignored, only the recipe's sampling settings count: %s", message
        )


def context_length(model: PreTrainedModel) -> int:
    """Tokens the model has positions for; practically unlimited where its configuration names no limit."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return sys.maxsize if limit is None else int(limit)


def _until_end(ids: list[int], ends: frozenset[int]) -> list[int]:
    stop = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


def _check_context(model: PreTrainedModel, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> None:
    context = context_length(model)
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty")
        if len(prompt) + settings.max_new_tokens > context:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; with max_new_tokens {settings.max_new_tokens} that is "
                f"{len(prompt) + settings.max_new_tokens}, more than the model's context of {context}"
            )


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
