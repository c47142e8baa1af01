"""The public functions: validate, fill in defaults, call the operator."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, overload

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from atman_kernels import ops
from atman_kernels.plan import PREFIX_LENGTH, PREFIX_START, AttentionPlan, SharedPrefix, dense_plan
from atman_kernels.problem import NO_WINDOW

MAX_HEAD_DIM = 256
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Plain globals: torch.compile guards on them, which it cannot do for context variables.
_forced_backend = ""
_checking_values = False


@contextmanager
def backend(name: Literal["triton", "cpu", "reference"], *, deterministic: bool = True) -> Iterator[None]:
    """Force one implementation for the calls inside the block, and for their backward wherever that runs.

    Process-wide, like ``torch.nn.attention.sdpa_kernel``; blocks nest.

    Args:
        name: "triton" (on CPU tensors only under TRITON_INTERPRET=1), "cpu" (the C++ kernel) or "reference".
        deterministic: False lets "triton" use a backward of five matrix products instead of seven, whose dq is added up
            in fp32 in an order that varies from run to run (Hopper and later); the others are always deterministic.
            ``torch.use_deterministic_algorithms(True)`` overrules it.

    Raises:
        ValueError: for any other name, or a backend that has no other backward.
    """
    if name not in ops.BACKENDS[1:]:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(map(repr, ops.BACKENDS[1:]))}")
    if not deterministic and name != "triton":
        raise ValueError(f'only "triton" has a backward that is not deterministic, not {name!r}')
    global _forced_backend
    before, _forced_backend = _forced_backend, name if deterministic else ops.TRITON_FUSED
    try:
        yield
    finally:
        _forced_backend = before


@contextmanager
def debug_checks() -> Iterator[None]:
    """Check the values of GPU tensors too (NaN, +inf, monotone offsets) inside the block; each check synchronises."""
    global _checking_values
    before, _checking_values = _checking_values, True
    try:
        yield
    finally:
        _checking_values = before


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None = None,
    *,
    causal: bool = True,
    sm_scale: float | None = None,
    window: int | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None = None,
    *,
    causal: bool = True,
    sm_scale: float | None = None,
    window: int | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None = None,
    *,
    causal: bool = True,
    sm_scale: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """o = softmax(sm_scale q k^T + key_bias) v for a batch of equally long sequences.

    Args:
        q: queries, (B, Tq, Hq, D), float32, float16 or bfloat16 (float64: computed by the reference); D <= 256.
        k, v: keys and values, (B, Tk, Hkv, D), same dtype and device; Hq a multiple of Hkv.
        key_bias: (B, Tk) float32, added to the scaled scores of a key for all heads and rows, in natural-log units:
            positive raises attention to the key, -inf removes it. None: zero. Its gradient is
            sum over heads and rows of p (dp - delta). Remove keys by -inf, not by -1e9: gradients recompute p from lse,
            where all keys of a row have biases of magnitude b, its rounding, up to b / 2^24, is a relative error of the
            row's gradients. On a GPU, finite numbers beyond 2^24 are for keys beside others only: a row whose largest
            score they are gets no right result.
        causal: a row sees keys up to its own position; Tq != Tk aligns the edge bottom-right.
        sm_scale: default 1 / sqrt(D).
        window: a row sees only the ``window`` nearest keys including its own (needs ``causal``).
        return_lse: also return the logsumexp of the scores.

    Returns:
        o (B, Tq, Hq, D) in the dtype of q; with ``return_lse`` also lse (B, Hq, Tq) float32, natural log,
        differentiable. A row that sees no key gives o = 0, lse = -inf and zero gradients. Computed in the dtype of q
        also under autocast. Differentiable once and in reverse mode; torch.func has no transforms of it.

    Raises:
        NotImplementedError: operands with forward-mode tangents; second derivatives, when they are taken.
        ValueError: wrong rank, shape, dtype or device; Hq not divisible by Hkv; D above 256; NaN or +inf in key_bias,
            or finite numbers beyond 2^24 where the Triton kernels compute (on CPU tensors, and on GPU tensors inside
            :func:`debug_checks`).

    Source: AtManRL (arXiv 2604.16158), the mask H^AtMan held as one number per key column.
    """
    _check_operands(q, k, v, key_bias, rank=4)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"q has batch size {q.shape[0]}, k and v have {k.shape[0]}")
    plan = dense_plan(q.shape[0], q.shape[1], k.shape[1], q.device)
    o, lse = _call(q, k, v, key_bias, None, plan, causal=causal, sm_scale=sm_scale, window=window)
    return (o, lse) if return_lse else o


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor | AttentionPlan | None = None,
    cu_seqlens_k: Tensor | None = None,
    plan: AttentionPlan | None = None,
    prefix: SharedPrefix | None = None,
    causal: bool = True,
    sm_scale: float | None = None,
    window: int | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor | AttentionPlan | None = None,
    cu_seqlens_k: Tensor | None = None,
    plan: AttentionPlan | None = None,
    prefix: SharedPrefix | None = None,
    causal: bool = True,
    sm_scale: float | None = None,
    window: int | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor | AttentionPlan | None = None,
    cu_seqlens_k: Tensor | None = None,
    plan: AttentionPlan | None = None,
    prefix: SharedPrefix | None = None,
    causal: bool = True,
    sm_scale: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """o = softmax(sm_scale q k^T + key_bias) v for sequences of any lengths, packed one after another.

    Args:
        q: packed queries, (Tq_total, Hq, D); dtypes and D as in :func:`attention`.
        k, v: packed keys and values, (Tk_total, Hkv, D).
        key_bias: (Tk_total,) float32 or None; see :func:`attention`.
        cu_seqlens_q: (n_seq + 1,) integers, 0 first, Tq_total last: where each sequence starts. An
            :class:`AttentionPlan` may stand here as well.
        cu_seqlens_k: the same for keys; default: ``cu_seqlens_q``.
        plan: an :class:`AttentionPlan` in place of the cumulative lengths: nothing is validated or computed again.
        prefix: :class:`SharedPrefix`, keys outside the batch that sequence i sees unbiased, directly before its own;
            they receive no gradient. Its ranges may be omitted where the plan has them.
        causal, sm_scale, window, return_lse: as in :func:`attention`, per sequence; positions count through the
            prefix.

    Returns:
        o (Tq_total, Hq, D); with ``return_lse`` also lse (Hq, Tq_total) float32, natural log, differentiable.

    Raises:
        ValueError: as :func:`attention`; cumulative lengths that decrease or do not end at the total; a prefix range
            outside its keys; prefix keys that require a gradient. Values of GPU tensors are checked inside
            :func:`debug_checks` only.
    """
    plan = check_layout(q, k, v, key_bias, cu_seqlens_q, cu_seqlens_k, plan, prefix, "attention_varlen")
    bias = None if key_bias is None else key_bias[None]
    o, lse = _call(q[None], k[None], v[None], bias, prefix, plan, causal=causal, sm_scale=sm_scale, window=window)
    # Not o[0]: the backward of an index fills and copies a tensor of zeros.
    return (o.squeeze(0), lse.squeeze(0)) if return_lse else o.squeeze(0)


def attention_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    *,
    plan: AttentionPlan,
    sm_scale: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal :func:`attention` over any part of each batch row: padded batches and cache slots, without copies.

    Args:
        q, k, v, key_bias, sm_scale, window: as in :func:`attention`.
        plan: from :meth:`AttentionPlan.from_rows`; rows and keys outside its sequences give zeros (lse: -inf).

    Returns:
        o (B, Tq, Hq, D) and lse (B, Hq, Tq).

    Raises:
        ValueError: as :func:`attention`, or if the plan was made for other shapes or another device.
    """
    _check_operands(q, k, v, key_bias, rank=4)
    _check_plan(plan, q.shape[0], q.shape[1], k.shape[1], q.device)
    return _call(q, k, v, key_bias, None, plan, causal=True, sm_scale=sm_scale, window=window)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    prefix: SharedPrefix | None,
    plan: AttentionPlan,
    *,
    causal: bool,
    sm_scale: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    if window is not None:
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if not causal:
            raise ValueError("window needs causal=True: it counts keys back from a row's own position")
    _refuse_tangents(q, k, v, key_bias)
    if key_bias is not None and checks_values(key_bias):
        _check_bias_values(key_bias)
        check_bias_range(key_bias, q)
    # Kernels read D with unit stride; copied here, a prefix is copied once for forward and backward.
    prefix_k, prefix_v = (None, None) if prefix is None else (ops.unit_stride(prefix.k), ops.unit_stride(prefix.v))
    o, lse = ops.attention_forward(
        q, k, v, key_bias, prefix_k, prefix_v, plan.sequences, plan.tiles_q, plan.tiles_k, scale_of(q, sm_scale),
        causal, bounded(window), plan.covers, _forced_backend,
    )  # fmt: skip
    return o, lse


