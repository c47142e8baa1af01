"""key_bias through a Hugging Face model: the same output and gradient as eager attention with the bias in its mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from atman_kernels import backend
from atman_kernels.hf import AtManAttention
from tests.atman_kernels.families import (
    FAMILIES,
    VOCABULARY,
    padding_mask,
    random_ids,
    random_model,
    window_of_layers,
)
from tests.atman_kernels.test_attention_all_backends import BACKENDS, DEVICE
from tests.oracle import assert_as_exact_as_reference

LENGTHS = [12, 7, 3]
families = pytest.mark.parametrize("family", FAMILIES)


def random_bias(*shape: int, dtype: torch.dtype = torch.float32, device: object = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype).requires_grad_()


class BiasedEager(nn.Module):
    """Eager attention with H^AtMan written into each layer's (B, 1, T, T) mask: the definition, spelled out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, attention_mask: Tensor, key_bias: Tensor) -> Tensor:
        row, key = torch.arange(ids.shape[1])[:, None], torch.arange(ids.shape[1])
        # Eager attention takes its softmax in float32 even in a float64 model.
        lowest = torch.finfo(torch.float32).min
        hooks = []
        for layer, window in zip(self.model.model.layers, window_of_layers(self.model), strict=True):
            visible = (key <= row) & attention_mask.bool()[:, None, None, :]
            if window is not None:
                visible = visible & (row - key < window)
            mask = torch.where(visible, key_bias[:, None, None, :], lowest)
            hooks.append(layer.register_forward_pre_hook(self._with_mask(mask), with_kwargs=True))
        logits = self.model(ids, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        return logits

    @staticmethod
    def _with_mask(mask: Tensor):
        return lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask})


def loss_of(logits: Tensor, attention_mask: Tensor) -> Tensor:
    weight = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(2)).to(logits)
    return ((logits.log_softmax(-1) @ weight) * attention_mask).sum()


