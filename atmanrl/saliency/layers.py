"""One frozen decoder layer, forward and backward, in buffers that are made once and used in every step.

Its parts: norm, rotary embedding and SwiGLU, each written to be one pass over memory (on the CPU they run eagerly on
blocks of rows that stay in cache, on a GPU torch.compile makes one kernel of each); projections y = x W^T + b, whose
pull-back dx = dy W needs the weight and nothing of the forward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import ScalingType, scaled_mm, silu

from atman_kernels import AttentionPlan, SharedPrefix, attention_varlen
from atmanrl.config import Weights

# The largest number of e4m3.
_FLOAT8_MAX = 448.0


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y = weight * (x * rstd), rstd = (mean(x^2) + eps)^(-1/2), rounded where Hugging Face's norms round.

    Args:
        x: (..., D) in the model's dtype; weight: (D,).

    Returns:
        y like x, and rstd (..., 1) in float32.
    """
    wide = x.float()
    rstd = torch.rsqrt(torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps))
    return (wide * rstd).to(x.dtype).mul_(weight), rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """dx = rstd * (g - xhat * mean(g * xhat)) with g = weight * dy and xhat = x * rstd."""
    gradient = dy.float() * weight.float()
    normed = x.float() * rstd
    along = (gradient * normed).mean(-1, keepdim=True)
    return gradient.addcmul_(normed, along, value=-1).mul_(rstd).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (rows, H, D) by cos and sin (rows, 1, D), the first half of sin negated.

    With -sin it is its own backward.
    """
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return silu(gate).mul_(up)


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup) of silu(gate) * up, from its inputs alone."""
    return torch.ops.aten.silu_backward(dy * up, gate), silu(gate).mul_(dy)


class Pointwise(NamedTuple):
    """Norm, rotary embedding and SwiGLU as they run on one device."""

    rms_norm: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] = rms_norm
    rms_norm_backward: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = rms_norm_backward
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = rotate
    swiglu: Callable[[Tensor, Tensor], Tensor] = swiglu
    swiglu_backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = swiglu_backward

    @classmethod
    def on(cls, device: torch.device) -> Pointwise:
        """Compiled for any number of rows on a GPU, as they stand elsewhere."""
        if device.type != "cuda":
            return cls()
        return cls(
            torch.compile(rms_norm, dynamic=True),
            torch.compile(rms_norm_backward, dynamic=True),
            torch.compile(rotate, dynamic=True),
            torch.compile(swiglu, dynamic=True),
            torch.compile(swiglu_backward, dynamic=True),
        )


class Projection(Protocol):
    """A linear map whose weights get no gradient."""

    out_features: int

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x W^T + b, (rows, out_features) from x (rows, in_features); written to ``out`` if given."""

    def pull_back(self, dy: Tensor, dx: Tensor | None = None) -> Tensor:
        """dy W, (rows, in_features) from dy (rows, out_features); added to ``dx`` in place if given."""


class Dense:
    """A linear layer as it stands."""

    def __init__(self, linear: nn.Linear) -> None:
        self.out_features = linear.out_features
        self._weight = linear.weight.detach()
        self._bias = None if linear.bias is None else linear.bias.detach()

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        # out=None makes a new tensor, but the typed overloads do not say so.
        into: dict[str, Any] = {} if out is None else {"out": out}
        if self._bias is None:
            return torch.mm(x, self._weight.t(), **into)
        return torch.addmm(self._bias, x, self._weight.t(), **into)

    def pull_back(self, dy: Tensor, dx: Tensor | None = None) -> Tensor:
        return torch.mm(dy, self._weight) if dx is None else torch.addmm(dx, dy, self._weight, out=dx)


class LowRank:
    """A projection with LoRA adapters: y += scale * (x A^T) B^T for each, in the adapter's own dtype.

    Args:
        base: the adapted projection.
        adapters: (A, B, scale) with A (r, in_features) and B (out_features, r).

    Source: LoRA (arXiv 2106.09685).
    """

    def __init__(self, base: Projection, adapters: list[tuple[Tensor, Tensor, float]]) -> None:
        self.out_features = base.out_features
        self._base, self._adapters = base, adapters

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        y = self._base(x, out)
        for down, up, scale in self._adapters:
            y.add_((x.to(down.dtype) @ down.t()) @ up.t(), alpha=scale)
        return y

    def pull_back(self, dy: Tensor, dx: Tensor | None = None) -> Tensor:
        dx = self._base.pull_back(dy, dx)
        for down, up, scale in self._adapters:
            dx.add_((dy.to(up.dtype) @ up) @ down, alpha=scale)
        return dx


class Float8:
    """A linear layer with weights and inputs rounded to float8 e4m3, one scale per row, products summed in float32.

    Holds the weight twice, in one orientation per pass: together the bytes of one bfloat16 copy.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.out_features = linear.out_features
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._weight, self._scale = _to_float8(linear.weight.detach())
        self._transposed, self._transposed_scale = _to_float8(linear.weight.detach().t().contiguous())

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        y = _float8_product(x, self._weight, self._scale)
        if self._bias is not None:
            y += self._bias
        return y if out is None else out.copy_(y)

    def pull_back(self, dy: Tensor, dx: Tensor | None = None) -> Tensor:
        d = _float8_product(dy, self._transposed, self._transposed_scale)
        return d if dx is None else dx.add_(d)


