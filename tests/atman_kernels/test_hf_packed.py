"""Packed forwards of a Hugging Face model: each sequence computes as if it stood alone."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from atman_kernels import AttentionPlan, SharedPrefix
from atman_kernels.hf import KeyValueRecord
from atman_kernels.observation import AttentionCall, observing
from tests.atman_kernels.families import FAMILIES, random_ids, random_model

PROMPTS = [7, 3, 4]
# Two rollouts of the first prompt, one of the second, none of the third, and one without a prompt.
ROLLOUTS = [5, 8, 2, 6]
PROMPT_OF_ROLLOUT = [0, 0, 1, None]
families = pytest.mark.parametrize("family", FAMILIES)


def positions(lengths: list[int], starts: list[int] | None = None) -> Tensor:
    starts = [0] * len(lengths) if starts is None else starts
    return torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])[None]


def split(packed: Tensor, lengths: list[int]) -> list[Tensor]:
    return list(packed.split(lengths, dim=1))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    # Both are fp32 and differ by the order of summation; the logits are of order 10.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@families
def test_packed_sequences_give_the_logits_and_bias_gradients_of_separate_forwards(family):
    model = random_model(family).requires_grad_(False)
    ids, bias = random_ids(1, sum(PROMPTS)), torch.randn(1, sum(PROMPTS)).requires_grad_()
    packed = model(
        ids, position_ids=positions(PROMPTS), attention_plan=AttentionPlan(PROMPTS), key_bias=bias, use_cache=False
    ).logits
    alone = torch.cat(
        [
            model(i, key_bias=b, use_cache=False).logits
            for i, b in zip(split(ids, PROMPTS), split(bias, PROMPTS), strict=True)
        ],
        dim=1,
    )
    assert_same(packed, alone)
    weight = torch.randn_like(packed)
    gradients = [torch.autograd.grad((logits.log_softmax(-1) * weight).sum(), bias)[0] for logits in (packed, alone)]
    assert gradients[1].abs().max() > 0.1
    assert_same(*gradients)


class _Calls(TorchDispatchMode):
    """Names of all operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_gradients_of_a_packed_forward_are_not_copied_into_zeros() -> None:
    model = random_model("llama")
    ids, bias = random_ids(1, sum(PROMPTS)), torch.randn(1, sum(PROMPTS)).requires_grad_()
    plan = AttentionPlan(PROMPTS)
    logits = model(ids, position_ids=positions(PROMPTS), attention_plan=plan, key_bias=bias, use_cache=False).logits
    with _Calls() as calls:
        torch.autograd.grad(logits.sum(), bias)
    assert "atman_kernels::attention_backward" in calls.names
    assert "aten::select_backward" not in calls.names


def rollouts_after_prompts(family: str, **kwargs: object) -> tuple[Tensor, list[Tensor], Tensor]:
    """Logits of the packed rollouts, logits of each rollout after its prompt in one piece, and their key_bias."""
    model = random_model(family).requires_grad_(False)
    prompts, rollouts = random_ids(1, sum(PROMPTS), seed=1), random_ids(1, sum(ROLLOUTS), seed=2)
    record = KeyValueRecord()
    model(
        prompts,
        position_ids=positions(PROMPTS),
        attention_plan=AttentionPlan(PROMPTS),
        capture=record,
        use_cache=False,
    )
    assert len(record) == model.config.num_hidden_layers

    starts = [0, *torch.tensor(PROMPTS).cumsum(0).tolist()]
    begin = [0 if p is None else starts[p] for p in PROMPT_OF_ROLLOUT]
    length = [0 if p is None else PROMPTS[p] for p in PROMPT_OF_ROLLOUT]
    bias = torch.randn(1, sum(ROLLOUTS)).requires_grad_()
    packed = model(
        rollouts,
        position_ids=positions(ROLLOUTS, length),
        attention_plan=AttentionPlan(ROLLOUTS, prefix_start=begin, prefix_length=length),
        shared_prefix=record,
        key_bias=bias,
        use_cache=False,
        **kwargs,
    ).logits
    alone = []
    for i, (ids, own_bias) in enumerate(zip(split(rollouts, ROLLOUTS), split(bias, ROLLOUTS), strict=True)):
        prompt = prompts[:, begin[i] : begin[i] + length[i]]
        whole_bias = torch.cat([torch.zeros_like(prompt, dtype=torch.float32), own_bias], dim=1)
        logits = model(torch.cat([prompt, ids], dim=1), key_bias=whole_bias, use_cache=False).logits
        alone.append(logits[:, length[i] :])
    return packed, alone, bias


