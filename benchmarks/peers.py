"""What a user could run instead of our kernels, each fed the same packed problem and giving the same gradients.

A peer is a function from a case and its inputs to a closure that computes the packed output (T, Hq, D). Work that its
user would do once per batch (masks without a gradient, tracing) happens outside the closure. Peers that know no packed
layout get the sequences padded on the right to the longest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from atman_kernels import attention_varlen, backend
from benchmarks.cases import AttentionCase, Inputs

Attention = Callable[[], Tensor]


class UnavailableError(Exception):
    """The peer cannot run this case here; the message says why."""


def atman(case: AttentionCase, x: Inputs) -> Attention:
    """Our kernels with the bias."""
    plan = case.plan(str(x.q.device))
    return lambda: attention_varlen(x.q, x.k, x.v, x.key_bias, plan=plan, prefix=x.prefix)


def atman_fused(case: AttentionCase, x: Inputs) -> Attention:
    """Our kernels with the bias and the fused backward, which is not deterministic."""
    plan = case.plan(str(x.q.device))

    def run() -> Tensor:
        with backend("triton", deterministic=False):
            return attention_varlen(x.q, x.k, x.v, x.key_bias, plan=plan, prefix=x.prefix)

    return run


def atman_unbiased(case: AttentionCase, x: Inputs) -> Attention:
    """Our kernels without the bias: what it and its gradient cost."""
    plan = case.plan(str(x.q.device))
    return lambda: attention_varlen(x.q, x.k, x.v, plan=plan, prefix=x.prefix)


def eager(case: AttentionCase, x: Inputs) -> Attention:
    """softmax over materialised scores and a dense additive mask, as in a Hugging Face eager model."""
    to_batch, from_batch, hidden = _padding(case, x)

    def run() -> Tensor:
        q, k, v, bias = to_batch(x)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        scores = q @ k.transpose(2, 3) * case.sm_scale + (hidden + bias[:, None, None, :].to(q.dtype))
        return from_batch(scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v)

    return run


def sdpa_math(case: AttentionCase, x: Inputs) -> Attention:
    """SDPA's math path with a trainable dense mask."""
    return _sdpa_with_mask(case, x, SDPBackend.MATH)


def sdpa_efficient(case: AttentionCase, x: Inputs) -> Attention:
    """SDPA's memory-efficient path with a trainable dense mask."""
    return _sdpa_with_mask(case, x, SDPBackend.EFFICIENT_ATTENTION)


