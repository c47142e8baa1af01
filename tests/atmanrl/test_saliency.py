"""Mask optimisation: the masks are the paper's, rollouts are independent, the model comes back as it was."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM, MambaConfig, MambaForCausalLM

from atmanrl import MaskConfig, Rollout, optimize_masks
from atmanrl.config import MASK_PRESETS
from tests.atmanrl.naive_masks import naive_mask
from tests.atmanrl.tiny_models import FAMILIES, VOCABULARY, random_rollouts, tiny_model

# (CoT, marker, answer): the smallest rollout there is, no marker, one answer token, all parts long.
LENGTHS = [(1, 0, 1), (9, 0, 3), (14, 2, 1), (23, 3, 5)]
SHORT = MaskConfig(steps=25, lr=4e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_equal_the_naive_ones(family):
    model = tiny_model(family)
    rollouts = random_rollouts(LENGTHS)
    result = optimize_masks(model, rollouts, SHORT)
    for item, rollout in zip(result, rollouts, strict=True):
        naive = naive_mask(model, rollout, SHORT)
        assert naive.loss_final > 1e-2, "a saturated loss compares rounding noise"
        torch.testing.assert_close(item.mask, naive.mask, atol=1e-3, rtol=0)
        for name in ("loss_initial", "loss_final", "loss_unmasked"):
            assert getattr(item, name) == pytest.approx(getattr(naive, name), abs=1e-4), name


def test_the_papers_200_steps_equal_the_naive_ones():
    model = tiny_model()
    rollouts = random_rollouts([(12, 2, 3)])
    naive = naive_mask(model, rollouts[0], MaskConfig())
    (item,) = optimize_masks(model, rollouts)
    torch.testing.assert_close(item.mask, naive.mask, atol=1e-3, rtol=0)
    assert (item.mask + 0.4).abs().max() > 0.05, "nothing was learned"


@pytest.mark.parametrize("config", [SHORT, replace(SHORT, sparsity=0.3, answer_loss="all")], ids=["paper", "sparse"])
def test_float64_masks_equal_the_naive_ones_to_1e_8(config):
    model = tiny_model("mistral window", torch.float64)
    rollouts = random_rollouts(LENGTHS)
    for item, rollout in zip(optimize_masks(model, rollouts, config), rollouts, strict=True):
        naive = naive_mask(model, rollout, config)
        torch.testing.assert_close(item.mask, naive.mask, atol=1e-8, rtol=0)
        assert item.loss_final == pytest.approx(naive.loss_final, abs=1e-10)


def test_a_bfloat16_model_follows_its_float32_twin():
    rollouts = random_rollouts(LENGTHS[1:])
    exact = optimize_masks(tiny_model(), rollouts, SHORT)
    rounded = optimize_masks(tiny_model(dtype=torch.bfloat16), rollouts, SHORT)
    for one, other in zip(exact, rounded, strict=True):
        assert other.mask.dtype == torch.float32
        assert other.loss_initial == pytest.approx(one.loss_initial, rel=0.05)
        assert torch.corrcoef(torch.stack([one.mask, other.mask]))[0, 1] > 0.8


def test_a_rollout_does_not_depend_on_its_companions():
    model = tiny_model()
    rollouts = random_rollouts([*LENGTHS, (30, 1, 2), (17, 2, 4)], per_prompt=3)
    together = optimize_masks(model, rollouts, SHORT)
    backwards = optimize_masks(model, rollouts[::-1], SHORT)[::-1]
    for index, rollout in enumerate(rollouts):
        (alone,) = optimize_masks(model, [rollout], SHORT)
        # A matrix product may round a row differently when it has other neighbours, so not bitwise: one step of Adam
        # changes with the gradient's relative error, some 1e-6 here, and 25 steps move a number by at most 0.1.
        for other in (together[index], backwards[index]):
            torch.testing.assert_close(alone.mask, other.mask, atol=2e-5, rtol=0)
            assert alone.loss_final == pytest.approx(other.loss_final, abs=1e-5)


def test_repeating_the_same_batch_is_bitwise_equal():
    model, rollouts = tiny_model(), random_rollouts(LENGTHS)
    first, second = (optimize_masks(model, rollouts, SHORT) for _ in range(2))
    assert all(torch.equal(one.mask, other.mask) for one, other in zip(first, second, strict=True))


def test_without_steps_the_mask_stays_at_init_and_both_losses_are_equal():
    (item,) = optimize_masks(tiny_model(), random_rollouts([(5, 1, 2)]), MaskConfig(steps=0))
    assert item.mask.tolist() == pytest.approx([-0.4] * 5)
    assert item.loss_initial == item.loss_final != item.loss_unmasked
    assert item.normalized.tolist() == pytest.approx([1.0] * 5)
    assert item.restored.tolist() == pytest.approx([0.0] * 5)


def test_weight_decay_alone_restores_what_its_formula_says():
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    (item,) = optimize_masks(model, random_rollouts([(5, 1, 2)]))
    assert item.restored.tolist() == pytest.approx([1 - (1 - 1e-3 * 0.05) ** 200] * 5, abs=1e-5)


def test_sparsity_keeps_tokens_suppressed_whose_restoration_gains_less():
    rollouts = random_rollouts([(20, 1, 3)])
    free, costly = (
        optimize_masks(tiny_model(), rollouts, replace(SHORT, sparsity=sparsity))[0].restored.sum()
        for sparsity in (0.0, 100.0)
    )
    assert costly.abs() < 0.05 * free.abs()


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_grad_mode_does_not_matter(grad_mode):
    model, rollouts = tiny_model(), random_rollouts([(8, 1, 2)])
    expected = optimize_masks(model, rollouts, SHORT)[0].mask
    with grad_mode():
        assert torch.equal(optimize_masks(model, rollouts, SHORT)[0].mask, expected)


def _state(model):
    return (
        model.config._attn_implementation,
        [module.training for module in model.modules()],
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        torch.get_rng_state(),
    )


def _same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(_same(x, y) for x, y in zip(one, other, strict=True))
    return one == other


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_as_it_was(fails):
    model = tiny_model()
    model.set_attn_implementation("sdpa")
    model.train()
    model.model.layers[1].mlp.eval()
    model.gradient_checkpointing_enable()
    model.model.layers[0].mlp.requires_grad_(False)
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    if fails:
        model.model.norm.weight.data[0] = torch.nan
    before = _state(model)
    if fails:
        with pytest.raises(FloatingPointError, match="loss of rollout 0 is nan"):
            optimize_masks(model, random_rollouts([(5, 1, 2)]), SHORT)
    else:
        optimize_masks(model, random_rollouts([(5, 1, 2)]), SHORT)
    assert _same(_state(model), before)


def test_rollouts_without_chain_of_thought_or_answer_are_skipped_with_one_warning():
    rollouts = [
        *random_rollouts([(7, 1, 2)]),
        Rollout([1, 2], [], [3], [4]),
        Rollout([1, 2], [5, 6], []),
    ]
    with pytest.warns(
        UserWarning, match=r"2 of 3 rollouts get no scores \(rollout 1: empty chain of thought\)"
    ) as caught:
        result = optimize_masks(tiny_model(), rollouts, SHORT)
    assert len(caught) == 1
    assert [item.skipped for item in result] == [None, "empty chain of thought", "empty answer"]
    assert result[2].mask.tolist() == pytest.approx([-0.4, -0.4])
    assert torch.tensor([result[2].loss_initial, result[2].loss_final, result[2].loss_unmasked]).isnan().all()
    alone = optimize_masks(tiny_model(), rollouts[:1], SHORT)
    assert torch.equal(result[0].mask, alone[0].mask)


def test_a_batch_of_nothing_but_skipped_rollouts_and_an_empty_batch_return():
    with pytest.warns(UserWarning, match="1 of 1 rollouts"):
        assert optimize_masks(tiny_model(), [Rollout([1], [], [])])[0].skipped == "empty chain of thought"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(optimize_masks(tiny_model(), [])) == 0


def test_bad_rollouts_are_named():
    good = random_rollouts([(5, 1, 2)])
    with pytest.raises(ValueError, match=r"rollout 1 has 102 tokens \(40 prompt, 62 completion\).* context holds 96"):
        optimize_masks(tiny_model(), [*good, Rollout([1] * 40, [2] * 60, [3, 4])])
    with pytest.raises(ValueError, match=rf"rollout 1 holds the token id 61, the model's vocabulary has {VOCABULARY}"):
        optimize_masks(tiny_model(), [*good, Rollout([1], [61], [3])])


def test_an_infinite_loss_names_its_rollout():
    model = tiny_model("llama")
    # Only the second rollout's answer is token 60, whose logit is made -inf.
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))
    model.lm_head.bias.data[60] = -torch.inf
    rollouts = [Rollout([1], [2, 3], [4]), Rollout([1], [2, 3], [60])]
    with pytest.raises(FloatingPointError, match="the loss of rollout 1 is inf"):
        optimize_masks(model, rollouts, SHORT)


def test_bad_configurations_say_which_value():
    for values, message in [
        ({"steps": -1}, "steps must not be negative, got -1"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"lr": float("inf")}, "lr must be positive and finite, got inf"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
        ({"init": 0.1, "upper": 0.2}, "init must be negative"),
        ({"answer_loss": "cot"}, "answer_loss must be one of .* got 'cot'"),
        ({"sparsity": -0.1}, "sparsity must not be negative"),
        ({"weights": "int4"}, "weights must be one of .* got 'int4'"),
    ]:
        with pytest.raises(ValueError, match=message):
            MaskConfig(**values)


def test_the_progress_bar_counts_the_forwards(capsys):
    optimize_masks(tiny_model(), random_rollouts([(5, 1, 2)]), MaskConfig(steps=3), progress=True)
    # One per step, one without a mask, one at the end.
    assert "5/5" in capsys.readouterr().err
    optimize_masks(tiny_model(), random_rollouts([(5, 1, 2)]), MaskConfig(steps=3), progress=False)
    assert capsys.readouterr().err == ""


def test_recorded_masks_and_losses_are_those_of_shorter_runs():
    model, rollouts = tiny_model(), random_rollouts([(9, 0, 3), (5, 1, 2)])
    config = MaskConfig(steps=5, lr=4e-3)
    plain = optimize_masks(model, rollouts, config)
    recorded = optimize_masks(model, rollouts, config, record_every=2)
    for one, other in zip(plain, recorded, strict=True):
        assert one.trajectory is None
        assert torch.equal(one.mask, other.mask)
        assert other.trajectory.steps.tolist() == [0, 2, 4, 5]
        assert other.trajectory.losses[[0, -1]].tolist() == [one.loss_initial, one.loss_final]
        assert torch.equal(other.trajectory.scores[-1], one.restored)
    after_two = optimize_masks(model, rollouts, replace(config, steps=2))
    assert torch.equal(recorded[1].trajectory.scores[1], after_two[1].restored)
    assert recorded[1].trajectory.losses[1].item() == after_two[1].loss_final
    with pytest.raises(ValueError, match="record_every must be at least 1, got 0"):
        optimize_masks(model, rollouts, record_every=0)


def test_presets_keep_how_far_a_token_can_move():
    assert MASK_PRESETS["paper"] == MaskConfig()
    assert all(preset.steps * preset.lr == pytest.approx(0.2) for preset in MASK_PRESETS.values())


def test_models_that_mix_positions_without_attention_are_refused_by_name():
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    with pytest.raises(ValueError, match="MambaForCausalLM has a recurrent state"):
        optimize_masks(MambaForCausalLM(MambaConfig(**shape, state_size=4)), random_rollouts(LENGTHS), SHORT)
    convolutions = Lfm2Config(
        **shape,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    with pytest.raises(ValueError, match="1 of the 2 layers of Lfm2ForCausalLM mix positions without attention"):
        optimize_masks(Lfm2ForCausalLM(convolutions), random_rollouts(LENGTHS), SHORT)


def test_the_general_path_is_taken_with_a_word_of_why(caplog):
    with caplog.at_level("INFO", logger="atmanrl"):
        optimize_masks(tiny_model("qwen3", torch.float64), random_rollouts(LENGTHS[:1]), SHORT)
    assert "general path: float64" in caplog.text