def _refuse_tangents(*operands: Tensor | None) -> None:
    # An operator registered with torch.library answers them with zeros.
    if torch.compiler.is_compiling():
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in operands):
        raise NotImplementedError("atman_kernels attention has no forward-mode derivative; use backward()")


def check_layout(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    cu_seqlens_q: Tensor | AttentionPlan | None,
    cu_seqlens_k: Tensor | None,
    plan: AttentionPlan | None,
    prefix: SharedPrefix | None,
    caller: str,
) -> AttentionPlan:
    """The plan of a packed call, once its operands were checked against it; arguments as in :func:`attention_varlen`.

    Raises:
        ValueError: as :func:`attention_varlen`; ``caller`` is the function that the message names.
    """
    _check_operands(q, k, v, key_bias, rank=3)
    if isinstance(cu_seqlens_q, AttentionPlan):
        if plan is not None:
            raise ValueError("a plan was given twice: as cu_seqlens_q and as plan")
        cu_seqlens_q, plan = None, cu_seqlens_q
    if prefix is not None:
        _check_prefix(prefix, k)
    if plan is None:
        if cu_seqlens_q is None:
            raise ValueError(f"{caller} needs cu_seqlens_q or plan")
        plan = _plan_of_cu_seqlens(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0], prefix, q.device)
    else:
        if cu_seqlens_q is not None or cu_seqlens_k is not None:
            raise ValueError("give a plan or cu_seqlens, not both")
        _check_plan(plan, 1, q.shape[0], k.shape[0], q.device)
        if prefix is not None and prefix.start is not None and checks_values(plan.sequences):
            _check_ranges(plan, prefix)
    if prefix is not None and plan.prefix_end is not None and plan.prefix_end > prefix.k.shape[0]:
        raise ValueError(f"a prefix range ends at key {plan.prefix_end}, but the prefix has {prefix.k.shape[0]} keys")
    if prefix is None and plan.prefix_end != 0:
        raise ValueError("the plan has prefix ranges, but no prefix was given")
    return plan


