"""A plain copy of the policy for mask optimisation: whole weights of one dtype, adapters merged, nothing sharded.

Masks take hundreds of passes over frozen weights. Sharded weights would be gathered anew in each of them, all processes
waiting for one another; adapters and autocast keep the fast path out. Gathering once per generation batch costs one
copy of the weights in memory and leaves every process on its own.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import set_zero3_state

# What PEFT, torch.compile and activation checkpointing put into the names of the parameters they wrap.
_WRAPPERS = re.compile(r"^base_model\.model\.|(?<=\.)base_layer\.|_orig_mod\.|_checkpoint_wrapped_module\.")


def plain(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model itself where its weights are whole, of ``dtype`` and without adapters, else a `plain_copy`."""
    if hasattr(model, "peft_config") or model.dtype != dtype or not is_whole(model):
        return plain_copy(model, dtype)
    return model


def is_whole(model: nn.Module) -> bool:
    """Whether no parameter is sharded by FSDP2 or ZeRO-3."""
    return not any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


@torch.no_grad()
def plain_copy(model: nn.Module, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its parameters gathered, adapters merged, in ``dtype``, on this process's device.

    Every process of a sharded model must call this at the same time. The model itself stays as it is: merging into its
    own weights and back again would round them.

    Args:
        model: a causal LM, as it is or wrapped by FSDP2, DeepSpeed ZeRO-3 or PEFT's LoRA.
        dtype: of the copy's parameters.

    Raises:
        ValueError: for an adapter that is not a LoRA of a linear layer, a parameter the architecture has not, or one of
            the architecture's that the model has not.
    """
    source: Any = model
    device = next(iter(source.parameters())).device
    made = unfilled(copy.deepcopy(source.config), dtype)
    made.to_empty(device=device)
    made.tie_weights()
    targets = dict(made.named_parameters(remove_duplicate=False))
    filled: set[int] = set()
    for name, whole in _whole_parameters(source):
        if name not in targets:
            raise ValueError(f"the policy's parameter {name} has no place in a {type(made).__name__}")
        filled.add(id(targets[name].copy_(whole)))
    for name, target in targets.items():
        if id(target) not in filled:
            raise ValueError(f"the policy has no parameter {name}, which a {type(made).__name__} needs")
    buffers = dict(made.named_buffers())
    for wrapped, buffer in source.named_buffers():
        if (name := _WRAPPERS.sub("", wrapped)) in buffers:
            buffers[name].copy_(buffer)
    made.eval().requires_grad_(False)
    return made


def unfilled(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The causal LM of a configuration, whole, without memory for its parameters: they are on the meta device."""
    # Under ZeRO-3 transformers shards each model that it makes, unless it is in the middle of making one.
    with torch.device("meta"), set_zero3_state():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def _whole_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    adapters = dict(_merged_weights(model)) if hasattr(model, "peft_config") else {}
    yield from adapters.items()
    for wrapped, parameter in model.named_parameters():
        name = _WRAPPERS.sub("", wrapped)
        if ".lora_" in name or name in adapters:
            continue
        yield name, _whole(parameter)


def _merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """W + sum of the active adapters' updates, for every adapted layer."""
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer

    for wrapped, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, LoraLinear) or module.merged or module.lora_variant:
            raise ValueError(
                f"{wrapped} is a {type(module).__name__}: only an unmerged plain LoRA of a linear layer is known"
            )
        weight = _whole(module.get_base_layer().weight).clone()
        with _gathered([*module.lora_A.parameters(), *module.lora_B.parameters()]):
            for adapter in [] if module.disable_adapters else module.active_adapters:
                if adapter in module.lora_A:
                    weight += _whole(module.get_delta_weight(adapter)).to(weight.dtype)
        yield f"{_WRAPPERS.sub('', wrapped)}.weight", weight


def _whole(parameter: Any) -> Tensor:
    if isinstance(parameter, DTensor):
        whole: Tensor = parameter.full_tensor()
        return whole
    with _gathered([parameter]):
        own: Tensor = parameter.detach()
        return own.clone() if hasattr(parameter, "ds_id") else own


@contextmanager
def _gathered(parameters: Sequence[Any]) -> Iterator[None]:
    """Within, parameters that ZeRO-3 has sharded are whole. FSDP2's can be computed with as they are."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    # Elsewhere they are empty, and a product of empty vectors is 0, not an error.
    with deepspeed.zero.GatheredParameters(parameters):
        yield
