"""The cost model counts what models do, and the plan in the docs is what the simulator prints."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from atmanrl.saliency.cost import DecoderShape, necessary_flops
from atmanrl.saliency.packing import pack, whole
from atmanrl.saliency.throughput import SHAPES, random_problem
from atmanrl.training.plan import (
    Device,
    UpdateTime,
    Workload,
    memory,
    parameters,
    saliency_flops,
    update_flops,
    update_time,
)
from benchmarks import planning
from tests.atmanrl.tiny import llama


def test_weights_are_those_of_the_model() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(SHAPES["llama-3.2-3b"])
    assert parameters(DecoderShape.of(model)) == pytest.approx(sum(p.numel() for p in model.parameters()), rel=1e-4)


def test_mask_operations_are_the_necessary_ones_within_six_percent() -> None:
    work = replace(Workload(), queries=2)
    lengths = {"prompt": work.prompt, "cot": (work.completion - work.answer,) * 2, "answer": work.answer}
    problem = random_problem(1000, queries=work.queries, rollouts=work.group, **lengths)
    batch = pack([whole(rollout) for rollout in problem], device=torch.device("cpu"))
    shape = planning.LLAMA_3B
    one, two = (saliency_flops(shape, replace(work, mask_steps=steps)) for steps in (1, 2))
    assert 1 <= (two - one) / necessary_flops(shape, batch, [None] * shape.layers) < 1.06


def test_update_operations_are_those_of_a_forward_and_backward() -> None:
    model = llama(300, tie_word_embeddings=True).train()
    # So short that the attention, which the counter leaves out on CPUs, does not weigh.
    work = Workload(queries=1, group=2, prompt=4, completion=6, passes=1, checkpointing=False)
    ids = torch.randint(300, (2, 10))
    with FlopCounterMode(display=False) as counter:
        model(ids, logits_to_keep=6).logits.sum().backward()
    assert update_flops(DecoderShape.of(model), work) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_more_gpus_shorten_masks_and_update_but_not_the_reading_of_weights() -> None:
    one, eight = (update_time(planning.LLAMA_3B, Workload(), Device(), gpus=gpus) for gpus in (1, 8))
    assert eight.saliency == pytest.approx(one.saliency / 8)
    assert eight.update == pytest.approx(one.update / 8)
    assert eight.generation > 0.9 * one.generation
    with pytest.raises(ValueError, match="65 devices have no work in a batch of 64 rollouts"):
        update_time(planning.LLAMA_3B, Workload(), Device(), gpus=65)


def test_shards_divide_the_state_and_adapters_need_none() -> None:
    n = parameters(planning.LLAMA_3B)
    whole, sharded, adapted = (
        memory(planning.LLAMA_3B, Workload(), gpus=8, strategy=strategy)[1] for strategy in ("ddp", "fsdp2", "lora")
    )
    assert whole - sharded == pytest.approx(16 * n * 7 / 8, rel=0.05)
    assert whole - adapted == pytest.approx(14 * n, rel=0.05)


def test_overlap_saves_no_more_than_the_shorter_part() -> None:
    for generation, saliency in ((10.0, 2.0), (2.0, 10.0), (5.0, 5.0)):
        together = planning.overlapped(UpdateTime(generation, saliency, 0.0, 0.0), 64)
        assert max(generation, saliency) <= together <= generation + saliency
        # The first rollout is awaited and the last one scored alone: one part in 64 of either.
        assert together <= max(generation + saliency / 64, generation / 64 + saliency) + 1e-9
    assert planning.overlapped(UpdateTime(10.0, 2.0, 0.0, 0.0), 1) == 12.0


def test_the_plan_in_the_docs_is_what_the_simulator_prints() -> None:
    page = planning.PAGE.read_text()
    assert page.split(planning.BEGIN)[1].split(planning.END)[0].strip() == planning.generated().strip()