def biased(model: nn.Module, dtype: torch.dtype, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the real tokens and the gradient of key_bias."""
    bias = random_bias(*ids.shape, dtype=dtype, device=ids.device)
    output = model(ids, attention_mask=mask, key_bias=bias)
    logits = output if isinstance(output, Tensor) else output.logits
    loss_of(logits, mask).backward()
    return logits.detach()[mask.bool()], bias.grad


@families
@pytest.mark.parametrize("side", ["left", "right"])
def test_key_bias_gives_the_logits_and_gradient_of_a_materialised_mask(family, side):
    ids, mask = random_ids(3, 12), padding_mask(LENGTHS, side)
    results = [
        biased(model, dtype, ids, mask)
        for model, dtype in (
            (random_model(family), torch.float32),
            (BiasedEager(random_model(family, "eager")), torch.float32),
            (BiasedEager(random_model(family, "eager").double()), torch.float64),
        )
    ]
    for name, (actual, reference, oracle) in zip(("logits", "dkey_bias"), zip(*results, strict=True), strict=True):
        assert_as_exact_as_reference(name, actual, reference, oracle)
    assert results[0][1][mask.bool()].abs().max() > 0
    assert (results[0][1][~mask.bool()] == 0).all()


def test_a_bias_on_a_frozen_model_leaves_the_parameters_without_gradient():
    model = random_model("llama").requires_grad_(False)
    ids, mask = random_ids(3, 12), padding_mask(LENGTHS, "left")
    _, gradient = biased(model, torch.float32, ids, mask)
    _, expected = biased(random_model("llama"), torch.float32, ids, mask)
    assert torch.equal(gradient, expected)
    assert all(p.grad is None for p in model.parameters())


def test_the_gradient_of_key_bias_survives_gradient_checkpointing():
    model = random_model("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, mask = random_ids(3, 12), padding_mask(LENGTHS, "left")
    _, gradient = biased(model, torch.float32, ids, mask)
    _, expected = biased(random_model("llama"), torch.float32, ids, mask)
    assert torch.equal(gradient, expected)


@families
def test_minus_infinity_on_a_key_removes_it_as_the_attention_mask_does(family):
    model = random_model(family)
    ids, mask = random_ids(2, 12), torch.ones(2, 12)
    bias = torch.zeros(2, 12)
    bias[0, 4], bias[1, 7:9] = -torch.inf, -torch.inf
    removed = bias == -torch.inf
    with torch.no_grad():
        by_bias = model(ids, attention_mask=mask, key_bias=bias).logits
        by_mask = model(ids, attention_mask=mask * ~removed).logits
    assert torch.equal(by_bias, by_mask)


@pytest.mark.parametrize("make_cache", [DynamicCache, StaticCache])
@pytest.mark.parametrize("chunk", [1, 5])
@families
def test_a_cached_biased_forward_equals_the_uncached_one(family, make_cache, chunk):
    model = random_model(family)
    ids, mask = random_ids(2, 12), padding_mask([12, 8], "left")
    bias = random_bias(2, 12).detach()
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    cache = make_cache(config=model.config, **({"max_cache_len": 16} if make_cache is StaticCache else {}))
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=position_ids, key_bias=bias, use_cache=False).logits
        parts = [
            model(
                ids[:, start : start + chunk],
                attention_mask=mask[:, : start + chunk],
                position_ids=position_ids[:, start : start + chunk],
                key_bias=bias[:, : start + chunk],
                past_key_values=cache,
            ).logits
            for start in range(0, 12, chunk)
        ]
    # The same fp32 sums in another order; the logits are of order 10.
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], whole[real], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_every_backend_computes_the_padded_model(name):
    ids, mask = random_ids(3, 12), padding_mask(LENGTHS, "left")
    with backend("reference"):
        reference = biased(random_model("mistral", num_hidden_layers=1), torch.float32, ids, mask)
    exact = BiasedEager(random_model("mistral", "eager", num_hidden_layers=1).double())
    oracle = biased(exact, torch.float64, ids, mask)
    device = DEVICE if name == "triton" else "cpu"
    with backend(name):
        model = random_model("mistral", num_hidden_layers=1).to(device)
        results = biased(model, torch.float32, ids.to(device), mask.to(device))
    for i, key in enumerate(("logits", "dkey_bias")):
        assert_as_exact_as_reference(key, results[i].cpu(), reference[i], oracle[i])


def swapped(attn_implementation: str) -> PreTrainedModel:
    """A Llama whose attention layers are AtManAttention with the original's weights."""
    model = random_model("llama", attn_implementation)
    state = model.state_dict()
    for index, layer in enumerate(model.model.layers):
        layer.self_attn = AtManAttention(model.config, index)
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize("attn_implementation", ["atman", "sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_swapped_layers_give_the_same_model_whatever_implementation_it_has(attn_implementation, side):
    ids, mask = random_ids(3, 12), padding_mask(LENGTHS, side)
    model = swapped(attn_implementation)
    assert model.config._attn_implementation == attn_implementation
    actual = biased(model, torch.float32, ids, mask)
    expected = biased(random_model("llama"), torch.float32, ids, mask)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_swapped_layers_generate_the_same_tokens(attn_implementation, cache):
    ids, mask = random_ids(3, 12), padding_mask(LENGTHS, "left")
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = random_model("llama", attn_implementation).generate(ids, cache_implementation=cache, **settings)
    assert torch.equal(swapped(attn_implementation).generate(ids, cache_implementation=cache, **settings), expected)


def test_swapped_layers_have_the_parameters_of_llama_attention():
    model = random_model("llama")
    original = model.model.layers[0].self_attn
    layer = AtManAttention(model.config, 0)
    assert {n: p.shape for n, p in layer.named_parameters()} == {n: p.shape for n, p in original.named_parameters()}
    assert not list(layer.named_buffers())