@families
def test_rollouts_that_share_prompts_equal_whole_sequences(family):
    packed, alone, bias = rollouts_after_prompts(family)
    assert_same(packed, torch.cat(alone, dim=1))
    weight = torch.randn_like(packed)
    gradients = [
        torch.autograd.grad((logits.log_softmax(-1) * weight).sum(), bias)[0]
        for logits in (packed, torch.cat(alone, dim=1))
    ]
    assert gradients[1].abs().max() > 0.1
    assert_same(*gradients)


@families
def test_logits_to_keep_selects_rows_of_the_packed_batch(family):
    rows = torch.tensor([0, 4, 12, 14, 20])
    packed, alone, _ = rollouts_after_prompts(family, logits_to_keep=rows)
    assert_same(packed, torch.cat(alone, dim=1)[:, rows])


def test_a_list_of_prefixes_stands_for_a_record():
    model = random_model("llama")
    prompt, rest = random_ids(1, 5, seed=1), random_ids(1, 4, seed=2)
    record = KeyValueRecord()
    model(prompt, capture=record, use_cache=False)
    layers = [SharedPrefix(*record.layer(i)[:2], start=[1], length=[4]) for i in range(3)]
    plan = AttentionPlan([4], prefix_start=[1], prefix_length=[4])
    arguments = {"position_ids": positions([4], [5]), "attention_plan": plan, "use_cache": False}
    by_record = model(rest, shared_prefix=record, **arguments).logits
    assert torch.equal(model(rest, shared_prefix=layers, **arguments).logits, by_record)


def test_a_four_dimensional_mask_beside_a_plan_is_not_read():
    model = random_model("llama")
    arguments = {"position_ids": positions(PROMPTS), "attention_plan": AttentionPlan(PROMPTS), "use_cache": False}
    ids = random_ids(1, sum(PROMPTS))
    assert torch.equal(
        model(ids, attention_mask=torch.empty(1, 1, 0, 0), **arguments).logits, model(ids, **arguments).logits
    )


class EveryLayer:
    def __init__(self) -> None:
        self.layers: list[dict[str, Tensor]] = []

    def record(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> None:
        assert layer_idx == len(self.layers)
        self.layers.append({"q": q.detach(), "k": k.detach(), "v": v.detach(), "lse": lse.detach()})


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_captured_q_and_lse_rebuild_the_attention_map(family):
    ids = random_ids(2, 9)
    everything = EveryLayer()
    with torch.no_grad():
        random_model(family)(ids, capture=everything, use_cache=False)
        model = random_model(family, "eager")
        maps = model(ids, output_attentions=True, use_cache=False).attentions
    for layer, expected, module in zip(everything.layers, maps, model.model.layers, strict=True):
        k = layer["k"].repeat_interleave(module.self_attn.num_key_value_groups, dim=2)
        scores = torch.einsum("bqhd,bkhd->bhqk", layer["q"], k) * module.self_attn.scaling
        p = torch.exp(scores - layer["lse"][..., None])
        visible = expected > 0
        assert visible.any()
        # fp32 probabilities, at most 1, of scores of order 10.
        torch.testing.assert_close(p[visible], expected[visible], rtol=1e-4, atol=1e-5)


def test_a_captured_single_row_is_recorded_too():
    everything = EveryLayer()
    random_model("llama")(random_ids(2, 1), capture=everything)
    assert [tuple(layer["lse"].shape) for layer in everything.layers] == [(2, 4, 1)] * 3


def test_recorded_keys_carry_no_gradient():
    record = KeyValueRecord()
    random_model("llama")(random_ids(1, 5), capture=record)
    assert not any(x.requires_grad for i in range(3) for x in record.layer(i)[:2])


def test_plan_offsets_follow_the_recorded_order():
    record = KeyValueRecord()
    ids = random_ids(2, 5)
    random_model("llama")(ids, capture=record)
    alone = KeyValueRecord()
    random_model("llama")(ids[1:], capture=alone)
    for start, end in pairwise([0, 5, 10]):
        assert record.layer(0).k[start:end].shape == alone.layer(0).k.shape
    assert_same(record.layer(2).k[5:], alone.layer(2).k)


class ReadsDistance:
    """An observer for whom the attention finds distances on its way."""

    def __call__(self, call: AttentionCall) -> None:
        pass

    def reads_distance(self, layer_idx: int) -> bool:
        return True


@torch.no_grad()
def test_a_plan_of_other_lengths_is_refused_whether_or_not_anyone_looks_on():
    model, ids, plan = random_model("llama"), random_ids(1, 9), AttentionPlan((4, 4))
    for watching in (nullcontext(), observing(ReadsDistance())):
        with (
            watching,
            pytest.raises(ValueError, match="the plan describes 8 rows and 8 keys, the tensors have 9 and 9"),
        ):
            model(ids, position_ids=torch.arange(9)[None], attention_plan=plan, use_cache=False)
