"""Frozen projections y = x W^T + b and their pull-back dx = dy W, which need the weight and nothing of the forward."""

from __future__ import annotations

import sys
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import ScalingType, scaled_mm

from atmanrl.config import Weights

# The largest number of e4m3.
_FLOAT8_MAX = 448.0


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
