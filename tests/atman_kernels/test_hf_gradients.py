"""A training step with attn_implementation="atman" is as exact as with sdpa: layer by layer, and from end to end.

Twice the error of sdpa bounds an operator. It does not bound the gradient of a whole network: the network magnifies the
rounding of every layer by factors of its own, and a gradient that is a sum of cancelling terms may be exact by luck. So
the rule holds for each layer's attention on the activations and incoming gradients that it meets in the network. The
gradients of the parameters are bounded by those of sdpa computed in several orders of its sums, all equally exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from atman_kernels import _cpu
from atman_kernels.hf import RowMask, atman_attention, atman_mask
from tests.atman_kernels.families import FAMILIES, padding_mask, random_ids, random_model
from tests.oracle import assert_as_exact_as_reference

LENGTHS = [12, 7, 3]
ORDERS = 4
families = pytest.mark.parametrize("family", FAMILIES)
sides = pytest.mark.parametrize("side", ["left", "right"])
isas = pytest.mark.parametrize("isa", _cpu.isas() or [""])
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def training_gradients(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    model.train()
    labels = ids.masked_fill(mask == 0, -100)
    model(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


class LayerCall(NamedTuple):
    """What one layer's attention got in a training step: (B, H, T, D) operands, and the gradient do of its output."""

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    mask: RowMask
    settings: dict[str, Any]
    do: list[Tensor]


@contextmanager
def recording() -> Iterator[list[LayerCall]]:
    """Inside, attn_implementation="recorded" is "atman" and appends every layer's call to the list."""
    calls: list[LayerCall] = []

    def record(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: RowMask, **settings: Any):
        o, _ = atman_attention(module, q, k, v, mask, **settings)
        call = LayerCall(module, q.detach(), k.detach(), v.detach(), mask, settings, [])
        o.register_hook(lambda gradient: call.do.append(gradient.detach()))
        calls.append(call)
        return o, None

    AttentionInterface.register("recorded", record)
    AttentionMaskInterface.register("recorded", atman_mask)
    yield calls


def calls_of_a_training_step(family: str, mask: Tensor) -> list[LayerCall]:
    model = random_model(family)
    with recording() as calls:
        model.set_attn_implementation("recorded")
        training_gradients(model, random_ids(3, 12), mask)
    return calls


def visible(call: LayerCall, mask: Tensor) -> Tensor:
    """(B, 1, T, T) bool."""
    position = torch.arange(mask.shape[1])
    back = position[:, None] - position
    seen = (back >= 0) & mask.bool()[:, None, None, :]
    window = call.settings.get("sliding_window")
    return seen if window is None else seen & (back < window)


def results(call: LayerCall, dtype: torch.dtype, attend: Attention) -> dict[str, Tensor]:
    """The output (B, T, H, D) and all gradients, also that of a bias of 0 per key."""
    operands = [x.to(dtype).requires_grad_() for x in (call.q.clone(), call.k.clone(), call.v.clone())]
    operands.append(torch.zeros(call.k.shape[0], call.k.shape[2], dtype=dtype, requires_grad=True))
    o = attend(*operands)
    gradients = torch.autograd.grad(o, operands, call.do[0].to(dtype))
    return dict(zip(("o", "dq", "dk", "dv", "dkey_bias"), (o.detach(), *gradients), strict=True))


def assert_layer_is_exact(name: str, call: LayerCall, mask: Tensor, error_of_dk: float = 0.0) -> None:
    """Twice the error of sdpa in each result; ``error_of_dk`` is added to dk in units of its largest element."""
    seen = visible(call, mask)

    def by_sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = torch.where(seen, bias[:, None, None, :], -math.inf)
        scale = call.settings["scaling"]
        o = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=scores, scale=scale, enable_gqa=True)
        return o.transpose(1, 2)

    def by_atman(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return atman_attention(call.module, q, k, v, call.mask, key_bias=bias, **call.settings)[0]

    actual = results(call, torch.float32, by_atman)
    reference, oracle = results(call, torch.float32, by_sdpa), results(call, torch.float64, by_sdpa)
    actual["dk"][0, 0, 0] += error_of_dk * oracle["dk"].abs().max()
    for key, value in actual.items():
        assert_as_exact_as_reference(f"{name} {key}", value, reference[key], oracle[key])


@isas
@families
@sides
def test_every_layer_of_a_training_step_is_as_exact_as_sdpa(monkeypatch, isa, family, side):
    monkeypatch.setattr(_cpu, "_isa", isa)
    mask = padding_mask(LENGTHS, side)
    for index, call in enumerate(calls_of_a_training_step(family, mask)):
        assert_layer_is_exact(f"layer {index}", call, mask)


@families
@sides
def test_an_error_of_a_hundred_thousandth_in_dk_is_seen_in_every_layer(family, side):
    mask = padding_mask(LENGTHS, side)
    for index, call in enumerate(calls_of_a_training_step(family, mask)):
        with pytest.raises(AssertionError, match=f"layer {index} dk: error"):
            assert_layer_is_exact(f"layer {index}", call, mask, error_of_dk=1e-5)


@contextmanager
def sums_in_another_order(seed: int) -> Iterator[None]:
    """Inside, attn_implementation="reordered" is sdpa with keys and head dimensions in a random order per layer."""
    generator = torch.Generator().manual_seed(seed)

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scaling: float, **settings: Any):
        keys, dims = (torch.randperm(n, generator=generator) for n in k.shape[2:])
        q, k, v, mask = q[..., dims], k[:, :, keys][..., dims], v[:, :, keys], mask[..., keys]
        o = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True)
        return o.transpose(1, 2).contiguous(), None

    def whole_mask(*args: Any, **settings: Any) -> Tensor:
        return sdpa_mask(*args, **{**settings, "allow_is_causal_skip": False})

    AttentionInterface.register("reordered", attend)
    AttentionMaskInterface.register("reordered", whole_mask)
    yield


def reordered_gradients(family: str, ids: Tensor, mask: Tensor, seed: int) -> dict[str, Tensor]:
    model = random_model(family)
    with sums_in_another_order(seed):
        model.set_attn_implementation("reordered")
        return training_gradients(model, ids, mask)


@families
@sides
def test_a_training_step_has_the_gradients_of_sdpa(family, side):
    """Within twice the largest error of sdpa in several orders of its sums."""
    ids, mask = random_ids(3, 12), padding_mask(LENGTHS, side)
    actual = training_gradients(random_model(family), ids, mask)
    references = [reordered_gradients(family, ids, mask, seed) for seed in range(ORDERS)]
    oracle = training_gradients(random_model(family, "sdpa").double(), ids, mask)
    for name, gradient in actual.items():
        assert gradient.abs().max() > 0, name
        worst = max((found[name] for found in references), key=lambda x: float((x - oracle[name]).abs().max()))
        assert_as_exact_as_reference(name, gradient, worst, oracle[name])


def test_gradient_checkpointing_changes_no_gradient():
    ids, mask = random_ids(3, 12), padding_mask(LENGTHS, "left")
    plain = training_gradients(random_model("llama"), ids, mask)
    model = random_model("llama")
    model.gradient_checkpointing_enable()
    checkpointed = training_gradients(model, ids, mask)
    assert all(torch.equal(gradient, checkpointed[name]) for name, gradient in plain.items())