def projection(module: nn.Module, weights: Weights = "model") -> Projection:
    """The projection that a linear layer, plain or with LoRA adapters, computes.

    Args:
        module: one for which :func:`why_not_a_projection` returns None.
        weights: "float8" rounds the layer's own weight; adapters stay as they are.
    """
    if isinstance(module, nn.Linear):
        return Dense(module) if weights == "model" else Float8(module)
    lora: Any = module
    base = projection(lora.base_layer, weights)
    # Merged adapters are in the base weight already.
    names = [] if lora.disable_adapters or lora.merged else [n for n in lora.active_adapters if n in lora.lora_A]
    return LowRank(
        base, [(lora.lora_A[n].weight.detach(), lora.lora_B[n].weight.detach(), lora.scaling[n]) for n in names]
    )


def why_not_a_projection(module: nn.Module) -> str | None:
    """None if :func:`projection` computes what the module computes, else what it is."""
    if type(module) is nn.Linear:
        return None
    # An adapted model has imported peft; nobody else needs it.
    layers: Any = sys.modules.get("peft.tuners.lora.layer")
    if layers is None or type(module) is not layers.Linear:
        return f"a {type(module).__name__}"
    adapters: Any = module
    if type(adapters.base_layer) is not nn.Linear:
        return f"a LoRA adapter of a {type(adapters.base_layer).__name__}"
    if adapters.lora_variant or adapters.fan_in_fan_out or any(adapters.lora_bias.values()):
        return "a variant of LoRA"
    return None


