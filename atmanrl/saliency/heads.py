"""Local and global heads: those that look back least and furthest, in the layers of the middle third of a model.

Source: arXiv 2510.13554 (v2), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

Heads = list[tuple[int, int]]


def sampled_layers(n_layers: int, count: int = 5) -> list[int]:
    """``count`` evenly spaced layers from floor(L / 3) to floor(2 L / 3), both included; fewer in a shallow model."""
    first, last = n_layers // 3, 2 * n_layers // 3
    spaced = torch.linspace(first, min(last, n_layers - 1), count, dtype=torch.float64)
    return sorted({round(place) for place in spaced.tolist()})


def layers_of(model: PreTrainedModel) -> int:
    """The number of decoder layers."""
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def select_heads(distance: dict[int, Tensor], share: float = 0.3) -> tuple[Heads, Heads]:
    """The ``share`` of all (layer, head) with the lowest and with the highest mean distance, at least one each.

    Args:
        distance: (Hq,) mean backward attention distance of each sampled layer's heads.
    """
    ranked = sorted(
        (value, layer, head) for layer, values in distance.items() for head, value in enumerate(values.tolist())
    )
    count = max(1, round(share * len(ranked)))
    heads = [(layer, head) for _, layer, head in ranked]
    return heads[:count], heads[-count:]
