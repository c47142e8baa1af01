"""The frozen fast path: Llama, Mistral, Qwen2 and Qwen3 decoders that do only the arithmetic the masks need.

Against autograd through the model it leaves out: every gradient of a weight and every saved input of a linear layer;
q, k, v of the first layer, which depend on no mask and are computed once per batch, and their gradients; everything
after the keys and values of the last layer in rows that predict no loss token; logits of those rows, and rows x
vocabulary in float32. All buffers are made once, so a step allocates only what stays small.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from atman_kernels.hf import AtManAttention
from atmanrl.config import Weights
from atmanrl.saliency.cost import loss_rows_at_a_time
from atmanrl.saliency.layers import FrozenLayer, Geometry, Pointwise, Projection, projection, why_not_a_projection
from atmanrl.saliency.likelihood import AnswerLikelihood, ModelLikelihood, prompt_keys_and_values
from atmanrl.saliency.packing import PackedRollouts

MakeLikelihood = Callable[[PreTrainedModel, PackedRollouts], AnswerLikelihood]

_log = logging.getLogger(__name__)

_FAMILIES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
# Embeddings that depend on nothing but the position; the others look at the longest sequence of the call.
_STATIC_ROTARY = ("default", "linear", "llama3", "yarn")

# Rows per block on the CPU: a block's gate and up stay in the second-level cache, its products still run at full rate.
_CPU_BLOCK = 512


class FrozenDecoder:
    """The likelihood of a packed batch's answers, computed by hand-written forward and backward passes.

    An :class:`~atmanrl.saliency.likelihood.AnswerLikelihood`. The buffers hold one call at a time: its backward must
    run before the next call.

    Args:
        model: one for which :func:`why_unsupported` returns None, inside :func:`atmanrl.saliency.likelihood.frozen`.
        batch: packed rollouts on the model's device.
        weights: see :class:`atmanrl.MaskConfig`.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, batch: PackedRollouts, weights: Weights = "model") -> None:
        decoder: Any = model.model
        embedded = decoder.embed_tokens(batch.ids)
        cos, sin = decoder.rotary_emb(embedded[None], batch.positions[None])
        half = cos.shape[-1] // 2
        attention = decoder.layers[0].self_attn
        geometry = Geometry(
            head_dim=attention.head_dim,
            sm_scale=attention.scaling,
            eps=decoder.norm.variance_epsilon,
            cos=cos[0, :, None],
            sin=torch.cat([-sin[0, :, None, :half], sin[0, :, None, half:]], dim=-1),
            block=_CPU_BLOCK if embedded.device.type == "cpu" else max(1, batch.n_rows),
            pointwise=Pointwise.on(embedded.device),
        )
        self._geometry = geometry
        prefixes = prompt_keys_and_values(model, batch)
        assert prefixes is not None, "a chain of thought follows a prompt"
        self.windows = [_window(module.self_attn) for module in decoder.layers]
        self.layers: list[FrozenLayer] = []
        x = embedded
        for index, module in enumerate(decoder.layers):
            last = index == len(decoder.layers) - 1
            self.layers.append(
                FrozenLayer(
                    module,
                    geometry,
                    x,
                    queries=batch.loss_rows if last else None,
                    constant_input=index == 0,
                    plan=batch.loss_plan if last else batch.plan,
                    prefix=prefixes.layer(index),
                    window=self.windows[index],
                    weights=weights,
                )
            )
            x = self.layers[-1].out
        self._head = AnswerHead(decoder.norm.weight, projection(model.lm_head), batch.loss_targets, geometry)
        self._d_rows = torch.empty_like(embedded)
        self._call = 0

    @property
    def kept_bytes(self) -> int:
        """Bytes of all activations that wait for the backward, the layers' attention outputs included."""
        around = (self.layers[0].x, self._geometry.cos, self._geometry.sin)
        head = self.layers[-1].out.nbytes + 4 * len(self.layers[-1].out)
        return sum(layer.kept_bytes for layer in self.layers) + sum(tensor.nbytes for tensor in around) + head

    def __call__(self, key_bias: Tensor) -> Tensor:
        if torch.is_grad_enabled() and key_bias.requires_grad:
            nll: Tensor = _Replay.apply(key_bias, self)  # type: ignore[no-untyped-call]
            return nll
        with torch.no_grad():
            return self.forward(key_bias, keep=False)

    def forward(self, key_bias: Tensor, *, keep: bool) -> Tensor:
        """(L_total,) negative log-likelihoods; with ``keep``, what :meth:`backward` needs stays in the buffers."""
        self._call += 1
        for layer in self.layers:
            layer.forward(key_bias, keep=keep)
        return self._head.forward(self.layers[-1].out, keep=keep)

    def backward(self, d_nll: Tensor) -> Tensor:
        """The gradient of the bias, (R_total,), given that of the last call's negative log-likelihoods."""
        d_out = self._head.backward(d_nll, self.layers[-1].out)
        d_bias: Tensor | None = None
        for index, layer in reversed(list(enumerate(self.layers))):
            d_layer = layer.backward(d_out, self._d_rows if index else None)
            d_bias = d_layer if d_bias is None else d_bias.add_(d_layer)
            d_out = self._d_rows
        assert d_bias is not None
        return d_bias