def forced_backend() -> str:
    """What :func:`backend` forces at the moment; "" where the device decides."""
    return _forced_backend


def scale_of(q: Tensor, sm_scale: float | None) -> float:
    """The factor of the scores; by default 1 / sqrt(D)."""
    return 1.0 / math.sqrt(q.shape[-1]) if sm_scale is None else float(sm_scale)


def bounded(distance: int | None) -> int:
    """A window or other distance between positions as the operators take it: at most NO_WINDOW, which is none."""
    return NO_WINDOW if distance is None else min(distance, NO_WINDOW)


def checks_values(tensor: Tensor) -> bool:
    """Whether values of this tensor are checked: always on the CPU, inside debug_checks() elsewhere, never traced."""
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor):
        return False
    return tensor.device.type == "cpu" or _checking_values


def check_bias_range(key_bias: Tensor, q: Tensor) -> None:
    """Raise where the kernels that will compute do not give the softmax's result for so large a finite bias.

    Raises:
        ValueError: with the first such value.
    """
    largest = ops.largest_bias(_forced_backend, q)
    if largest == math.inf:
        return
    wrong = key_bias.detach().isfinite() & (key_bias.detach().abs() > largest)
    if bool(wrong.any()):
        where = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"the Triton kernels compute with finite key_bias up to {largest:.0f}, got"
            f" {float(key_bias.detach()[where])} at {where} ({int(wrong.sum())} such values);"
            f' remove keys by -inf, or use backend("reference")'
        )


def _check_operands(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, *, rank: int) -> None:
    layout = "(B, T, H, D)" if rank == 4 else "(T_total, H, D)"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != rank:
            raise ValueError(f"{name} must have {rank} dimensions {layout}, got shape {tuple(x.shape)}")
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name} has dtype {x.dtype}; supported: {', '.join(map(str, _DTYPES))}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}, q has {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}")
    if k.shape != v.shape:
        raise ValueError(f"k and v differ in shape: {tuple(k.shape)} and {tuple(v.shape)}")
    heads_q, heads_kv, head_dim = q.shape[-2], k.shape[-2], q.shape[-1]
    if k.shape[-1] != head_dim:
        raise ValueError(f"q has head_dim {head_dim}, k and v have {k.shape[-1]}")
    if heads_kv == 0 or heads_q == 0 or heads_q % heads_kv:
        raise ValueError(f"the {heads_q} query heads are not a positive multiple of the {heads_kv} key/value heads")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim {head_dim} is outside 1..{MAX_HEAD_DIM}")
    if key_bias is None:
        return
    expected = k.shape[:-2]
    if key_bias.shape != expected:
        raise ValueError(f"key_bias must have one number per key, shape {tuple(expected)}, got {tuple(key_bias.shape)}")
    if key_bias.dtype != torch.float32 and not (key_bias.dtype == q.dtype == torch.float64):
        raise ValueError(f"key_bias must be float32, got {key_bias.dtype}")
    if key_bias.device != q.device:
        raise ValueError(f"key_bias is on {key_bias.device}, q on {q.device}")


