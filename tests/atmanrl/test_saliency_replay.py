"""Steps that a CUDA graph can replay: they never wait for the device, and replayed they learn the same masks."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from atmanrl import MaskConfig, optimize_masks
from atmanrl.saliency import peers
from atmanrl.saliency.decoder import FrozenDecoder
from atmanrl.saliency.likelihood import ModelLikelihood, frozen
from atmanrl.saliency.mask import TrainableMask
from atmanrl.saliency.packing import pack, whole
from tests.atmanrl.tiny_models import random_rollouts, tiny_model

LENGTHS = [(9, 0, 3), (14, 2, 1), (23, 3, 5)]


class NoSynchronisation(TorchDispatchMode):
    """Refuses operations whose result, or its shape, the host has to wait for, and tensors made from host memory."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waiting = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        # Indexing has the tag for the sake of boolean indices.
        numbers = func is torch.ops.aten.index.Tensor and all(i is None or i.dtype == torch.int64 for i in args[1])
        assert numbers or not waiting, f"{func} waits for the device"
        assert func is not torch.ops.aten.lift_fresh.default, "a tensor made from the host's numbers"
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("make", [FrozenDecoder, ModelLikelihood])
@pytest.mark.parametrize("family", ["llama", "mistral window", "qwen3"])
def test_no_step_waits_for_the_device(family, make, monkeypatch):
    # Values of the bias are looked at on CPUs only.
    monkeypatch.setattr(sys.modules["atman_kernels.attention"], "checks_values", lambda tensor: False)
    model, config = tiny_model(family), MaskConfig(sparsity=0.1)
    batch = pack([whole(rollout) for rollout in random_rollouts(LENGTHS)], device=torch.device("cpu"))
    with frozen(model):
        likelihood = make(model, batch)
        mask = TrainableMask(torch.full((sum(batch.cot_lengths),), config.init), config)
        with NoSynchronisation():
            mask.step(batch.mean_per_rollout(likelihood(batch.key_bias(mask.bias()))))
    assert (mask.values != config.init).any()


def test_the_check_for_waiting_sees_a_scalar_read():
    with pytest.raises(AssertionError, match="waits for the device"), NoSynchronisation():
        torch.ones(3).sum().item()


def test_capture_is_refused_without_a_gpu():
    with pytest.raises(ValueError, match="capture replays CUDA graphs, but the model is on cpu"):
        optimize_masks(tiny_model(), random_rollouts(LENGTHS), MaskConfig(capture=True))


@pytest.mark.gpu
def test_replayed_steps_learn_the_same_masks():
    model, rollouts = tiny_model().cuda(), random_rollouts(LENGTHS)
    config = MaskConfig(steps=30, lr=0.02)
    eager = optimize_masks(model, rollouts, config)
    replayed = optimize_masks(model, rollouts, replace(config, capture=True))
    for one, other in zip(eager, replayed, strict=True):
        torch.testing.assert_close(other.mask, one.mask, atol=1e-5, rtol=0)
        assert other.loss_final == pytest.approx(one.loss_final, abs=1e-5)


@pytest.mark.gpu
def test_the_captured_arm_gives_the_losses_and_gradients_of_the_eager_one():
    model, rollouts = tiny_model().cuda(), random_rollouts(LENGTHS)
    eager = lambda model, rollouts: peers.packed_engine(model, rollouts, FrozenDecoder)  # noqa: E731
    with frozen(model):
        replayed = peers.captured(eager)(model, rollouts)
        for bias in torch.rand(2, 9 + 14 + 23, device="cuda").mul(-4):
            torch.testing.assert_close(replayed(bias), eager(model, rollouts)(bias), atol=1e-6, rtol=1e-4)
