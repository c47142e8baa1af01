"""Mask optimisation as the paper describes it, written from the equations: the oracle of the saliency engine.

One rollout at a time, eager attention, a dense additive s x s mask, the whole prompt and completion in every step,
AdamW by its textbook update. It shares no code with ``atmanrl.saliency``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from atmanrl import MaskConfig, Rollout


def _dense_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """transformers' eager attention, but with the softmax in the dtype of the model, where that is float64."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    p = (query @ key.transpose(2, 3) * scaling + mask).softmax(-1)
    return (p @ value).transpose(1, 2), None


# No mask function is registered under this name, so transformers hands the model's 4-D mask through.
AttentionInterface.register("dense", _dense_attention)


@dataclass
class NaiveMask:
    mask: Tensor
    loss_initial: float
    loss_final: float
    loss_unmasked: float


def naive_mask(model: PreTrainedModel, rollout: Rollout, config: MaskConfig) -> NaiveMask:
    model.set_attn_implementation("dense")
    model.eval().requires_grad_(False)
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    h = torch.full((len(rollout.cot_ids),), config.init, dtype=dtype)
    first, second = torch.zeros_like(h), torch.zeros_like(h)
    decay_1, decay_2 = config.betas
    initial = _loss(model, rollout, config, _bias(h, config))
    for step in range(1, config.steps + 1):
        h.requires_grad_(True)
        loss = _loss(model, rollout, config, _bias(h, config))
        if config.sparsity:
            loss = loss + config.sparsity * (1 - torch.minimum(h, torch.tensor(config.upper)) / config.init).abs().sum()
        (gradient,) = torch.autograd.grad(loss, [h])
        h = h.detach()
        first = decay_1 * first + (1 - decay_1) * gradient
        second = decay_2 * second + (1 - decay_2) * gradient**2
        h = h * (1 - config.lr * config.weight_decay)
        corrected = (second / (1 - decay_2**step)).sqrt() + config.eps
        h = h - config.lr * (first / (1 - decay_1**step)) / corrected
    return NaiveMask(
        h,
        float(initial),
        float(_loss(model, rollout, config, _bias(h, config))),
        float(_loss(model, rollout, config, torch.zeros_like(h))),
    )


def _bias(h: Tensor, config: MaskConfig) -> Tensor:
    return config.scale * torch.where(h < config.upper, h, torch.full_like(h, config.upper))


def _loss(model: PreTrainedModel, rollout: Rollout, config: MaskConfig, bias: Tensor) -> Tensor:
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    length, prompt, cot = ids.shape[1], len(rollout.prompt_ids), len(rollout.cot_ids)
    columns = torch.cat([bias.new_zeros(prompt), bias, bias.new_zeros(length - prompt - cot)])
    logits = model(input_ids=ids, attention_mask=_dense_masks(model, columns), use_cache=False).logits[0]
    counted = len(rollout.answer_ids) + (len(rollout.marker_ids) if config.answer_loss == "all" else 0)
    log_p = logits.to(bias.dtype).log_softmax(-1)
    return -torch.stack([log_p[i - 1, ids[0, i]] for i in range(length - counted, length)]).mean()


def _dense_masks(model: PreTrainedModel, columns: Tensor) -> Any:
    length = len(columns)
    window = getattr(model.config, "sliding_window", None)

    def dense(reach: int) -> Tensor:
        distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        seen = (distance >= 0) & (distance < reach)
        return torch.where(seen, columns[None, :].expand(length, length), -torch.inf)[None, None].to(model.dtype)

    if "sliding_attention" in getattr(model.config, "layer_types", ()):
        return {"full_attention": dense(length), "sliding_attention": dense(window)}
    return dense(length if model.config.model_type != "mistral" or window is None else window)
