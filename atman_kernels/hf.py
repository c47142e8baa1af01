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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask
from transformers.models.llama.modeling_llama import LlamaAttention

from atman_kernels.attention import attention_rows, attention_varlen, checks_values
from atman_kernels.plan import AttentionPlan, SharedPrefix, build_dense_plan, dense_plan

__all__ = [
    "AtManAttention",
    "AttentionRecorder",
    "KeyValueRecord",
    "LayerPrefixes",
    "RowMask",
    "atman_attention",
    "atman_mask",
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


@dataclass(frozen=True)
class RowMask:
    """What stands in the place of a mask: where the keys of each batch row lie, for all layers of one kind.

    Attributes:
        q_length: query rows of this forward.
        k_offset: position in the text of the first key that the layers hold (above 0 for a sliding-window cache).
        seen: keys written so far, counted from ``k_offset``; a 0-d tensor where a static cache counts on the device.
        valid: (B, Tk) bool, False on padding; None: no padding.
        window: rows see this many nearest keys; None: all.
        plan: the layout; None for a single row, which needs it only if there is a bias.
        one_row: SDPA's (B, 1, 1, Tk) mask if there is a single row; None: no mask needed.
        refused: what the model's mask function asks for that the kernels do not compute, or None.
    """

    q_length: int
    k_offset: int
    seen: int | Tensor
    valid: Tensor | None
    window: int | None
    plan: AttentionPlan | None
    one_row: Tensor | None
    refused: str | None

    # A static cache hands the prepared mask to the model, which then asks for its rank: anything but 2 is left alone.
    ndim = 4


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
    """
    if isinstance(attention_mask, RowMask):
        return attention_mask
    device = torch.device(device)
    window, refused = _read_mask_function(mask_function)
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
        plan = _layout(batch_size, q_length, kv_length, seen, valid, device)
    return RowMask(q_length, kv_offset, seen, valid, window, plan, one_row, refused)


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
        query: (B, Hq, Tq, D); key, value: (B, Hkv, Tk, D).
        attention_mask: what :func:`atman_mask` returned.
        scaling: factor of the scores; sliding_window: the layer's window, used with ``attention_plan``.
        key_bias: (B, T) float32, one number per token that the model has seen, cached tokens included; added to the
            scaled scores of that token's key in every head, row and layer. Its gradient is the sum over all of them.
        attention_plan: the layout of a packed batch of shape (1, T_total), in place of any mask; give ``position_ids``
            along with it, and ``key_bias`` as (1, T_total).
        shared_prefix: keys and values that the plan's sequences see before their own, per layer.
        capture: receives q, k, v and lse of each layer.

    Returns:
        (B, Tq, Hq, D), and None in place of the attention map, which is never formed.

    Raises:
        ValueError: what the kernels do not compute, by name; a ``key_bias`` of the wrong shape, dtype or device.
    """
    _refuse_unsupported(module, dropout, kwargs)
    plain = key_bias is None and attention_plan is None and shared_prefix is None and capture is None
    if plain and query.shape[2] == 1 and isinstance(attention_mask, RowMask) and attention_mask.refused is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask.one_row, scaling=scaling)
    q, k, v = (rearrange(x, "b h t d -> b t h d") for x in _autocast(query, key, value))
    if attention_plan is not None:
        prefix = None if shared_prefix is None else _prefix_of(shared_prefix, cast(int, module.layer_idx))
        o, lse = _packed(q, k, v, key_bias, attention_plan, prefix, scaling, sliding_window)
    elif shared_prefix is not None:
        raise ValueError("shared_prefix needs attention_plan, which states the keys that each sequence sees of it")
    else:
        o, lse = _padded(q, k, v, key_bias, attention_mask, scaling)
    if capture is not None:
        capture.record(cast(int, module.layer_idx), q, k, v, lse)
    return o, None


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


def _packed(
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
        _check_key_bias(key_bias, (1, k.shape[1]), k.device)
    o, lse = attention_varlen(
        q[0],
        k[0],
        v[0],
        None if key_bias is None else key_bias[0],
        plan=plan,
        prefix=prefix,
        sm_scale=scaling,
        window=window,
        return_lse=True,
    )
    return o[None], lse[None]


def _padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    mask: RowMask | Tensor | None,
    scaling: float | None,
) -> tuple[Tensor, Tensor]:
    if not isinstance(mask, RowMask):
        raise ValueError(f"unsupported attention mask {type(mask)}")
    if mask.refused is not None:
        _refuse(mask.refused)
    batch, n_keys = k.shape[:2]
    plan = mask.plan or _layout(batch, mask.q_length, n_keys, mask.seen, mask.valid, k.device)
    if key_bias is not None:
        key_bias = _bias_of_keys(key_bias, mask, batch, n_keys, k.device)
    if mask.valid is not None:
        finite = torch.zeros((), device=k.device) if key_bias is None else key_bias
        key_bias = torch.where(mask.valid, finite, -torch.inf)
    return attention_rows(q, k, v, key_bias, plan=plan, sm_scale=scaling, window=mask.window)