def _to_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (rows, n) in e4m3 and the float32 scales (rows, 1) that bring it back."""
    scale = (x.abs().amax(1, keepdim=True).float() / _FLOAT8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def _float8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    rows, row_scale = _to_float8(x)
    # Before 2.13 torch's CPU product knew one scale per matrix only.
    if x.device.type == "cpu" and torch.__version__ < "2.13":
        return (rows.float() @ weight.t().float() * row_scale * scale.t()).to(x.dtype)
    return scaled_mm(
        rows,
        weight.t(),
        row_scale,
        ScalingType.RowWise,
        scale.t().contiguous(),
        ScalingType.RowWise,
        output_dtype=x.dtype,
    )


class Geometry(NamedTuple):
    """What the layers of a decoder have in common.

    Attributes:
        head_dim: of the attention; sm_scale: factor of its scores; eps: of the norms.
        cos, sin: (R, 1, head_dim), the rotary embedding of every row, as :func:`rotate` takes it.
        block: rows that the row-wise parts work on at a time.
        pointwise: norm, rotary embedding and SwiGLU for the device.
    """

    head_dim: int
    sm_scale: float
    eps: float
    cos: Tensor
    sin: Tensor
    block: int
    pointwise: Pointwise


class HeadProjection:
    """rotate(norm(x W^T + b)), the path of q or k into the attention; without norm and rotation, that of v.

    Args:
        linear: the projection; norm: weight of a norm over each head (Qwen3), or None.
        rows: how many there are; index: which of the geometry's rows they are, None: all, in order.
        like: a tensor of the right dtype and device.
        rotary: whether the rotary embedding is applied.
    """

    def __init__(
        self,
        linear: Projection,
        norm: Tensor | None,
        geometry: Geometry,
        rows: int,
        like: Tensor,
        *,
        rotary: bool,
        index: Tensor | None = None,
    ) -> None:
        self._linear, self._norm, self._geometry, self._rotary = linear, norm, geometry, rotary
        self._cos, self._sin = (x if index is None else x[index] for x in (geometry.cos, geometry.sin))
        self.out = like.new_empty(rows, linear.out_features // geometry.head_dim, geometry.head_dim)
        # Kept for the backward of the norm only.
        self._raw = None if norm is None else torch.empty_like(self.out)

    @property
    def kept(self) -> list[Tensor]:
        """The buffers."""
        return [self.out] if self._raw is None else [self.out, self._raw]

    def forward(self, x: Tensor, rows: slice) -> None:
        """Fill ``out[rows]`` from x (rows, hidden)."""
        ops, out = self._geometry.pointwise, self.out[rows]
        if self._norm is None and not self._rotary:
            self._linear(x, out.flatten(1))
            return
        y = self._linear(x).view(out.shape)
        if self._norm is not None and self._raw is not None:
            self._raw[rows] = y
            y, _ = ops.rms_norm(y, self._norm, self._geometry.eps)
        out.copy_(ops.rotate(y, self._cos[rows], self._sin[rows]) if self._rotary else y)

    def backward(self, dy: Tensor, rows: slice, dx: Tensor | None) -> Tensor:
        """The gradient of x given ``dy`` of all rows, added to ``dx`` where there is one."""
        ops, dy = self._geometry.pointwise, dy[rows]
        if self._rotary:
            dy = ops.rotate(dy, self._cos[rows], -self._sin[rows])
        if self._norm is not None and self._raw is not None:
            raw = self._raw[rows]
            _, rstd = ops.rms_norm(raw, self._norm, self._geometry.eps)
            dy = ops.rms_norm_backward(dy, raw, self._norm, rstd)
        return self._linear.pull_back(dy.reshape(len(dy), -1), dx)


class FrozenLayer:
    """Pre-norm attention and gated MLP with weights that get no gradient.

    For the backward it keeps the input and the middle of the residual stream, q, k, v, o, lse, gate and up; nothing of
    the linear layers, because a frozen one needs only its weight.

    Args:
        module: a Llama, Mistral, Qwen2 or Qwen3 decoder layer.
        geometry: see :class:`Geometry`.
        x: (R, hidden), the buffer that holds the input whenever the layer runs.
        queries: (Q,) int64, the rows that go on after the attention; None: all. In the last layer only those that
            predict a loss token do, while every row still gives keys and values.
        constant_input: the input does not depend on the bias (the first layer): q, k and v are computed once and the
            backward ends at the bias.
        plan: layout of query rows and keys; prefix: the prompts' keys and values in this layer.
        window: of the attention, or None.
        weights: see :class:`atmanrl.MaskConfig`.
    """

    def __init__(
        self,
        module: Any,
        geometry: Geometry,
        x: Tensor,
        *,
        queries: Tensor | None,
        constant_input: bool,
        plan: AttentionPlan,
        prefix: SharedPrefix,
        window: int | None,
        weights: Weights,
    ) -> None:
        attention, mlp = module.self_attn, module.mlp
        self._o_proj, self._gate_proj, self._up_proj, self._down_proj = (
            projection(part, weights) for part in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )
        self._norm_in, self._norm_mid = module.input_layernorm.weight, module.post_attention_layernorm.weight
        self._geometry, self._queries, self._constant_input = geometry, queries, constant_input
        self._plan, self._prefix, self._window = plan, prefix, window
        self._projected = False

        rows, hidden = x.shape
        n_queries = rows if queries is None else len(queries)
        q_norm, k_norm = (getattr(getattr(attention, name, None), "weight", None) for name in ("q_norm", "k_norm"))
        q_proj, k_proj, v_proj = (
            projection(part, weights) for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        self._q = HeadProjection(q_proj, q_norm, geometry, n_queries, x, rotary=True, index=queries)
        self._k = HeadProjection(k_proj, k_norm, geometry, rows, x, rotary=True)
        self._v = HeadProjection(v_proj, None, geometry, rows, x, rotary=False)
        self.x = x
        self.out, self._middle = (x.new_empty(n_queries, hidden) for _ in range(2))
        self._gate, self._up = (x.new_empty(n_queries, self._gate_proj.out_features) for _ in range(2))
        self._rstd_in = x.new_empty((rows, 1), dtype=torch.float32)
        self._rstd_mid = x.new_empty((n_queries, 1), dtype=torch.float32)
        self._o: Tensor | None = None
        self._leaves: tuple[Tensor, ...] = ()

    @property
    def kept_bytes(self) -> int:
        """Bytes that this layer keeps for its backward: its buffers, the attention's output and its logsumexp."""
        buffers = [self.out, self._middle, self._gate, self._up, self._rstd_in, self._rstd_mid]
        for heads in (self._q, self._k, self._v):
            buffers += heads.kept
        n_queries, heads_q, _ = self._q.out.shape
        return sum(buffer.nbytes for buffer in buffers) + self._q.out.nbytes + 4 * n_queries * heads_q

    def forward(self, key_bias: Tensor, *, keep: bool) -> None:
        """Fill ``out`` (Q, hidden) from ``x`` under ``key_bias`` (R,); with ``keep`` a backward may follow."""
        if not (self._constant_input and self._projected):
            self._project()
            self._projected = True
        o = self._attend(key_bias, keep=keep).flatten(1)
        x = self.x if self._queries is None else self.x[self._queries]
        ops = self._geometry.pointwise
        for rows in self._blocks(len(self.out)):
            middle, gate, up = self._middle[rows], self._gate[rows], self._up[rows]
            torch.add(x[rows], self._o_proj(o[rows]), out=middle)
            normed, self._rstd_mid[rows] = ops.rms_norm(middle, self._norm_mid, self._geometry.eps)
            self._gate_proj(normed, gate)
            self._up_proj(normed, up)
            torch.add(middle, self._down_proj(ops.swiglu(gate, up)), out=self.out[rows])

    def backward(self, d_out: Tensor, d_x: Tensor | None) -> Tensor:
        """Pull the gradient of ``out`` back to the input and the bias.

        Args:
            d_out: (Q, hidden), overwritten.
            d_x: (R, hidden), receives the gradient of ``x``; the same tensor as ``d_out`` where all rows are queries;
                None where the input is constant.

        Returns:
            the gradient of the bias from this layer, (R,).
        """
        do = torch.empty_like(self._q.out)
        for rows in self._blocks(len(d_out)):
            # From here on d_out holds the gradient of the middle of the residual stream.
            d_out[rows] += self._mlp_backward(d_out[rows], rows)
            do[rows] = self._o_proj.pull_back(d_out[rows]).view(do[rows].shape)
        assert self._o is not None, "forward(keep=True) comes first"
        *d_qkv, d_bias = torch.autograd.grad(self._o, self._leaves, do)
        self._o, self._leaves = None, ()
        if d_x is not None:
            self._inputs_backward(d_qkv, d_out, d_x)
        return d_bias

    def _project(self) -> None:
        ops, eps = self._geometry.pointwise, self._geometry.eps
        for rows in self._blocks(len(self.x)):
            normed, self._rstd_in[rows] = ops.rms_norm(self.x[rows], self._norm_in, eps)
            self._k.forward(normed, rows)
            self._v.forward(normed, rows)
            if self._queries is None:
                self._q.forward(normed, rows)
        if self._queries is not None:
            for rows in self._blocks(len(self._queries)):
                self._q.forward(ops.rms_norm(self.x[self._queries[rows]], self._norm_in, eps)[0], rows)

    def _attend(self, key_bias: Tensor, *, keep: bool) -> Tensor:
        # A graph of this one operation: its backward is called where this layer's own backward needs it.
        with torch.set_grad_enabled(keep):
            needs_qkv = keep and not self._constant_input
            q, k, v = (x.out.detach().requires_grad_(needs_qkv) for x in (self._q, self._k, self._v))
            bias = key_bias.detach().requires_grad_(keep)
            o = attention_varlen(
                q,
                k,
                v,
                bias,
                plan=self._plan,
                prefix=self._prefix,
                sm_scale=self._geometry.sm_scale,
                window=self._window,
            )
        if keep:
            self._o, self._leaves = o, (q, k, v, bias) if needs_qkv else (bias,)
        return o.detach()

    def _mlp_backward(self, d_out: Tensor, rows: slice) -> Tensor:
        ops = self._geometry.pointwise
        d_gate, d_up = ops.swiglu_backward(self._down_proj.pull_back(d_out), self._gate[rows], self._up[rows])
        d_normed = self._up_proj.pull_back(d_up, self._gate_proj.pull_back(d_gate))
        return ops.rms_norm_backward(d_normed, self._middle[rows], self._norm_mid, self._rstd_mid[rows])

    def _inputs_backward(self, d_qkv: list[Tensor], d_out: Tensor, d_x: Tensor) -> None:
        dq, dk, dv = d_qkv
        norm_backward = self._geometry.pointwise.rms_norm_backward
        for rows in self._blocks(len(self.x)):
            d_normed = self._v.backward(dv, rows, self._k.backward(dk, rows, None))
            if self._queries is None:
                d_normed = self._q.backward(dq, rows, d_normed)
            d_rows = norm_backward(d_normed, self.x[rows], self._norm_in, self._rstd_in[rows])
            d_x[rows] = d_rows if self._queries is not None else d_out[rows] + d_rows
        if self._queries is not None:
            for rows in self._blocks(len(self._queries)):
                here = self._queries[rows]
                d_normed = self._q.backward(dq, rows, None)
                d_out[rows] += norm_backward(d_normed, self.x[here], self._norm_in, self._rstd_in[here])
            d_x.index_add_(0, self._queries, d_out)

    def _blocks(self, n: int) -> Iterator[slice]:
        return (slice(start, min(start + self._geometry.block, n)) for start in range(0, n, self._geometry.block))