def flex(case: AttentionCase, x: Inputs) -> Attention:
    """FlexAttention, compiled, with the bias as a captured buffer that requires a gradient; sequences stay packed."""
    n_prefix, n_rows, device = case.prefix, x.q.shape[0], x.q.device
    document = torch.repeat_interleave(torch.tensor(case.lengths, device=device))
    if n_prefix:
        raise UnavailableError("a prefix shared between packed documents has no simple FlexAttention form")

    def visible(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (document[row] == document[key]) & (key <= row)

    def add_bias(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return score + x.key_bias[key]

    blocks = create_block_mask(visible, None, None, n_rows, n_rows, device=str(device), _compile=device.type == "cuda")
    compute = _compiled_flex() if device.type == "cuda" else flex_attention

    def run() -> Tensor:
        q, k, v = (t.transpose(0, 1)[None] for t in (x.q, x.k, x.v))
        o = compute(q, k, v, score_mod=add_bias, block_mask=blocks, scale=case.sm_scale, enable_gqa=True)
        return o[0].transpose(0, 1)

    return run


def sdpa_flash_extra_column(case: AttentionCase, x: Inputs) -> Attention:
    """SDPA flash with the bias, rounded to 16 bits, as one more column of k (and a column of ones in q)."""
    return _sdpa_causal(case, x, SDPBackend.FLASH_ATTENTION, extra_column=True)


def sdpa_cudnn_extra_column(case: AttentionCase, x: Inputs) -> Attention:
    """SDPA cuDNN with the bias, rounded to 16 bits, as one more column of k (and a column of ones in q)."""
    return _sdpa_causal(case, x, SDPBackend.CUDNN_ATTENTION, extra_column=True)


def fla(case: AttentionCase, x: Inputs) -> Attention:
    """flash-linear-attention's parallel_attn with the decay g whose cumulative sum is minus the bias."""
    if find_spec("fla") is None:
        raise UnavailableError("fla is not installed")
    if case.prefix:
        raise UnavailableError("parallel_attn has no prefix")
    from fla.ops.attn.parallel import parallel_attn

    starts = torch.tensor([*accumulate(case.lengths, initial=0)], device=x.q.device)
    is_first = torch.zeros_like(x.key_bias).index_fill(0, starts[:-1], 1.0)

    def run() -> Tensor:
        before = x.key_bias.roll(1) * (1 - is_first)
        decay = (before - x.key_bias)[None, :, None].expand(1, -1, case.heads[0])
        return parallel_attn(x.q[None], x.k[None], x.v[None], decay, scale=case.sm_scale, cu_seqlens=starts)[0]

    return run


def flash_attn_extra_column(case: AttentionCase, x: Inputs) -> Attention:
    """flash-attn's varlen kernel with the bias, rounded to 16 bits, as one more column of k."""
    if find_spec("flash_attn") is None:
        raise UnavailableError("flash-attn is not installed")
    if case.prefix:
        raise UnavailableError("keys would have to be copied in front of every sequence")
    from flash_attn import flash_attn_varlen_func

    starts = torch.tensor([*accumulate(case.lengths, initial=0)], device=x.q.device, dtype=torch.int32)
    longest = max(case.lengths)

    def run() -> Tensor:
        q, k, v = _with_extra_column(case, x.q, x.k, x.v, x.key_bias[:, None, None])
        o = flash_attn_varlen_func(
            q, k, v, starts, starts, longest, longest, softmax_scale=case.sm_scale, causal=True
        )  # fmt: skip
        return o[..., : case.head_dim]

    return run


def sdpa_flash_unbiased(case: AttentionCase, x: Inputs) -> Attention:
    """Ceiling: SDPA flash without any bias."""
    return _sdpa_causal(case, x, SDPBackend.FLASH_ATTENTION)


def sdpa_cudnn_unbiased(case: AttentionCase, x: Inputs) -> Attention:
    """Ceiling: SDPA cuDNN without any bias."""
    return _sdpa_causal(case, x, SDPBackend.CUDNN_ATTENTION)


PEERS: dict[str, Callable[[AttentionCase, Inputs], Attention]] = {
    peer.__name__: peer
    for peer in (
        atman,
        atman_fused,
        atman_unbiased,
        sdpa_flash_unbiased,
        sdpa_cudnn_unbiased,
        flex,
        fla,
        sdpa_flash_extra_column,
        sdpa_cudnn_extra_column,
        flash_attn_extra_column,
        sdpa_efficient,
        sdpa_math,
        eager,
    )
}


def inputs_with_gradients(peer: str, x: Inputs) -> list[Tensor]:
    """What gradients of a peer are taken of: the inputs that require one, for those without a bias all but it."""
    return [t for t in x.differentiable if t.requires_grad and not (t is x.key_bias and peer.endswith("unbiased"))]


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    # Beyond the limit an uncompiled FlexAttention would be timed; a full graph makes that an error.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def _padding(
    case: AttentionCase, x: Inputs
) -> tuple[Callable[[Inputs], tuple[Tensor, ...]], Callable[[Tensor], Tensor], Tensor]:
    """Packed -> (q (B, Hq, T, D), k, v (B, Hkv, P + T, D), bias (B, P + T)), the way back for outputs, and the mask.

    The mask (T, P + T) is additive, in the dtype of q: -inf where a row does not see a key.
    """
    lengths, n_prefix, longest = list(case.lengths), case.prefix, max(case.lengths)
    equal = min(lengths) == longest

    def batch(packed: Tensor) -> Tensor:
        return packed.unflatten(0, (-1, longest)) if equal else pad_sequence(packed.split(lengths), batch_first=True)

    def keys(packed: Tensor, prefix: Tensor | None) -> Tensor:
        own = batch(packed)
        if prefix is not None:
            own = torch.cat([prefix.expand(len(lengths), *prefix.shape), own], dim=1)
        return own.transpose(1, 2)

    def to_batch(x: Inputs) -> tuple[Tensor, ...]:
        k, v = keys(x.k, x.prefix and x.prefix.k), keys(x.v, x.prefix and x.prefix.v)
        return batch(x.q).transpose(1, 2), k, v, pad(batch(x.key_bias), (n_prefix, 0))

    inside = (torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]).to(x.q.device)

    def from_batch(o: Tensor) -> Tensor:
        rows = o.transpose(1, 2)
        return rows.flatten(0, 1) if equal else rows[inside]

    seen = torch.ones(longest, n_prefix + longest, dtype=torch.bool, device=x.q.device).tril(n_prefix)
    hidden = torch.zeros_like(seen, dtype=x.q.dtype).masked_fill(~seen, -torch.inf)
    return to_batch, from_batch, hidden


def _sdpa_with_mask(case: AttentionCase, x: Inputs, backend: SDPBackend) -> Attention:
    to_batch, from_batch, hidden = _padding(case, x)

    def run() -> Tensor:
        q, k, v, bias = to_batch(x)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        mask = (hidden + bias[:, None, None, :].to(q.dtype)).expand(-1, q.shape[1], -1, -1)
        with sdpa_kernel(backend):
            return from_batch(scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=case.sm_scale))

    return run


def _sdpa_causal(case: AttentionCase, x: Inputs, backend: SDPBackend, *, extra_column: bool = False) -> Attention:
    to_batch, from_batch, _ = _padding(case, x)
    n_rows, n_keys = max(case.lengths), case.prefix + max(case.lengths)
    # is_causal aligns the edge top-left, which is wrong where a prefix precedes the keys.
    edge = {"attn_mask": causal_lower_right(n_rows, n_keys)} if case.prefix else {"is_causal": True}

    def run() -> Tensor:
        q, k, v, bias = to_batch(x)
        if extra_column:
            q, k, v = _with_extra_column(case, q, k, v, bias[:, None, :, None])
        with sdpa_kernel(backend):
            o = scaled_dot_product_attention(q, k, v, scale=case.sm_scale, enable_gqa=True, **edge)
        return from_batch(o[..., : case.head_dim])

    return run


def _with_extra_column(
    case: AttentionCase, q: Tensor, k: Tensor, v: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """head_dim + 8 (the step that kernels accept): q gets a 1, k gets bias / sm_scale, everything else zeros."""
    column = (bias / case.sm_scale).to(k.dtype).expand(*k.shape[:-1], 1)
    return (
        pad(pad(q, (0, 1), value=1.0), (0, 7)),
        pad(torch.cat([k, column], dim=-1), (0, 7)),
        pad(v, (0, 8)),
    )
