"""The operators: schemas, fakes and autograd, written once for all kernels.

``atman_kernels::attention_forward`` and ``::attention_backward`` work on (B, T, H, D) tensors and a sequence table (see
:class:`atman_kernels.plan.AttentionPlan`); a packed batch has B = 1. The dispatcher chooses the kernel by device; a
forced backend travels as an argument, so that the backward, which autograd runs on another thread, uses it too.

Arguments that every kernel takes, in this order:

    q (B, Tq, Hq, D); k, v (B, Tk, Hkv, D)   any strides with a unit stride along D
    key_bias (B, Tk) fp32 or None
    prefix_k, prefix_v (P, Hkv, D) or None
    sequences (n_seq, 7), tiles_q (n, 2), tiles_k (m, 2) int32
    sm_scale; causal; window, NO_WINDOW for none; covers: whether every row and key belongs to a sequence
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from atman_kernels import reference, trust
from atman_kernels.problem import AttentionProblem, Gradients

# Names of the forced backends; "" lets the device decide.
BACKENDS = ("", "triton", "cpu", "reference")
# "triton" with a backward that is faster where memory allows it, and not deterministic.
TRITON_FUSED = "triton_fused"

_OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_bias, Tensor? prefix_k, Tensor? prefix_v, "
    "Tensor sequences, Tensor tiles_q, Tensor tiles_k, "
    "float sm_scale, bool causal, SymInt window, bool covers, str backend"
)
_N_OPERANDS = 14
# The first of them are tensors.
_N_TENSORS = 9

_library = torch.library.Library("atman_kernels", "DEF")
_library.define(f"attention_forward({_OPERANDS}) -> (Tensor o, Tensor lse)", tags=torch.Tag.pt2_compliant_tag)
_library.define(
    f"attention_backward(Tensor do, Tensor? dlse, Tensor o, Tensor lse, {_OPERANDS}, "
    "bool need_dq, bool need_dk, bool need_dv, bool need_dkey_bias) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dkey_bias)",
    tags=torch.Tag.pt2_compliant_tag,
)

attention_forward = torch.ops.atman_kernels.attention_forward.default
attention_backward = torch.ops.atman_kernels.attention_backward.default


def kernels_for(backend: str, q: Tensor, path: str = trust.ATTENTION) -> ModuleType | None:
    """The module that computes for this device and forced backend; None stands for the reference.

    Where the device decides, a path of the GPU's kernels that failed its smoke test is passed over.
    """
    # Only the reference computes in double precision.
    if backend == "reference" or (backend == "" and q.dtype == torch.float64):
        return None
    if backend in ("triton", TRITON_FUSED) or (backend == "" and q.is_cuda):
        from atman_kernels import _triton

        _triton.require_runnable(q.device, q.dtype)
        # Who forces them gets them.
        return None if backend == "" and trust.failed(path, q.device) else _triton
    from atman_kernels import _cpu

    return _cpu if _cpu.supports(q, forced=backend == "cpu") else None


def largest_bias(backend: str, q: Tensor) -> float:
    """The largest magnitude of a finite bias for which the chosen kernels give the softmax's result."""
    kernels = kernels_for(backend, q)
    return math.inf if kernels is None else float(getattr(kernels, "LARGEST_BIAS", math.inf))


def without_autocast(q: Tensor) -> AbstractContextManager[None]:
    """Around the reference: like the kernels, it computes in the dtype of its operands also under autocast."""
    return torch.autocast(q.device.type, enabled=False)


def _problem(operands: tuple[Any, ...]) -> AttentionProblem:
    *problem, _covers, _backend = operands
    return AttentionProblem._make(problem)


def _forward(*operands: Any) -> tuple[Tensor, Tensor]:
    """The operands of the schema, in its order."""
    *_, covers, backend = operands
    x = _problem(operands)
    kernels = kernels_for(backend, x.q)
    if kernels is None:
        with without_autocast(x.q):
            return reference.attention_forward(x)
    x = _laid_out(x)
    o = _allocate(x.q, covers)
    lse = x.q.new_empty((x.q.shape[0], x.q.shape[2], x.q.shape[1]), dtype=torch.float32)
    if not covers:
        lse.fill_(-torch.inf)
    kernels.attention_forward(o, lse, x)
    return o, lse


