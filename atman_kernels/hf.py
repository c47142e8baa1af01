"""Hugging Face: ``attn_implementation="atman"`` for every model that uses transformers' attention interface.

Importing this module registers an attention function and a mask function under the name "atman". The mask function
does not build a mask: it states once per forward, for all layers, where each batch row's keys begin and which of them
are padding (:class:`RowMask`). Arguments of the attention function travel through the model's keyword arguments::

    model.set_attn_implementation("atman")
    model(input_ids, attention_mask=attention_mask, key_bias=key_bias)

See :func:`atman_attention` for all of them, and docs/drop-in-attention.md for what is supported and what is refused.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Protocol, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask
from transformers.models.llama.modeling_llama import LlamaAttention

from atman_kernels.attention import attention_rows, attention_varlen, check_layout, checks_values
from atman_kernels.observation import AttentionCall, distance_is_read, observing, show
from atman_kernels.plan import AttentionPlan, SharedPrefix
from atman_kernels.row_mask import RowMask, lay_out, read_mask_function, row_mask_of, unsupported
from atman_kernels.statistics import attention_with_distance, fuses_distance

__all__ = [
    "AtManAttention",
    "AttentionCall",
    "AttentionRecorder",
    "KeyValueRecord",
    "LayerPrefixes",
    "RowMask",
    "atman_attention",
    "atman_mask",
    "observing",
]


class LayerPrefixes(Protocol):
    """Gives each layer its shared prefix; a list of :class:`SharedPrefix` may stand in its place."""

    def layer(self, layer_idx: int) -> SharedPrefix: ...


class AttentionRecorder(Protocol):
    """Receives what each layer's attention saw and computed, in the order of the layers."""

    def record(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> None:
        """Take q (B, Tq, Hq, D), k and v (B, Tk, Hkv, D), all after the rotary embedding, and lse (B, Hq, Tq).

        A packed batch has B = 1. The tensors belong to the running graph: detach what is kept without gradient.
        """


class KeyValueRecord:
    """Keeps every layer's keys and values of one packed forward, to serve as the shared prefix of the next.

    Pass it as ``capture=`` to the first forward and as ``shared_prefix=`` to the second; the second's plan states which
    keys each sequence sees. Nothing is copied; gradients are cut.
    """

    def __init__(self) -> None:
        self._layers: dict[int, SharedPrefix] = {}

    def __len__(self) -> int:
        return len(self._layers)

    def record(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> None:
        keys, values = (rearrange(x.detach(), "b t h d -> (b t) h d") for x in (k, v))
        self._layers[layer_idx] = SharedPrefix(keys, values)

    def layer(self, layer_idx: int) -> SharedPrefix:
        """Keys and values (B * T, Hkv, D) of one layer.

        Raises:
            ValueError: if nothing was recorded for it.
        """
        if layer_idx not in self._layers:
            raise ValueError(f"no keys were recorded for layer {layer_idx}, only for {sorted(self._layers)}")
        return self._layers[layer_idx]


def atman_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | RowMask | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> RowMask:
    """The mask function registered as "atman": lays out the batch rows instead of materialising a mask.

    Computed on the device without synchronisation. A row of the layout begins at the first key that is not padding;
    later padding (right padding, holes) is removed by a bias of -inf. Arguments are those that transformers passes to
    every mask function. What the kernels do not compute is noted in the result and refused by the attention function,
    so that a forward with its own ``attention_plan`` is not disturbed.

    Args:
        batch_size, q_length, kv_length: B, Tq and Tk.
        q_offset, kv_offset: positions of the first query and key.
        mask_function: what may see what; recognised by one call with symbols instead of positions.
        attention_mask: (B, T), 0 on padding, or None; a layout of this function passes through.
        device: where the layout goes.

    Raises:
        ValueError: for an ``attention_mask`` of another shape.
    """
    if isinstance(attention_mask, RowMask):
        return attention_mask
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention_mask must have shape (B, T), got {tuple(attention_mask.shape)}")
    device = torch.device(device)
    window, refused = read_mask_function(mask_function)
    valid = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if valid is not None:
        if valid.shape[0] != batch_size:
            raise ValueError(f"attention_mask has {valid.shape[0]} rows for a batch of {batch_size}")
        valid = valid[:, kv_offset : kv_offset + kv_length]
    seen = q_offset + q_length - kv_offset
    one_row = plan = None
    if refused is None and q_length == 1:
        one_row = sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device=device, **kwargs
        )
    elif refused is None:
        plan = lay_out(batch_size, q_length, kv_length, seen, valid, device)
    return RowMask(q_length, kv_offset, seen, valid, window, plan, one_row, refused, _arguments_of_the_forward())


def atman_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: RowMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    *,
    key_bias: Tensor | None = None,
    attention_plan: AttentionPlan | None = None,
    shared_prefix: Sequence[SharedPrefix] | LayerPrefixes | None = None,
    capture: AttentionRecorder | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered as "atman": causal attention with a bias per key column.

    Models call it; the keyword-only arguments are those of the model's forward.

    Args:
        module: the attention layer; its ``layer_idx`` selects the shared prefix and labels what is captured.
        query: (B, Hq, Tq, D).
        key, value: (B, Hkv, Tk, D).
        attention_mask: what :func:`atman_mask` returned.
        dropout: must be 0.
        scaling: factor of the scores.
        sliding_window: the layer's window, used with ``attention_plan``.
        key_bias: (B, T) float32, one number per token that the model has seen, cached tokens included; added to the
            scaled scores of that token's key in every head, row and layer. Its gradient is the sum over all of them.
        attention_plan: the layout of a packed batch of shape (1, T_total), in place of any mask; give ``position_ids``
            along with it, and ``key_bias`` as (1, T_total).
        shared_prefix: keys and values that the plan's sequences see before their own, per layer.
        capture: receives q, k, v and lse of each layer.

    Returns:
        (B, Tq, Hq, D), and None in place of the attention map, which is never formed.

    Raises:
        ValueError: what the kernels do not compute, by name; a ``key_bias`` of the wrong shape, dtype or device; an
            argument that the model's forward was given and that did not reach this layer.
    """
    _refuse_unsupported(module, dropout, kwargs)
    extras = dict(zip(_ARGUMENTS, (key_bias, attention_plan, shared_prefix, capture), strict=True))
    if isinstance(attention_mask, RowMask):
        lost = [name for name in attention_mask.arguments if extras[name] is None]
        if lost:
            raise ValueError(
                f"{type(module).__name__} did not get {', '.join(lost)}, which the model's forward was given: the model"
                " does not hand keyword arguments to its layers; use a model that does, such as Llama, Mistral, Qwen or"
                " Gemma"
            )
    if query.shape[2] == 1 and all(extra is None for extra in extras.values()):
        return _decode(module, query, key, value, attention_mask, scaling)
    q, k, v = (rearrange(x, "b h t d -> b t h d") for x in _autocast(query, key, value))
    layer_idx = cast(int, module.layer_idx)
    if attention_plan is not None:
        prefix = None if shared_prefix is None else _prefix_of(shared_prefix, layer_idx)
        o, lse = _packed(layer_idx, q, k, v, key_bias, attention_plan, prefix, scaling, sliding_window)
    elif shared_prefix is not None:
        raise ValueError("shared_prefix needs attention_plan, which states the keys that each sequence sees of it")
    else:
        o, lse = _padded(layer_idx, q, k, v, key_bias, row_mask_of(attention_mask, q, k, sliding_window), scaling)
    if capture is not None:
        capture.record(layer_idx, q, k, v, lse)
    return o, None


_ARGUMENTS = ("key_bias", "attention_plan", "shared_prefix", "capture")


def _arguments_of_the_forward() -> tuple[str, ...]:
    """Which of the attention function's own arguments the forward that asks for a mask was given.

    Some models take any keyword argument and hand none of them to their layers. Neither of the two functions that
    transformers calls sees the arguments of the model's forward, so they are read from its frame.
    """
    if torch.compiler.is_compiling():
        return ()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward" and "kwargs" in frame.f_code.co_varnames:
            given = frame.f_locals.get("kwargs")
            # Not every local variable of that name holds keyword arguments.
            found = tuple(name for name in _ARGUMENTS if isinstance(given, dict) and given.get(name) is not None)
            if found:
                return found
        frame = frame.f_back
    return ()


AttentionInterface.register("atman", atman_attention)
AttentionMaskInterface.register("atman", atman_mask)


class AtManAttention(LlamaAttention):
    """A drop-in for ``LlamaAttention``: same parameters, same state dict, same arguments, plus those of "atman".

    ``layer.self_attn = AtManAttention(config, layer_idx)`` swaps one layer; whatever the model's own
    ``attn_implementation`` is, this layer computes with the kernels of this package.

    Args:
        config: the model's configuration; it is left unchanged.
        layer_idx: position of the layer in the model.
    """

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        config = copy.copy(config)
        config._attn_implementation = "atman"
        super().__init__(config, layer_idx)


def _decode(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: RowMask | Tensor | None,
    scaling: float | None,
) -> tuple[Tensor, None]:
    """One unbiased row per sequence: nothing to tile, so SDPA computes it."""
    if isinstance(mask, RowMask):
        if mask.refused is not None:
            raise unsupported(mask.refused)
        mask = mask.one_row
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)


def _packed(
    layer_idx: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    plan: AttentionPlan,
    prefix: SharedPrefix | None,
    scaling: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    if q.shape[0] != 1:
        raise ValueError(f"attention_plan lays out a packed batch of shape (1, T_total), got a batch of {q.shape[0]}")
    if key_bias is not None:
        _check_key_bias(key_bias, (1, k.shape[1]), k)
    # Not q[0]: the backward of an index fills and copies a tensor of zeros.
    packed = (q.squeeze(0), k.squeeze(0), v.squeeze(0), None if key_bias is None else key_bias.squeeze(0))
    distance = None
    if _finds_distance(layer_idx, q):
        check_layout(*packed, None, None, plan, prefix, "attention_plan")
        o, lse, distance = attention_with_distance(
            q, k, v, key_bias, plan=plan, prefix=prefix, sm_scale=scaling, window=window
        )
    else:
        o, lse = attention_varlen(*packed, plan=plan, prefix=prefix, sm_scale=scaling, window=window, return_lse=True)
        o, lse = o[None], lse[None]
    show(AttentionCall(layer_idx, q, k, lse, plan, key_bias, prefix, scaling, window, distance))
    return o, lse


def _padded(
    layer_idx: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    mask: RowMask,
    scaling: float | None,
) -> tuple[Tensor, Tensor]:
    batch, n_keys = k.shape[:2]
    plan = mask.plan or lay_out(batch, mask.q_length, n_keys, mask.seen, mask.valid, k.device)
    if key_bias is not None:
        key_bias = _bias_of_keys(key_bias, mask, k)
    if mask.valid is not None:
        finite = torch.zeros((), device=k.device) if key_bias is None else key_bias
        key_bias = torch.where(mask.valid, finite, -torch.inf)
    distance = None
    if _finds_distance(layer_idx, q):
        o, lse, distance = attention_with_distance(q, k, v, key_bias, plan=plan, sm_scale=scaling, window=mask.window)
    else:
        o, lse = attention_rows(q, k, v, key_bias, plan=plan, sm_scale=scaling, window=mask.window)
    show(AttentionCall(layer_idx, q, k, lse, plan, key_bias, None, scaling, mask.window, distance))
    return o, lse


def _finds_distance(layer_idx: int, q: Tensor) -> bool:
    """Whether the attention is to find each row's distance on its way, for an observer."""
    return distance_is_read(layer_idx) and not torch.is_grad_enabled() and fuses_distance(q)


def _bias_of_keys(key_bias: Tensor, mask: RowMask, k: Tensor) -> Tensor:
    """The part of a (B, T) bias that belongs to the keys a layer holds, as (B, Tk)."""
    batch, n_keys = k.shape[:2]
    seen = mask.seen + mask.k_offset
    if isinstance(seen, Tensor):
        # Reading the length of a static cache synchronises.
        seen = int(seen) if checks_values(seen) else min(key_bias.numel() // batch, mask.k_offset + n_keys)
    _check_key_bias(key_bias, (batch, seen), k)
    missing = mask.k_offset + n_keys - key_bias.shape[1]
    return nn.functional.pad(key_bias[:, mask.k_offset :], (0, missing))


def _check_key_bias(key_bias: Tensor, expected: tuple[int, int], k: Tensor) -> None:
    if key_bias.shape != expected:
        raise ValueError(
            f"key_bias must have one number per token that the model has seen, shape {expected},"
            f" got {tuple(key_bias.shape)}"
        )
    if key_bias.dtype != torch.float32 and not key_bias.dtype == k.dtype == torch.float64:
        raise ValueError(f"key_bias must be float32, got {key_bias.dtype}")
    if key_bias.device != k.device:
        raise ValueError(f"key_bias is on {key_bias.device}, the model's keys on {k.device}")


def _prefix_of(shared_prefix: Sequence[SharedPrefix] | LayerPrefixes, layer_idx: int) -> SharedPrefix:
    if isinstance(shared_prefix, SharedPrefix):
        raise ValueError("shared_prefix must give one SharedPrefix per layer, got a single one")
    if isinstance(shared_prefix, Sequence):
        if layer_idx >= len(shared_prefix):
            raise ValueError(f"shared_prefix has {len(shared_prefix)} layers, but layer {layer_idx} needs one")
        return shared_prefix[layer_idx]
    return shared_prefix.layer(layer_idx)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast the rotary embedding returns float32 q and k beside a low-precision v: one dtype for all."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def _refuse_unsupported(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    layer = type(module).__name__
    if kwargs.get("softcap") is not None:
        raise unsupported(f"logit softcapping ({layer}: softcap {kwargs['softcap']})")
    if kwargs.get("s_aux") is not None:
        raise unsupported(f"attention sinks ({layer})")
    if kwargs.get("position_bias") is not None:
        raise unsupported(f"a position bias ({layer})")
    if dropout:
        raise unsupported(f"attention dropout ({layer}: p = {dropout}; set attention_dropout to 0)")
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise unsupported(f"bidirectional attention ({layer})")
    if kwargs.get("output_attentions"):
        raise unsupported("output_attentions=True (the attention map is never formed)")