def _layout(
    batch: int, q_length: int, kv_length: int, seen: int | Tensor, valid: Tensor | None, device: torch.device
) -> AttentionPlan:
    if valid is None and isinstance(seen, int) and seen == kv_length:
        make = build_dense_plan if torch.compiler.is_compiling() else dense_plan
        return make(batch, q_length, kv_length, device)
    end = torch.zeros(batch, dtype=torch.int64, device=device) + seen
    start = torch.zeros_like(end)
    if valid is not None:
        index = torch.arange(kv_length, device=device)
        start = torch.minimum(torch.where(valid, index, kv_length).amin(dim=1), end)
    q_start = (start - (end - q_length)).clamp(min=0)
    return AttentionPlan.from_rows(
        q_start, q_length - q_start, start, end - start, max_q=q_length, max_k=kv_length, covers=False
    )


def _bias_of_keys(key_bias: Tensor, mask: RowMask, batch: int, n_keys: int, device: torch.device) -> Tensor:
    """The part of a (B, T) bias that belongs to the keys a layer holds, as (B, Tk)."""
    seen = mask.seen + mask.k_offset
    if isinstance(seen, int) or checks_values(seen):
        _check_key_bias(key_bias, (batch, int(seen)), device)
    bias = key_bias[:, mask.k_offset :]
    return bias if bias.shape[1] == n_keys else nn.functional.pad(bias, (0, n_keys - bias.shape[1]))


def _check_key_bias(key_bias: Tensor, expected: tuple[int, int], device: torch.device) -> None:
    if key_bias.shape != expected:
        raise ValueError(f"key_bias must have one number per token seen, shape {expected}, got {tuple(key_bias.shape)}")
    if key_bias.device != device:
        raise ValueError(f"key_bias is on {key_bias.device}, the model's keys on {device}")


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
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def _refuse_unsupported(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    if kwargs.get("softcap") is not None:
        _refuse(f"logit softcapping (softcap {kwargs['softcap']} in {type(module).__name__})")
    if kwargs.get("s_aux") is not None:
        _refuse(f"attention sinks (in {type(module).__name__})")
    if kwargs.get("position_bias") is not None:
        _refuse(f"a position bias (in {type(module).__name__})")
    if dropout:
        _refuse(f"attention dropout (p = {dropout} in {type(module).__name__})")
    if not kwargs.get("is_causal", getattr(module, "is_causal", True)):
        _refuse(f"bidirectional attention (in {type(module).__name__})")
    if kwargs.get("output_attentions"):
        _refuse("output_attentions=True (the attention map is never formed)")


def _refuse(what: str) -> NoReturn:
    raise ValueError(f'attn_implementation="atman" does not support {what}; use "eager" or "sdpa" for it')


class _Visible:
    """What a mask function computes, if it is a causal triangle, a window, or both."""

    device = None

    def __init__(self, causal: bool = False, window: int | None = None) -> None:
        self.causal = causal
        self.window = window

    def __and__(self, other: _Visible) -> _Visible:
        windows = [w for w in (self.window, other.window) if w is not None]
        return _Visible(self.causal or other.causal, min(windows) if windows else None)

    def to(self, device: object) -> _Visible:
        return self


class _Row:
    """A query's position, less a constant."""

    def __init__(self, back: int = 0) -> None:
        self.back = back

    def __sub__(self, distance: int) -> _Row:
        return _Row(self.back + distance)

    def new_ones(self, *args: object, **kwargs: object) -> _Visible:
        return _Visible()


class _Key:
    """A key's position."""

    def __le__(self, row: _Row) -> _Visible:
        return _Visible(causal=True)

    def __gt__(self, row: _Row) -> _Visible:
        return _Visible(window=row.back)


def _read_mask_function(mask_function: Callable[..., Any]) -> tuple[int | None, str | None]:
    """(window, None) for a causal mask function, (None, what it is) for one that the kernels do not compute.

    transformers composes mask functions from closures; running one on symbols instead of positions shows what it
    computes without looking into them, and torch.compile can trace it.
    """
    try:
        visible = mask_function(0, 0, _Row(), _Key())
    except Exception:
        visible = None
    if isinstance(visible, _Visible) and visible.causal:
        return visible.window, None
    return None, _describe(mask_function)


def _describe(mask_function: Callable[..., Any]) -> str:
    return mask_function.__qualname__