class AnswerHead:
    """Final norm, vocabulary and cross entropy of the loss rows, in chunks of rows, with the gradient on the way.

    Args:
        norm: weight of the final norm; vocabulary: the output embedding.
        targets: (L_total,) int64.
        geometry: for ``eps`` and the pointwise functions.
    """

    def __init__(self, norm: Tensor, vocabulary: Projection, targets: Tensor, geometry: Geometry) -> None:
        self._norm, self._vocabulary, self._targets, self._geometry = norm, vocabulary, targets, geometry
        self._rstd: Tensor | None = None
        self._d_normed: Tensor | None = None

    def forward(self, x: Tensor, *, keep: bool) -> Tensor:
        """(L_total,) float32 -log softmax(norm(x) W^T)[target]; with ``keep``, also its gradient by norm(x)."""
        normed, self._rstd = self._geometry.pointwise.rms_norm(x, self._norm, self._geometry.eps)
        self._d_normed = torch.empty_like(normed) if keep else None
        chunk = loss_rows_at_a_time(self._vocabulary.out_features)
        losses = []
        for start in range(0, len(normed), chunk):
            rows = slice(start, start + chunk)
            log_p = torch.log_softmax(self._vocabulary(normed[rows]), -1, dtype=torch.float32)
            targets = self._targets[rows, None]
            losses.append(-log_p.gather(-1, targets)[:, 0])
            if self._d_normed is not None:
                # d nll / d logits = softmax - onehot.
                d_logits = log_p.exp_()
                d_logits.scatter_add_(-1, targets, d_logits.new_full(targets.shape, -1.0))
                self._d_normed[rows] = self._vocabulary.pull_back(d_logits.to(x.dtype))
        return torch.cat(losses)

    def backward(self, d_nll: Tensor, x: Tensor) -> Tensor:
        """The gradient of x (L_total, hidden)."""
        assert self._d_normed is not None, "forward(keep=True) comes first"
        assert self._rstd is not None
        d_normed = self._d_normed * d_nll[:, None].to(x.dtype)
        return self._geometry.pointwise.rms_norm_backward(d_normed, x, self._norm, self._rstd)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key_bias: Tensor, decoder: FrozenDecoder) -> Tensor:
        nll = decoder.forward(key_bias, keep=True)
        ctx.decoder, ctx.call = decoder, decoder._call
        return nll

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        if ctx.call != ctx.decoder._call:
            raise RuntimeError("the decoder was called again before this call's backward, which lost its activations")
        with torch.no_grad():
            return ctx.decoder.backward(gradients[0]), None


def fastest_likelihood(model: PreTrainedModel, weights: Weights = "model") -> MakeLikelihood:
    """:class:`FrozenDecoder` where it supports the model, else :class:`ModelLikelihood`, with a message why in the log.

    Raises:
        ValueError: if ``weights``, see :class:`atmanrl.MaskConfig`, needs the fast path and the model is not covered.
    """
    reason = why_unsupported(model)
    if reason is None:
        return partial(FrozenDecoder, weights=weights)
    if weights != "model":
        raise ValueError(f"weights={weights!r} needs the fast path, which does not cover this model: {reason}")
    _log.info("masks take the general path: %s", reason)
    return ModelLikelihood


def why_unsupported(model: PreTrainedModel) -> str | None:
    """None if :class:`FrozenDecoder` computes this model, else what stands in its way.

    Args:
        model: a Hugging Face causal language model; one that is refused here takes the general path.
    """
    if type(model) not in _FAMILIES:
        return f"{type(model).__name__} is none of {', '.join(family.__name__ for family in _FAMILIES)}"
    if model.dtype == torch.float64:
        return "float64, in which the model's own norms still round to float32"
    if model.config.hidden_act not in ("silu", "swish"):
        return f"hidden_act {model.config.hidden_act!r}"
    decoder: Any = model.model
    rotary = decoder.rotary_emb.rope_type
    if rotary not in _STATIC_ROTARY:
        return f"rotary embedding {rotary!r}"
    if (reason := _why_altered(model)) is not None:
        return reason
    parameters = [parameter for name, parameter in model.named_parameters() if ".lora_" not in name]
    if len({(p.device, p.dtype, type(p.data)) for p in parameters}) != 1:
        return "parameters of several devices, dtypes or tensor types"
    if any(p.numel() == 0 for p in parameters):
        return "sharded parameters"
    return None


def _why_altered(model: PreTrainedModel) -> str | None:
    """Modules that compute something else than the family's own: quantised layers, hooks, replaced norms."""
    inside_projection: tuple[str, ...] = ()
    for name, module in model.named_modules():
        # These two run as they are.
        if name.startswith(("model.embed_tokens", "model.rotary_emb")):
            continue
        if _is_altered(module):
            return f"{name or type(module).__name__} has hooks or a forward of its own"
        if name.endswith(("_proj", "lm_head")):
            if (reason := why_not_a_projection(module)) is not None:
                return f"{name} is {reason}"
            inside_projection += (f"{name}.",)
        elif not name.startswith(inside_projection) and not name.endswith("act_fn"):
            if type(module).__module__ != type(model).__module__ and type(module) not in (
                nn.ModuleList,
                AtManAttention,
            ):
                return f"{name} is a {type(module).__name__}"
            if getattr(module, "variance_epsilon", model.config.rms_norm_eps) != model.config.rms_norm_eps:
                return f"{name} has an epsilon of its own"
    return None


def _is_altered(module: nn.Module) -> bool:
    """Whether something computes in this module's place: an instance's own ``forward`` (accelerate), or hooks."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    # Those that transformers leaves behind after output_hidden_states only watch.
    return "forward" in vars(module) or any("output_capturing" not in hook.__module__ for hook in hooks)


def _window(attention: Any) -> int | None:
    owner = attention if hasattr(attention, "layer_type") else attention.config
    window: int | None = getattr(owner, "sliding_window", None)
    return window
