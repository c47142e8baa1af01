"""Frozen projections compute what the layers they stand for compute, and their gradient by the input."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from atmanrl import MaskConfig, optimize_masks
from atmanrl.saliency.decoder import FrozenDecoder, why_unsupported
from atmanrl.saliency.layers import projection, why_not_a_projection
from atmanrl.saliency.likelihood import ModelLikelihood
from tests.atmanrl.tiny_models import random_rollouts, tiny_model

LENGTHS = [(9, 0, 3), (14, 2, 1), (5, 1, 2)]
SHORT = MaskConfig(steps=12, lr=4e-3)
LORA = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]}


def with_adapters(model, **settings):
    adapted = get_peft_model(model, LoraConfig(**{**LORA, **settings}))
    torch.manual_seed(2)
    for name, parameter in adapted.named_parameters():
        # B starts at zero, where an adapter that is left out would not be noticed.
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return adapted


def adapted_layer(**settings):
    return with_adapters(tiny_model("llama biased"), **settings).get_base_model().model.layers[1].self_attn.o_proj


@pytest.mark.parametrize("module", [nn.Linear(48, 32), nn.Linear(48, 32, bias=False), adapted_layer()], ids=type)
def test_a_projection_and_its_pull_back_are_the_modules_own(module):
    own = projection(module)
    x = torch.randn(7, module.in_features, requires_grad=True)
    y = module(x)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, [x], dy)
    with torch.no_grad():
        torch.testing.assert_close(own(x), y)
        torch.testing.assert_close(own(x, torch.full_like(y, torch.nan)), y)
        torch.testing.assert_close(own.pull_back(dy), dx)
        torch.testing.assert_close(own.pull_back(dy, torch.ones_like(dx)), dx + 1)
    assert own.out_features == y.shape[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_rounds_each_row_to_three_bits_of_mantissa(dtype):
    linear = nn.Linear(64, 48).to(dtype)
    # Rows of very different size: a single scale would lose the small ones.
    x = torch.randn(32, 64, dtype=dtype) * torch.logspace(-3, 3, 32)[:, None].to(dtype)
    dy = torch.randn(32, 48, dtype=dtype) * torch.logspace(3, -3, 32)[:, None].to(dtype)
    rounded, exact = projection(linear, "float8"), projection(linear.float())
    for found, expected in [
        (rounded(x), exact(x.float())),
        (rounded.pull_back(dy), exact.pull_back(dy.float())),
        (rounded.pull_back(dy, x.clone()), exact.pull_back(dy.float(), x.float())),
    ]:
        assert found.dtype == dtype
        error = (found.float() - expected).norm(dim=1) / expected.norm(dim=1)
        # Two operands of relative error up to 1/16 each, independent: some 4 % of a row's norm.
        assert 1e-3 < error.max() < 0.08


def test_rows_of_zeros_stay_zero_in_float8():
    linear = nn.Linear(32, 16, bias=False)
    assert projection(linear, "float8")(torch.zeros(3, 32)).tolist() == torch.zeros(3, 16).tolist()


@pytest.mark.parametrize("state", ["active", "disabled", "merged"])
def test_adapters_take_the_fast_path_and_give_the_general_paths_masks(state):
    model = with_adapters(tiny_model())
    plain = optimize_masks(tiny_model(), random_rollouts(LENGTHS), SHORT)
    if state == "merged":
        model.merge_adapter()
    assert why_unsupported(model.get_base_model()) is None
    rollouts = random_rollouts(LENGTHS)
    with model.disable_adapter() if state == "disabled" else torch.enable_grad():
        fast = optimize_masks(model, rollouts, SHORT, likelihood=FrozenDecoder)
        general = optimize_masks(model, rollouts, SHORT, likelihood=ModelLikelihood)
    for one, other, without in zip(fast, general, plain, strict=True):
        torch.testing.assert_close(one.mask, other.mask, atol=1e-3, rtol=0)
        assert one.loss_initial == pytest.approx(other.loss_initial, abs=1e-4)
        same = one.loss_initial == pytest.approx(without.loss_initial, abs=1e-4)
        assert same == (state == "disabled"), "the adapters' effect"


def test_variants_of_lora_are_left_to_the_general_path():
    assert why_not_a_projection(adapted_layer(use_dora=True)) == "a variant of LoRA"
    assert why_not_a_projection(nn.Conv1d(1, 1, 1)) == "a Conv1d"
    assert "a variant of LoRA" in why_unsupported(with_adapters(tiny_model(), use_dora=True).get_base_model())


def test_virtual_tokens_are_refused():
    model = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="PromptTuningConfig prepends virtual tokens"):
        optimize_masks(model, random_rollouts(LENGTHS), SHORT)


def test_float8_masks_follow_the_models_own_on_the_fast_path_only():
    rollouts = random_rollouts([(30, 1, 3), (40, 1, 3)])
    exact = optimize_masks(tiny_model(), rollouts, SHORT)
    rounded = optimize_masks(tiny_model(), rollouts, MaskConfig(steps=12, lr=4e-3, weights="float8"))
    for one, other in zip(exact, rounded, strict=True):
        assert not torch.equal(one.mask, other.mask)
        assert torch.corrcoef(torch.stack([one.mask, other.mask]))[0, 1] > 0.8
    with pytest.raises(ValueError, match=r"weights='float8' needs the fast path.*Gemma3ForCausalLM"):
        optimize_masks(tiny_model("gemma3"), rollouts, MaskConfig(weights="float8"))
