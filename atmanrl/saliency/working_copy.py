"""The model that masks are optimised on: the policy itself where its weights lie whole, else a plain copy of it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from atmanrl.plain_copy import is_whole, plain_copy


def working_copy(model: nn.Module) -> PreTrainedModel:
    """``model``, or a plain copy of it where computing on it directly would cost a collective or a cast per step.

    Copied, once per call, are models sharded by FSDP2 or ZeRO-3, whose weights are gathered whole on every rank, and
    float32 models under autocast, which become weights of autocast's dtype. LoRA adapters are merged into a copy;
    elsewhere they stay beside their layers. The copy is as large as the whole model in its dtype, and nothing in it is
    collective: ranks may then optimise different numbers of rollouts, or none.

    Args:
        model: a Hugging Face causal LM or PEFT's wrapper of one. Sharded: every rank must call.

    Raises:
        ValueError: for a PEFT method that prepends virtual tokens, which no mask column stands for; for adapters other
            than LoRA's of linear layers where a copy is needed.
    """
    base = _without_peft(model)
    device, to = base.device.type, base.dtype
    if torch.is_autocast_enabled(device) and to == torch.float32:
        to = torch.get_autocast_dtype(device)
    if to == base.dtype and is_whole(base):
        return base
    with torch.autocast(device, enabled=False):
        return plain_copy(model, to)


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