def _backward(
    do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, *operands_and_needs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operands of the forward, then whether each of dq, dk, dv and dkey_bias is needed."""
    operands, needed = operands_and_needs[:_N_OPERANDS], operands_and_needs[_N_OPERANDS:]
    *_, covers, backend = operands
    x = _problem(operands)
    kernels = kernels_for(backend, x.q)
    if kernels is None:
        with without_autocast(x.q):
            all_four = reference.attention_backward(do, dlse, x)
        found = [g if need else g.new_empty(0) for g, need in zip(all_four, needed, strict=True)]
        return found[0], found[1], found[2], found[3]
    do = unit_stride(do)
    x = _laid_out(x)
    dq, dk, dv = (_allocate(t, covers) if need else None for t, need in zip(x[:3], needed[:3], strict=True))
    dkey_bias = x.k.new_empty(x.k.shape[:2], dtype=torch.float32) if needed[3] else None
    if dkey_bias is not None and not covers:
        dkey_bias.zero_()
    fused = backend == TRITON_FUSED and not _must_be_deterministic()
    variant = {"fused": True} if fused and not (x.q.is_cuda and trust.failed(trust.FUSED, x.q.device)) else {}
    kernels.attention_backward(Gradients(dq, dk, dv, dkey_bias), do, dlse, o, lse, x, **variant)
    absent = x.q.new_empty(0)
    return (
        absent if dq is None else dq,
        absent.clone() if dk is None else dk,
        absent.clone() if dv is None else dv,
        x.q.new_empty(0, dtype=torch.float32) if dkey_bias is None else dkey_bias,
    )


def _must_be_deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def _laid_out(x: AttentionProblem) -> AttentionProblem:
    key_bias = None if x.key_bias is None else unit_stride(x.key_bias)
    return x._replace(q=unit_stride(x.q), k=unit_stride(x.k), v=unit_stride(x.v), key_bias=key_bias)


def unit_stride(x: Tensor) -> Tensor:
    """``x``, or a copy where its last axis is strided."""
    # Not contiguous(): it leaves the strides of empty tensors, and those of an axis of length 1, as they are.
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _allocate(like: Tensor, covers: bool) -> Tensor:
    # Kernels write every row of every sequence, so only rows outside all sequences would be left undefined.
    make = torch.empty if covers else torch.zeros
    return make(like.shape, dtype=like.dtype, device=like.device)


# For every device: the reference computes where no kernel does.
_library.impl("attention_forward", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward, "CompositeExplicitAutograd")


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _forward_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=_lse_dtype(q))
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


def _backward_fake(
    do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_dq, need_dk, need_dv, need_dkey_bias = rest[-4:]
    grads = [
        torch.empty(x.shape if need else (0,), dtype=x.dtype, device=x.device)
        for x, need in ((q, need_dq), (k, need_dk), (v, need_dv))
    ]
    return (
        grads[0],
        grads[1],
        grads[2],
        k.new_empty(k.shape[:2] if need_dkey_bias else (0,), dtype=_lse_dtype(q)),
    )


torch.library.register_fake("atman_kernels::attention_forward", _forward_fake, lib=_library)
torch.library.register_fake("atman_kernels::attention_backward", _backward_fake, lib=_library)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_N_TENSORS], *output)
    ctx.settings = inputs[_N_TENSORS:]
    ctx.set_materialize_grads(False)


def _forward_autograd(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *operands, o, lse = ctx.saved_tensors
    needs = tuple(bool(ctx.needs_input_grad[i]) for i in range(4))
    if do is None:
        do = torch.zeros_like(o)
    grads = attention_backward(do, dlse, o, lse, *operands, *ctx.settings, *needs)
    found = tuple(g if need else None for g, need in zip(grads, needs, strict=True))
    return found + (None,) * (_N_OPERANDS - len(found))


def _backward_autograd(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
    raise NotImplementedError("atman_kernels attention is differentiable once; second derivatives are not implemented")


torch.library.register_autograd(
    "atman_kernels::attention_forward", _forward_autograd, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd("atman_kernels::attention_backward", _backward_autograd, lib=_library)
