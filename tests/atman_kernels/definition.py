"""Attention and its gradients by their definition, and how large the terms are that they sum.

Everything is in float64, sequence by sequence, with the whole score matrix in memory. No code is the package's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tests.atman_kernels.grid import NAMES, Case, Operands


class OneSequence(NamedTuple):
    """q, do (Tq, Hq, D); k, v (P + Tk, Hkv, D) and bias (P + Tk,), the prefix's P keys first; dlse (Hq, Tq) or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    do: Tensor
    dlse: Tensor | None
    n_prefix: int


def sequences(case: Case, x: Operands) -> Iterator[OneSequence]:
    """The sequences of a batch, each with the keys of its prefix."""
    row = column = 0
    for i, n_rows in enumerate(case.lengths):
        n_keys = n_rows if case.lengths_k is None else case.lengths_k[i]
        if case.layout == "packed":
            rows, keys = slice(row, row + n_rows), slice(column, column + n_keys)
            dlse = None if x.dlse is None else x.dlse[:, rows]
        else:
            rows = keys = i
            dlse = None if x.dlse is None else x.dlse[i]
        k, v = x.k[keys], x.v[keys]
        bias = k.new_zeros(n_keys) if x.key_bias is None else x.key_bias[keys]
        n_prefix = 0
        if x.prefix is not None:
            start, n_prefix = x.prefix.start[i], x.prefix.length[i]
            k = torch.cat([x.prefix.k[start : start + n_prefix], k])
            v = torch.cat([x.prefix.v[start : start + n_prefix], v])
            bias = torch.cat([bias.new_zeros(n_prefix), bias])
        yield OneSequence(x.q[rows], k, v, bias, x.do[rows], dlse, n_prefix)
        row, column = row + n_rows, column + n_keys


def weights(s: OneSequence, causal: bool, window: int | None) -> tuple[Tensor, Tensor]:
    """p (Hq, Tq, P + Tk) and lse (Hq, Tq)."""
    n_rows, n_keys = s.q.shape[0], s.k.shape[0]
    position = torch.arange(n_rows)[:, None] + n_keys - n_rows
    column = torch.arange(n_keys)
    seen = (s.bias > -math.inf).expand(n_rows, -1)
    if causal:
        seen = seen & (column <= position)
        seen = seen if window is None else seen & (column > position - window)
    finite = s.bias.where(s.bias > -math.inf, 0)
    scores = torch.einsum("qhd,khd->hqk", s.q, _of_query_heads(s.k, s)) / math.sqrt(s.q.shape[-1]) + finite
    if n_keys == 0:
        return scores, scores.sum(-1) - math.inf
    # Rows without a key: anything finite in place of -inf, so that no NaN enters the gradient.
    scores = scores.masked_fill(~seen & seen.any(-1, keepdim=True), -math.inf)
    # Beside a large score, a logsumexp loses what its own gradient needs.
    highest = scores.detach().amax(-1, keepdim=True)
    lse = highest.squeeze(-1) + (scores - highest).logsumexp(-1)
    return scores.softmax(-1) * seen, lse.where(seen.any(-1), -math.inf)


def by_definition(case: Case, x: Operands) -> dict[str, Tensor]:
    """Outputs, and gradients by autograd, of float64 operands."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v, x.key_bias)]
    x = x._replace(q=leaves[0], k=leaves[1], v=leaves[2], key_bias=leaves[3])
    # Of no sequences: empty, but still functions of the leaves.
    outputs, logs = [x.q.flatten(0, -3)[:0]], [x.q[..., 0].flatten(0, -2)[:0].T]
    for s in sequences(case, x):
        p, lse = weights(s, case.causal, case.window)
        outputs.append(torch.einsum("hqk,khd->qhd", p, _of_query_heads(s.v, s)))
        logs.append(lse)
    if case.layout == "packed":
        o, lse = torch.cat(outputs), torch.cat(logs, dim=-1)
    else:
        o, lse = torch.stack(outputs[1:]), torch.stack(logs[1:])
    loss = (o * x.do).sum()
    if x.dlse is not None:
        loss = loss + (lse.where(lse.isfinite(), 0) * x.dlse).sum()
    wanted = [leaf for leaf in leaves if leaf is not None]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return dict(zip(NAMES, [o.detach(), lse.detach(), *grads], strict=False))


def largest_terms(case: Case, x: Operands) -> dict[str, float]:
    """:func:`terms_of_sequences` of a batch."""
    return terms_of_sequences(sequences(case, x), case.causal, case.window)


def terms_of_sequences(batch: Iterable[OneSequence], causal: bool, window: int | None) -> dict[str, float]:
    """Of each output and gradient of float64 operands: the largest sum of its terms' magnitudes over the elements.

    Rounding is proportional to it and not to the sum, which may cancel: with one key, p is 1 and dq, dk and dkey_bias
    are differences of equal numbers.
    """
    largest = dict.fromkeys(NAMES, 0.0)
    for s in batch:
        p, _ = weights(s, causal, window)
        q, k, v, do = s.q.abs(), _of_query_heads(s.k, s).abs(), _of_query_heads(s.v, s).abs(), s.do.abs()
        scale = 1 / math.sqrt(q.shape[-1])
        dp = torch.einsum("qhd,khd->hqk", do, v)
        ds = p * (dp + (p * dp).sum(-1, keepdim=True))
        if s.dlse is not None:
            ds = ds + p * s.dlse.abs()[..., None]
        scores = scale * torch.einsum("qhd,khd->hqk", q, k) + s.bias.abs()
        terms = (
            torch.einsum("hqk,khd->qhd", p, v),
            scores.where(p > 0, 0),
            scale * torch.einsum("hqk,khd->qhd", ds, k),
            _of_key_heads(scale * torch.einsum("hqk,qhd->khd", ds, q), s)[s.n_prefix :],
            _of_key_heads(torch.einsum("hqk,qhd->khd", p, do), s)[s.n_prefix :],
            ds.sum((0, 1))[s.n_prefix :],
        )
        for name, found in zip(NAMES, terms, strict=True):
            largest[name] = max(largest[name], found.max().item() if found.numel() else 0.0)
    return largest


def _of_query_heads(x: Tensor, s: OneSequence) -> Tensor:
    """Keys or values (T, Hkv, D) repeated for the query heads."""
    return x.repeat_interleave(s.q.shape[1] // x.shape[1], dim=1)


def _of_key_heads(x: Tensor, s: OneSequence) -> Tensor:
    """Terms (T, Hq, D) summed over the query heads of each key head."""
    return x.unflatten(1, (s.k.shape[1], -1)).sum(2)
