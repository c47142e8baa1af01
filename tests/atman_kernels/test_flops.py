"""Operations of the statistics' operators as PyTorch's counter has them, against pairs counted one by one."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import atman_kernels.flops  # noqa: F401  (registers the formulas)
from atman_kernels import AttentionPlan, SharedPrefix, _cpu, attention_statistics, attention_varlen
from atman_kernels.statistics import attention_with_distance

HEADS_Q, HEADS_KV, HEAD_DIM = 4, 2, 16
# Per sequence: rows, own keys, prefix keys.
LENGTHS = ((40, 40, 0), (7, 12, 20), (5, 3, 0))


def _operands() -> tuple[AttentionPlan, torch.Tensor, torch.Tensor, SharedPrefix]:
    rows, keys, prefixes = zip(*LENGTHS, strict=True)
    plan = AttentionPlan(rows, keys, [0] * len(rows), prefixes)
    q, k = torch.randn(sum(rows), HEADS_Q, HEAD_DIM), torch.randn(sum(keys), HEADS_KV, HEAD_DIM)
    prefix = torch.randn(max(prefixes), HEADS_KV, HEAD_DIM)
    return plan, q, k, SharedPrefix(prefix, prefix)


@pytest.mark.parametrize("need_distance", [True, False])
@pytest.mark.parametrize("attention_window", [None, 4, 15])
@pytest.mark.parametrize("horizon", [(0, 3), (5, 9), (2, 100)])
def test_statistics_count_the_pairs_whose_scores_they_need(
    need_distance: bool, attention_window: int | None, horizon: tuple[int, int]
) -> None:
    plan, q, k, prefix = _operands()
    window, pairs = 6, 0
    for n_rows, n_keys, n_prefix in LENGTHS:
        for row in range(n_rows):
            for key in range(n_prefix + n_keys):
                distance = row + n_prefix + n_keys - n_rows - key
                if distance < 0 or (attention_window is not None and distance >= attention_window):
                    continue
                pairs += need_distance + (distance < window)
                pairs += key >= n_prefix and horizon[0] <= distance <= horizon[1]
    _, lse = attention_varlen(q, k, k, plan=plan, prefix=prefix, window=attention_window, return_lse=True)
    with FlopCounterMode(display=False) as counter:
        attention_statistics(
            q,
            k,
            lse,
            plan=plan,
            prefix=prefix,
            window=window,
            horizon=horizon,
            attention_window=attention_window,
            need_distance=need_distance,
        )
    assert counter.get_total_flops() == 2 * HEADS_Q * HEAD_DIM * pairs


@pytest.mark.skipif(not _cpu.isas(), reason="the C++ extension is not built")
@pytest.mark.parametrize("window", [None, 15])
def test_the_distance_adds_no_product_to_the_attention(window: int | None) -> None:
    plan, q, k, prefix = _operands()
    with FlopCounterMode(display=False) as plain:
        attention_varlen(q, k, k, plan=plan, prefix=prefix, window=window)
    with FlopCounterMode(display=False) as counted:
        attention_with_distance(q[None], k[None], k[None], None, plan=plan, prefix=prefix, window=window)
    assert counted.get_total_flops() == plain.get_total_flops() > 0
