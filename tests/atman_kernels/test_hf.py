"""A model with attn_implementation="atman" is the same model: logits, tokens and training gradients as with sdpa."""

from __future__ import annotations

import pytest
import torch
import transformers
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from atman_kernels.hf import atman_mask
from tests.atman_kernels.families import FAMILIES, padding_mask, random_ids, random_model
from tests.oracle import assert_as_exact_as_reference

LENGTHS = [12, 7, 3]
families = pytest.mark.parametrize("family", FAMILIES)
sides = pytest.mark.parametrize("side", ["left", "right"])


def logits(model: PreTrainedModel, ids: Tensor, **kwargs: object) -> Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def assert_same_logits(family: str, ids: Tensor, mask: Tensor | None, forward=logits) -> None:
    """``forward`` of the atman model is as near to the float64 model as that of the sdpa model, on all real tokens."""
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    results = [
        forward(model, ids, attention_mask=mask)[real]
        for model in (
            random_model(family),
            random_model(family, "sdpa"),
            random_model(family, "sdpa").double(),
        )
    ]
    assert_as_exact_as_reference(f"{family} logits", *results)


@families
def test_logits_are_those_of_sdpa_without_padding(family):
    assert_same_logits(family, random_ids(2, 12), None)


@families
@sides
def test_logits_are_those_of_sdpa_with_padding(family, side):
    assert_same_logits(family, random_ids(3, 12), padding_mask(LENGTHS, side))


def test_logits_are_those_of_sdpa_with_holes_in_the_mask():
    mask = padding_mask(LENGTHS, "left")
    mask[0, 3:6] = 0
    mask[1, 9] = 0
    assert_same_logits("llama", random_ids(3, 12), mask)
    assert_same_logits("mistral", random_ids(3, 12), mask)


@families
def test_rows_of_padding_do_not_make_nan(family):
    mask = padding_mask([12, 1], "left")
    mask = torch.cat([mask, torch.zeros(1, 12, dtype=torch.long)])
    assert logits(random_model(family), random_ids(3, 12), attention_mask=mask).isfinite().all()


def in_chunks(make_cache, *, chunk: int):
    """A forward that feeds ``chunk`` tokens at a time through a cache, as chunked prefill and decoding do."""

    def forward(model: PreTrainedModel, ids: Tensor, attention_mask: Tensor) -> Tensor:
        cache = make_cache(model)
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        parts = []
        for start in range(0, ids.shape[1], chunk):
            end = start + chunk
            parts.append(
                logits(
                    model,
                    ids[:, start:end],
                    attention_mask=attention_mask[:, :end],
                    position_ids=position_ids[:, start:end],
                    past_key_values=cache,
                )
            )
        return torch.cat(parts, dim=1)

    return forward


def dynamic_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


def static_cache(model: PreTrainedModel) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=20)


@families
@pytest.mark.parametrize("make_cache", [dynamic_cache, static_cache])
@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_cached_forwards_give_the_logits_of_sdpa(family, make_cache, chunk):
    assert_same_logits(family, random_ids(3, 12), padding_mask(LENGTHS, "left"), in_chunks(make_cache, chunk=chunk))


@families
@pytest.mark.parametrize(
    ("side", "settings"),
    [
        ("left", {}),
        ("left", {"cache_implementation": "static"}),
        ("left", {"prefill_chunk_size": 5}),
        ("left", {"num_beams": 2}),
        ("right", {}),
    ],
)
def test_generated_tokens_are_those_of_sdpa(family, side, settings):
    ids, mask = random_ids(3, 12), padding_mask(LENGTHS, side)
    tokens = [
        random_model(family, name).generate(
            ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, **settings
        )
        for name in ("atman", "sdpa")
    ]
    assert tokens[0].shape[1] == 20
    assert torch.equal(*tokens)


def test_a_single_unbiased_row_is_computed_by_sdpa(monkeypatch):
    calls = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *a, **k: (calls.append(a[0].shape[2]), sdpa(*a, **k))[1],
    )
    random_model("llama").generate(random_ids(1, 6), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert calls == [1] * 6


def test_autocast_computes_attention_in_the_autocast_dtype():
    """With float32 weights under autocast, q and k leave the rotary embedding in float32 beside a bfloat16 v."""
    ids, mask = random_ids(3, 12), padding_mask(LENGTHS, "left")
    with torch.autocast("cpu", torch.bfloat16):
        actual = logits(random_model("llama"), ids, attention_mask=mask)
        reference = logits(random_model("llama", "sdpa"), ids, attention_mask=mask)
    oracle = logits(random_model("llama", "sdpa").double(), ids, attention_mask=mask)
    assert actual.dtype == torch.bfloat16
    real = mask.bool()
    assert_as_exact_as_reference("logits", actual[real], reference[real], oracle[real])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@families
def test_low_precision_models_are_as_exact_as_with_sdpa(family, dtype):
    ids, mask = random_ids(3, 12), padding_mask(LENGTHS, "left")
    real = mask.bool()
    actual, reference = (
        logits(random_model(family, name).to(dtype), ids, attention_mask=mask)[real] for name in ("atman", "sdpa")
    )
    # The same rounded weights.
    oracle = logits(random_model(family, "sdpa").to(dtype).double(), ids, attention_mask=mask)[real]
    assert_as_exact_as_reference(f"{family} logits", actual, reference, oracle)


def test_the_implementation_can_be_chosen_when_the_model_is_made():
    config = random_model("llama").config
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="atman")
    assert model.config._attn_implementation == "atman"
    assert model(random_ids(1, 4)).logits.isfinite().all()


def test_what_stands_for_the_mask_moves_with_accelerate_to_the_device_of_a_layer():
    mask = atman_mask(3, 12, 12, attention_mask=padding_mask(LENGTHS, "left").bool())
    moved = send_to_device({"attention_mask": mask}, "meta")["attention_mask"]
    assert mask.plan.device.type == "cpu"
    assert moved.plan.device.type == moved.valid.device.type == "meta"
    assert (moved.seen, moved.plan.total_q) == (12, 12)
    decoding = atman_mask(3, 1, 12, 11, attention_mask=padding_mask(LENGTHS, "left").bool())
    assert send_to_device(decoding, "meta").one_row.device.type == "meta"
