"""Masks on adapted, autocast and sharded models are those of the plain model with the same weights."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import spawn

from atmanrl import MaskConfig, estimate_saliency, optimize_masks
from atmanrl.evaluation.faithfulness import early_answering
from atmanrl.saliency import substitution_effects, working_copy
from atmanrl.saliency.decoder import why_unsupported
from tests.atmanrl.test_saliency_projection import with_adapters
from tests.atmanrl.tiny_models import random_rollouts, tiny_model

LENGTHS = [(9, 0, 3), (14, 2, 1), (5, 1, 2)]
SCORES = ("sparse-mask", "integrated", "gradient", "leave-one-out", "atman-concept", "attention", "fai")
SHORT = MaskConfig(steps=6, lr=4e-3)


def test_a_plain_model_is_not_copied():
    model = tiny_model()
    assert working_copy(model) is model
    rounded = tiny_model(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert working_copy(rounded) is rounded


def with_bfloat16_weights(model):
    # Not model.to(), which would round the rotary embedding's buffers as well.
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


@pytest.mark.parametrize("family", ["llama tied", "qwen3", "gemma3"])
def test_under_autocast_masks_are_those_of_a_model_in_its_dtype(family):
    rollouts = random_rollouts(LENGTHS)
    expected = optimize_masks(with_bfloat16_weights(tiny_model(family)), rollouts, SHORT)
    model = tiny_model(family)
    with torch.autocast("cpu", torch.bfloat16):
        found = optimize_masks(model, rollouts, SHORT)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.mask, other.mask)


def test_adapters_are_merged_into_a_copy():
    model = with_adapters(tiny_model("llama tied"))
    with torch.autocast("cpu", torch.bfloat16):
        copy = dict(working_copy(model).named_parameters())
    merged = dict(model.merge_and_unload().named_parameters())
    assert copy.keys() == merged.keys()
    for name, weight in merged.items():
        # The sum in float32, rounded once: half a unit in the last of 8 bits.
        torch.testing.assert_close(copy[name].float(), weight, rtol=2**-8, atol=1e-6)


def _models():
    return {"plain": tiny_model("llama tied"), "adapted": with_adapters(tiny_model("qwen3"))}


def _on_each_rank(rank, store, directory):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for name, model in _models().items():
        base = model.get_base_model() if name == "adapted" else model
        for layer in base.model.layers:
            fully_shard(layer)
        fully_shard(base)
        # The second rank has fewer rollouts, then none at all.
        for counts in [(3, 1), (2, 0)]:
            count = counts[rank]
            result = optimize_masks(model, random_rollouts(LENGTHS)[:count], SHORT)
            torch.save([(item.mask, item.loss_final) for item in result], directory / f"{name} {rank} {count}.pt")
        # The second rank has no pass to run.
        torch.save(_scores(model, random_rollouts(LENGTHS)[: 2 * (1 - rank)]), directory / f"{name} {rank} scores.pt")
        # The policy still runs, sharded, and trains.
        base.train()
        base(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    # FSDP2's caches keep the group, whose threads could abort an interpreter that ends: see `part_from_others`.
    dist.barrier()
    os._exit(0)


def _scores(model, rollouts):
    found = {name: [item.scores for item in estimate_saliency(model, rollouts, name)] for name in SCORES}
    found["substitution"] = substitution_effects(model, rollouts)
    found["early answering"] = [torch.from_numpy(each.divergence) for each in early_answering(model, rollouts)]
    return found


def test_ranks_of_a_sharded_model_may_have_different_numbers_of_rollouts(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    # A file, because another process may take a port between its choice and its use.
    spawn(_on_each_rank, (tmp_path / "store", results), nprocs=2)
    scores = sorted(results.glob("* scores.pt"))
    files = sorted({*results.iterdir()} - {*scores})
    assert (len(files), len(scores)) == (8, 4)
    models = _models()
    for file in scores:
        name, rank, _ = file.stem.split()
        found, expected = torch.load(file), _scores(models[name], random_rollouts(LENGTHS)[: 2 * (1 - int(rank))])
        for kind, columns in expected.items():
            for one, other in zip(found[kind], columns, strict=True):
                torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3, msg=f"{file.stem}, {kind}")
    for file in files:
        name, _, count = file.stem.split()
        found, rollouts = torch.load(file), random_rollouts(LENGTHS)[: int(count)]
        expected = optimize_masks(models[name], rollouts, SHORT)
        for (mask, loss), item in zip(found, expected, strict=True):
            # Merged or beside the layer, an adapter rounds differently.
            torch.testing.assert_close(mask, item.mask, atol=1e-4, rtol=0)
            assert loss == pytest.approx(item.loss_final, abs=1e-4)


def test_a_copy_takes_the_fast_path():
    with torch.autocast("cpu", torch.bfloat16):
        copy = working_copy(with_adapters(tiny_model("qwen3")))
    assert why_unsupported(copy) is None
    assert copy.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in copy.parameters())
