"""A model either computes packed, biased rollouts as it computes them alone, or is refused by name."""

from __future__ import annotations

import pytest
import torch
import transformers

from atmanrl import MaskConfig, Rollout, optimize_masks
from atmanrl.saliency.support import check_model

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.25,
    "pad_token_id": 0,
}
LONG = {
    "rope_theta": 10000.0,
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
}
COMPUTED = ["Llama", "Mistral", "Qwen2", "Gemma", "GPT2", "GPTNeoX", "OPT", "Phi3", "Olmo2", "Granite", "Mixtral"]
REFUSED = {
    "StableLm": ({}, "ignores key_bias"),
    "Nemotron": ({}, "ignores key_bias"),
    "DiffLlama": ({}, "attends 2 times in layer 0"),
    "Llama": ({"rope_parameters": LONG}, "'longrope'"),
    "Bart": ({"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "is_decoder": True}, "position_ids"),
}
ROLLOUTS = [Rollout([5, 6, 7], [11, 12, 13, 14], [21, 22], [31]), Rollout([8, 9, 4, 3], [15, 16], [23])]


def random_model(family: str, **settings: object) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **settings})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def own_loss(model: transformers.PreTrainedModel, rollout: Rollout) -> float:
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    with torch.no_grad():
        logits = model(ids).logits[0, -len(rollout.answer_ids) - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(rollout.answer_ids)))


@pytest.mark.parametrize("family", COMPUTED)
def test_losses_without_a_mask_are_the_models_own(family):
    model = random_model(family)
    found = [item.loss_unmasked for item in optimize_masks(model, ROLLOUTS, MaskConfig(steps=1))]
    assert found == pytest.approx([own_loss(model, rollout) for rollout in ROLLOUTS], abs=1e-4)


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_drops_an_argument_is_refused_by_name(family):
    settings, what = REFUSED[family]
    with pytest.raises(ValueError, match=f"^{family}ForCausalLM .*{what}"):
        optimize_masks(random_model(family, **settings), ROLLOUTS)


@pytest.mark.parametrize("family", ["Gemma2", "Bloom", "DiffLlama"])
def test_every_refusal_names_the_model_and_says_which_ones_to_use(family):
    with pytest.raises(ValueError, match=f"^{family}ForCausalLM.*use a model whose layers get .* as those of Llama"):
        optimize_masks(random_model(family), ROLLOUTS)


def test_a_model_is_checked_once(monkeypatch):
    model = random_model("Llama")
    check_model(model)
    monkeypatch.setattr(model, "forward", None)
    check_model(model)
