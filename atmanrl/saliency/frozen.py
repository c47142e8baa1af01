"""Borrowing a model: frozen, in eval mode and on the AtMan attention, given back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

import atman_kernels.hf  # noqa: F401  (registers attn_implementation="atman")


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model is in eval mode, its parameters need no gradient, and it attends through "atman".

    Gradients with respect to inputs can be taken inside, whatever the caller's grad mode (no_grad, inference_mode), and
    autocast is off: products are in the weights' dtype.
    Everything is restored afterwards, also after an error: the attention implementation (of sub-configurations too),
    the mode of each module, each parameter's ``requires_grad``; ``.grad`` is never touched. Eval mode also switches
    dropout and gradient checkpointing off.

    Raises:
        ValueError: if the model does not dispatch its attention through transformers' AttentionInterface.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(model.device.type, enabled=False))
        stack.enter_context(eval_mode(model))
        stack.enter_context(_no_parameter_gradients(model))
        stack.enter_context(_atman_attention(model))
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            # Not module.train(): that would also switch children that were in eval mode.
            module.training = True


@contextmanager
def _no_parameter_gradients(model: nn.Module) -> Iterator[None]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _atman_attention(model: PreTrainedModel) -> Iterator[None]:
    config = model.config
    before = {"": config._attn_implementation}
    for name in config.sub_configs:
        sub_config = getattr(config, name, None)
        if sub_config is not None:
            before[name] = sub_config._attn_implementation
    model.set_attn_implementation("atman")
    try:
        if config._attn_implementation != "atman":
            raise ValueError(
                f"{type(model).__name__} does not support attn_implementation='atman': its attention does not go"
                " through transformers' AttentionInterface"
            )
        yield
    finally:
        model.set_attn_implementation(before)
