"""The implementations that the benchmark compares with solve the same problem."""

from __future__ import annotations

import pytest
import torch

from atmanrl.saliency import peers
from atmanrl.saliency.decoder import FrozenDecoder
from atmanrl.saliency.likelihood import frozen
from tests.atmanrl.tiny_models import random_rollouts, tiny_model


@pytest.mark.parametrize(
    "arm",
    [
        peers.paper_style_loop,
        lambda model, rollouts: peers.paper_style_loop(model, rollouts, answer_logits_only=True),
        peers.batched_sdpa,
        pytest.param(peers.batched_flex, marks=pytest.mark.gpu),
    ],
    ids=["paper", "paper, answer logits", "sdpa", "flex"],
)
def test_every_arm_gives_the_losses_and_gradients_of_the_engine(arm):
    # FlexAttention differentiates on GPUs only.
    device = "cuda" if arm is peers.batched_flex else "cpu"
    model, rollouts = tiny_model().to(device), random_rollouts([(9, 0, 3), (14, 2, 1), (23, 3, 5)])
    bias = -4 * torch.rand(9 + 14 + 23, generator=torch.Generator().manual_seed(0)).to(device)
    with frozen(model):
        losses, gradient = peers.packed_engine(model, rollouts, FrozenDecoder)(bias)
        peer_losses, peer_gradient = arm(model, rollouts)(bias)
    torch.testing.assert_close(peer_losses, losses, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(peer_gradient, gradient, atol=1e-6, rtol=1e-3)
