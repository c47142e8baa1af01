"""WAAD and FAI against the attention maps of an eager model, and where they are captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from atman_kernels import _cpu, backend, observation
from atman_kernels.hf import observing
from atmanrl.config import SeriesConfig
from atmanrl.rhythm.series import SeriesCollector, attention_series
from atmanrl.saliency import batches
from atmanrl.saliency.attention import layers_of, sampled_layers, select_heads
from atmanrl.saliency.likelihood import ModelLikelihood
from atmanrl.saliency.support import check_model
from tests.atmanrl.tiny_models import random_rollouts, tiny_model

CONFIG = SeriesConfig(window=4, horizon=(2, 12))


def _from_maps(
    model: PreTrainedModel, prompts: list[list[int]], responses: list[list[int]], config: SeriesConfig
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Equations 7 to 10 on the maps that the eager model returns."""
    layers = sampled_layers(layers_of(model), config.layers)
    model.set_attn_implementation("eager")
    maps, totals, n_rows = [], 0.0, 0
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            found = model(ids, output_attentions=True, use_cache=False).attentions
        maps.append(torch.stack([found[layer][0] for layer in layers]).double())
        n = ids.shape[1]
        distance = (torch.arange(n)[:, None] - torch.arange(n)).clamp(min=0)
        rows = (maps[-1] * distance).sum(-1)[..., len(prompt) :]
        totals, n_rows = totals + rows.sum(-1), n_rows + len(response)
    ranked = (totals / n_rows).flatten().argsort()
    count = round(config.head_share * len(ranked))
    low, high = config.horizon
    series = []
    for prompt, attention in zip(prompts, maps, strict=True):
        n = attention.shape[-1]
        distance = torch.arange(n)[:, None] - torch.arange(n)
        local = attention.flatten(0, 1)[ranked[:count]].mean(0)
        distant = attention.flatten(0, 1)[ranked[-count:]].mean(0)
        waad = (local * distance.clamp(min=0, max=config.window)).sum(-1)
        seen = (distance >= low) & (distance <= high) & (torch.arange(n) >= len(prompt))[:, None]
        fai = (distant * seen).sum(0) / seen.sum(0).clamp(min=1)
        series.append((waad[len(prompt) :], fai[len(prompt) :]))
    return series


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral window"])
@pytest.mark.parametrize("budget", [16384, 60], ids=["one batch", "several"])
def test_series_equal_those_of_the_attention_maps(family: str, budget: int) -> None:
    rollouts = random_rollouts([(17, 1, 3), (25, 2, 4), (1, 0, 1), (30, 1, 1)])
    prompts = [list(rollout.prompt_ids) for rollout in rollouts]
    responses = [list(rollout.completion_ids) for rollout in rollouts]
    model = tiny_model(family)
    before = model.config._attn_implementation
    found = attention_series(model, prompts, responses, CONFIG, token_budget=budget)
    assert model.config._attn_implementation == before
    expected = _from_maps(model, prompts, responses, CONFIG)
    for series, (waad, fai) in zip(found, expected, strict=True):
        torch.testing.assert_close(series.waad.double(), waad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(series.fai.double(), fai, rtol=1e-4, atol=1e-6)


def test_entropy_is_that_of_the_distribution_a_token_was_drawn_from() -> None:
    (rollout,) = random_rollouts([(9, 1, 2)])
    model = tiny_model()
    prompt, response = list(rollout.prompt_ids), list(rollout.completion_ids)
    (series,) = attention_series(model, [prompt], [response], CONFIG, entropy=True)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(series.entropy, expected, rtol=1e-4, atol=1e-5)


def test_a_padded_forward_of_the_model_itself_shows_the_same_series() -> None:
    """As in the pass for the old log-probabilities: prompts padded left, responses right, in two parts."""
    rollouts = random_rollouts([(17, 1, 3), (25, 2, 4), (3, 0, 1)])
    prompts = [list(rollout.prompt_ids) for rollout in rollouts]
    responses = [list(rollout.completion_ids) for rollout in rollouts]
    model = tiny_model()
    expected = attention_series(model, prompts, responses, CONFIG)
    left, right = max(map(len, prompts)), max(map(len, responses))
    ids = torch.zeros(len(rollouts), left + right, dtype=torch.int64)
    valid = torch.zeros_like(ids)
    for row, mask, prompt, response in zip(ids, valid, prompts, responses, strict=True):
        row[left - len(prompt) : left + len(response)] = torch.tensor(prompt + response)
        mask[left - len(prompt) : left + len(response)] = 1
    is_response = valid.bool()
    is_response[:, :left] = False
    model.set_attn_implementation("atman")
    collector = SeriesCollector(layers_of(model), is_response.split(2), CONFIG)
    with torch.no_grad(), observing(collector):
        for part in (slice(0, 2), slice(2, 3)):
            positions = (valid[part].cumsum(1) - 1).clamp(min=0)
            model(ids[part], attention_mask=valid[part], position_ids=positions, use_cache=False)
    for series, other in zip(collector.series([len(r) for r in responses]), expected, strict=True):
        torch.testing.assert_close(series.waad, other.waad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(series.fai, other.fai, rtol=1e-4, atol=1e-6)


def test_heads_are_ranked_over_the_responses_of_all_processes() -> None:
    rollouts = random_rollouts([(17, 1, 3), (25, 2, 4), (9, 0, 2), (30, 1, 1)])
    prompts = [list(rollout.prompt_ids) for rollout in rollouts]
    responses = [list(rollout.completion_ids) for rollout in rollouts]
    model = tiny_model()
    together = attention_series(model, prompts, responses, CONFIG)
    halves, sums = (slice(0, 1), slice(1, 4)), []
    for half in halves:
        attention_series(model, prompts[half], responses[half], CONFIG, reduce=lambda own: sums.append(own) or own)
    total = torch.stack(sums).sum(0)
    differs = False
    for half in halves:
        apart = attention_series(model, prompts[half], responses[half], CONFIG, reduce=lambda own: total)
        alone = attention_series(model, prompts[half], responses[half], CONFIG)
        for series, other, one in zip(apart, together[half], alone, strict=True):
            torch.testing.assert_close(series.waad, other.waad, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(series.fai, other.fai, rtol=1e-4, atol=1e-6)
            differs |= not torch.allclose(one.waad, other.waad, rtol=1e-3)
    # Ranked by each half alone, other heads are chosen.
    assert differs


def test_where_memory_runs_out_half_of_the_tokens_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts = random_rollouts([(17, 1, 3), (25, 2, 4)], per_prompt=1)
    given = [list(r.prompt_ids) for r in rollouts], [list(r.completion_ids) for r in rollouts]
    model = tiny_model()
    expected = attention_series(model, *given, CONFIG)
    original, sizes = ModelLikelihood.logits, []

    def logits(likelihood: ModelLikelihood) -> torch.Tensor:
        found = original(likelihood)
        sizes.append(len(likelihood.prompts))
        # After the layers have been seen: what a failed batch showed must not count.
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("no room")
        return found

    monkeypatch.setattr(ModelLikelihood, "logits", logits)
    for series, other in zip(attention_series(model, *given, CONFIG), expected, strict=True):
        torch.testing.assert_close(series.waad, other.waad, rtol=1e-4, atol=1e-5)
    assert sizes == [2, 1, 1]


@pytest.mark.skipif(not _cpu.isas(), reason="the C++ extension is not built")
def test_the_sampled_layers_find_the_distance_with_their_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    (rollout,) = random_rollouts([(40, 1, 2)])
    model = tiny_model()
    calls: list[bool] = []
    statistics = observation.statistics_of_rows

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["need_distance"])
        return statistics(*args, **kwargs)

    monkeypatch.setattr(observation, "statistics_of_rows", counted)
    arguments = ([list(rollout.prompt_ids)], [list(rollout.completion_ids)], CONFIG)
    (found,) = attention_series(model, *arguments)
    with backend("reference"):
        (expected,) = attention_series(model, *arguments)
    n_layers = len(sampled_layers(layers_of(model)))
    assert calls == [False] * n_layers + [True] * n_layers
    torch.testing.assert_close(found.waad, expected.waad, rtol=1e-4, atol=1e-5)


def test_entropies_are_computed_in_batches_that_their_logits_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts = random_rollouts([(9, 1, 2), (7, 2, 3), (8, 0, 1)])
    model = tiny_model()
    arguments = ([list(r.prompt_ids) for r in rollouts], [list(r.completion_ids) for r in rollouts], CONFIG)
    expected = attention_series(model, *arguments, entropy=True)
    monkeypatch.setattr(batches, "_MOST_LOGITS", 20 * model.config.vocab_size)
    packed: list[int] = []
    pack = batches.pack
    monkeypatch.setattr(batches, "pack", lambda *a, **k: packed.append(len(a[0])) or pack(*a, **k))
    found = attention_series(model, *arguments, entropy=True)
    assert packed == [1, 1, 1]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.entropy, other.entropy, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.fai, other.fai, rtol=1e-4, atol=1e-6)


def test_equal_prompts_run_once() -> None:
    (rollout,) = random_rollouts([(9, 1, 2)])
    model = tiny_model()
    rows: list[int] = []
    # Once per model, before anything is computed.
    check_model(model)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    prompt, response = list(rollout.prompt_ids), list(rollout.completion_ids)
    attention_series(model, [prompt] * 8, [response] * 8, CONFIG)
    assert rows == [len(prompt) - 1, 8 * (1 + len(response))]


def test_five_layers_lie_evenly_in_the_middle_third() -> None:
    assert sampled_layers(36) == [12, 15, 18, 21, 24]
    assert sampled_layers(28) == [9, 11, 14, 16, 18]
    assert sampled_layers(3) == [1, 2]
    assert sampled_layers(1) == [0]


def test_heads_are_ranked_over_all_sampled_layers() -> None:
    distance = {4: torch.tensor([1.0, 9.0, 5.0]), 6: torch.tensor([2.0, 3.0, 8.0])}
    assert select_heads(distance, 1 / 3) == ([(4, 0), (6, 0)], [(6, 2), (4, 1)])
