"""CPU-sized cases for pytest-benchmark: ``make bench``, or ``pytest benchmarks/bench_cpu.py``.

Each group compares arms on the same inputs; pytest-benchmark prints their ratios. Attention is one forward + backward
in fp32, 8 heads of 64; a mask step is one forward + backward of the answers' loss for 2 queries x 4 rollouts.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from atmanrl.saliency.likelihood import frozen
from atmanrl.saliency.throughput import ARMS, SHAPES, random_model, random_problem
from benchmarks.cases import AttentionCase, make_inputs
from benchmarks.peers import PEERS, inputs_with_gradients

ATTENTION_ARMS = ("atman", "eager", "sdpa_math", "sdpa_flash_unbiased")


@pytest.mark.parametrize("arm", ATTENTION_ARMS)
@pytest.mark.parametrize("lengths", [(512,), (1024,), (60,) * 16], ids=["1x512", "1x1024", "16x60"])
def test_attention_forward_and_backward(benchmark: BenchmarkFixture, lengths: tuple[int, ...], arm: str) -> None:
    benchmark.group = f"attention {len(lengths)}x{lengths[0]}"
    case = AttentionCase("", lengths, (8, 8), 64)
    inputs = make_inputs(case, torch.float32, "cpu")
    compute = PEERS[arm](case, inputs)
    wanted = inputs_with_gradients(arm, inputs)
    gradients = benchmark(lambda: torch.autograd.grad(compute(), wanted, inputs.do))
    assert all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if "flex" not in arm.lower()])
def test_one_step_of_mask_optimisation(benchmark: BenchmarkFixture, arm: str) -> None:
    benchmark.group = "mask step, llama-30m, 2x4 rollouts"
    model = random_model("llama-30m", dtype=torch.float32, device=torch.device("cpu"))
    vocabulary = SHAPES["llama-30m"].vocab_size
    rollouts = random_problem(vocabulary, queries=2, rollouts=4, prompt=48, cot=(48, 64), answer=8)
    bias = torch.full((sum(len(rollout.cot_ids) for rollout in rollouts),), -4.0)
    with frozen(model):
        losses, gradient = benchmark.pedantic(ARMS[arm](model, rollouts), args=(bias,), rounds=3, warmup_rounds=1)
    assert bool(losses.isfinite().all())
    assert bool(gradient.isfinite().all())
