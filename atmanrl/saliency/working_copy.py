"""The model that masks are optimised on: the policy itself where its weights lie whole, else a plain copy of it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from atmanrl.saliency.projection import why_not_a_projection


def working_copy(model: nn.Module) -> PreTrainedModel:
    """``model``, or a frozen copy of it where computing on it directly would cost a collective or a cast per step.

    Copied, once per call, are models sharded by FSDP2 (``fully_shard``), whose weights are gathered whole on every
    rank, and float32 models under autocast, which become weights of autocast's dtype. LoRA adapters are merged into a
    copy; elsewhere they stay beside their layers. The copy is as large as the whole model in its dtype, and nothing in
    it is collective: ranks may then optimise different numbers of rollouts, or none.

    Args:
        model: a Hugging Face causal LM or PEFT's wrapper of one. Sharded: every rank must call.

    Raises:
        ValueError: for a PEFT method that prepends virtual tokens, which no mask column stands for.
    """
    base = _without_peft(model)
    to = base.dtype
    if torch.is_autocast_enabled(base.device.type) and to == torch.float32:
        to = torch.get_autocast_dtype(base.device.type)
    if not isinstance(base, FSDPModule) and to == base.dtype:
        return base
    with torch.no_grad(), torch.autocast(base.device.type, enabled=False):
        return _copy(base, to)


def _without_peft(model: Any) -> PreTrainedModel:
    peft: Any = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        plain: PreTrainedModel = model
        return plain
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"{type(model.active_peft_config).__name__} prepends virtual tokens, which have no mask column"
        )
    inner: PreTrainedModel = model.get_base_model()
    return inner


def _copy(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    # fully_shard derives a class from the model's own.
    architecture: Any = next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))
    with torch.device("meta"):
        copy: PreTrainedModel = architecture(model.config)
    gathered: dict[int, Tensor] = {}

    def whole(parameter: Tensor) -> Tensor:
        # Tied parameters are gathered once and stay tied.
        if id(parameter) not in gathered:
            full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            gathered[id(parameter)] = full.detach().to(dtype)
        return gathered[id(parameter)]

    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if why_not_a_projection(module) is None and not isinstance(module, nn.Linear):
            state[f"{name}.weight"] = _merged(module, dtype)
            if module.base_layer.bias is not None:
                state[f"{name}.bias"] = whole(module.base_layer.bias)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if ".lora_" not in name and ".base_layer." not in name:
            state[name] = whole(parameter)
    copy.load_state_dict(state, strict=True, assign=True)
    copy.tie_weights()
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        copy.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    copy.eval().requires_grad_(False)
    return copy


def _merged(module: Any, dtype: torch.dtype) -> Tensor:
    """The weight of a LoRA layer with its active adapters added in float32."""

    def full(parameter: Tensor) -> Tensor:
        return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).float()

    weight = full(module.base_layer.weight)
    if not module.disable_adapters and not module.merged:
        for name in module.active_adapters:
            if name in module.lora_A:
                weight = weight.addmm(
                    full(module.lora_B[name].weight), full(module.lora_A[name].weight), alpha=module.scaling[name]
                )
    return weight.to(dtype)