def _check_bias_values(key_bias: Tensor) -> None:
    wrong = key_bias.detach().isnan() | (key_bias.detach() == torch.inf)
    if bool(wrong.any()):
        where = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"key_bias must be finite or -inf, got {float(key_bias.detach()[where])} at {where}"
            f" ({int(wrong.sum())} such values)"
        )


def _check_prefix(prefix: SharedPrefix, k: Tensor) -> None:
    for name, x in (("prefix.k", prefix.k), ("prefix.v", prefix.v)):
        if x.dim() != 3 or x.shape[1:] != k.shape[1:]:
            raise ValueError(
                f"{name} must have shape (P, {k.shape[1]}, {k.shape[2]}) as the packed keys, got {tuple(x.shape)}"
            )
        if x.dtype != k.dtype or x.device != k.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, k is {k.dtype} on {k.device}")
        if x.requires_grad:
            raise ValueError(f"{name} requires a gradient, but a shared prefix gets none: detach it")
    if prefix.k.shape != prefix.v.shape:
        raise ValueError(f"prefix.k and prefix.v differ: {tuple(prefix.k.shape)} and {tuple(prefix.v.shape)}")
    if (prefix.start is None) != (prefix.length is None):
        raise ValueError("prefix.start and prefix.length are given together, or neither")


def _plan_of_cu_seqlens(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    total_q: int,
    total_k: int,
    prefix: SharedPrefix | None,
    device: torch.device,
) -> AttentionPlan:
    if prefix is not None and prefix.start is None:
        raise ValueError("prefix.start and prefix.length are needed where no plan states the ranges")
    offsets = {"cu_seqlens_q": (cu_seqlens_q, total_q), "cu_seqlens_k": (cu_seqlens_k, total_k)}
    if cu_seqlens_k is None:
        offsets["cu_seqlens_k"] = (cu_seqlens_q, total_k)
    for name, (cu, _) in offsets.items():
        if not isinstance(cu, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(cu).__name__}")
        if cu.dim() != 1 or cu.shape[0] < 1 or cu.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be (n_seq + 1,) int32 or int64, got {tuple(cu.shape)} {cu.dtype}")
    cu_q, cu_k = cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    if cu_q.shape != cu_k.shape:
        raise ValueError(f"cu_seqlens_q describes {cu_q.shape[0] - 1} sequences, cu_seqlens_k {cu_k.shape[0] - 1}")
    start, length = (None, None) if prefix is None else (_as_tensor(prefix.start), _as_tensor(prefix.length))
    for name, ranges in (("prefix.start", start), ("prefix.length", length)):
        if ranges is not None and ranges.shape != (cu_q.shape[0] - 1,):
            raise ValueError(f"{name} must have one entry per sequence, {cu_q.shape[0] - 1}, got {tuple(ranges.shape)}")
    if not checks_values(cu_q):
        return AttentionPlan.from_cu_seqlens(cu_q, cu_k, start, length, total_q=total_q, total_k=total_k, device=device)
    for name, (cu, total) in offsets.items():
        assert cu is not None
        _check_offsets(name, cu.tolist(), total)
    return AttentionPlan(cu_q.cpu().diff(), cu_k.cpu().diff(), start, length, device=device)


def _as_tensor(values: Tensor | Sequence[int] | None) -> Tensor | None:
    return None if values is None else torch.as_tensor(values)


def _check_offsets(name: str, offsets: list[int], total: int) -> None:
    if offsets[0] != 0:
        raise ValueError(f"{name} must start at 0, got {offsets[0]}")
    for i, (left, right) in enumerate(itertools.pairwise(offsets)):
        if right < left:
            raise ValueError(f"{name} decreases from {left} to {right} at sequence {i}")
    if offsets[-1] != total:
        raise ValueError(f"{name} ends at {offsets[-1]}, but the packed tensor has {total} rows")


def _check_plan(plan: AttentionPlan, batch: int, rows: int, keys: int, device: torch.device) -> None:
    if plan.batch != batch:
        raise ValueError(f"the plan describes {plan.batch} batch rows, the tensors have {batch}")
    if (plan.total_q, plan.total_k) != (rows, keys):
        raise ValueError(
            f"the plan describes {plan.total_q} rows and {plan.total_k} keys, the tensors have {rows} and {keys}"
        )
    if plan.device != device:
        raise ValueError(f"the plan lies on {plan.device}, q on {device}")


def _check_ranges(plan: AttentionPlan, prefix: SharedPrefix) -> None:
    for name, stated, column in (
        ("prefix.start", prefix.start, PREFIX_START),
        ("prefix.length", prefix.length, PREFIX_LENGTH),
    ):
        planned = plan.sequences[:, column].tolist()
        if torch.as_tensor(stated).tolist() != planned:
            raise ValueError(f"{name} differs from the plan: {torch.as_tensor(stated).tolist()} and {planned}")
