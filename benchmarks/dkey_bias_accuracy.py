"""Measures how exact dkey_bias is with each form of delta: python -m benchmarks.dkey_bias_accuracy [--length 8192].

Keeps what it measures in results/dkey_bias_accuracy.json, from which docs/math.md quotes. The backward is computed in
plain PyTorch from 16-bit q, k, v, do, head by head and in blocks of rows, with every intermediate but those under test
in fp32. Errors are max |error| over the keys against float64, and the sum of the gradient over the sequence, which is
zero without rounding, both relative to the largest |dkey_bias|.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.device import RESULTS, save

FORMS = (
    "float32 throughout",
    "same-dtype PyTorch",
    "sum_d do o, o rounded",
    "sum_d do o, fp32 o from rounded p",
    "sum_v p dp",
)
BLOCK = 512


def row_blocks(
    length: int, head_dim: int, dtype: torch.dtype, seed: int
) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """(last row + 1, scores, dp, v, do) in float64 of each block of rows of one causal head with random inputs."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, do = (torch.randn(length, head_dim, generator=generator).to(dtype).double() for _ in range(4))
    for begin in range(0, length, BLOCK):
        end = min(begin + BLOCK, length)
        hidden = torch.ones(end - begin, end, dtype=torch.bool).triu(begin + 1)
        scores = (q[begin:end] @ k[:end].T / head_dim**0.5).masked_fill(hidden, -torch.inf)
        yield end, scores, do[begin:end] @ v[:end].T, v[:end], do[begin:end]


def gradient(scores: Tensor, dp: Tensor, v: Tensor, do: Tensor, form: str, dtype: torch.dtype) -> Tensor:
    """Column sums of p (dp - delta) for one block of rows; ``form`` "float64" is exact."""
    if form == "float64":
        p = scores.softmax(-1)
        return (p * (dp - (p * dp).sum(-1, keepdim=True))).sum(0)
    p, dp32 = scores.float().softmax(-1), dp.float()
    if form == "same-dtype PyTorch":
        # What autograd of eager attention does: dp and the gradient of the scores pass through 16 bits.
        dp32 = dp32.to(dtype).float()
        return (p * (dp32 - (p * dp32).sum(-1, keepdim=True))).to(dtype).float().sum(0)
    o = p.to(dtype).float() @ v.float()
    delta = {
        "float32 throughout": ((p @ v.float()) * do.float()).sum(-1),
        "sum_d do o, o rounded": (o.to(dtype).float() * do.float()).sum(-1),
        "sum_d do o, fp32 o from rounded p": (o * do.float()).sum(-1),
        "sum_v p dp": (p * dp32).sum(-1),
    }[form]
    return (p * (dp32 - delta[:, None])).sum(0)


def measure(length: int, heads: int, head_dim: int, dtype: torch.dtype) -> dict[str, list[float]]:
    """{form: [max error, |sum|]}, both relative to the largest exact |dkey_bias|."""
    total = {form: torch.zeros(length, dtype=torch.float64) for form in ("float64", *FORMS)}
    for head in range(heads):
        for end, *block in row_blocks(length, head_dim, dtype, seed=head):
            for form, column in total.items():
                column[:end] += gradient(*block, form, dtype).double()
    exact = total.pop("float64")
    scale = exact.abs().max()
    return {
        form: [float(f"{x / scale:.1e}") for x in ((column - exact).abs().max(), column.sum().abs())]
        for form, column in total.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--output", type=Path, default=RESULTS / "dkey_bias_accuracy.json")
    arguments = parser.parse_args()
    name = f"s = {arguments.length}, {arguments.heads} heads of {arguments.head_dim}, {arguments.dtype}"
    found = measure(arguments.length, arguments.heads, arguments.head_dim, getattr(torch, arguments.dtype))
    content = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    save(arguments.output, {**content, name: found})
    print(f"{name}\n{'':36}{'max error':>12}{'sum':>12}")
    for form, (error, total) in found.items():
        print(f"{form:36}{error:12.1e}{total:12.1e}")


if __name__ == "__main__":
    main()
