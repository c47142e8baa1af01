"""The frozen fast path computes what autograd through the model computes, layer by layer, and no more than it needs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from atman_kernels.hf import AtManAttention
from atmanrl import MaskConfig, Rollout, optimize_masks
from atmanrl.saliency.cost import DecoderShape, necessary_flops, saved_bytes
from atmanrl.saliency.decoder import FrozenDecoder, why_unsupported
from atmanrl.saliency.likelihood import ModelLikelihood, frozen
from atmanrl.saliency.packing import pack, whole
from tests.atmanrl.tiny_models import FAMILIES, VOCABULARY, random_rollouts, tiny_model

FAST = [family for family in FAMILIES if family != "gemma3"]
LENGTHS = [(1, 0, 1), (9, 0, 3), (14, 2, 1), (23, 3, 5)]


def _batch(answer_loss="value"):
    return pack([whole(rollout, answer_loss) for rollout in random_rollouts(LENGTHS)], device=torch.device("cpu"))


def _random_bias(batch):
    torch.manual_seed(1)
    return batch.key_bias(-4 * torch.rand(len(batch.cot_columns))).requires_grad_()


@pytest.mark.parametrize("family", FAST)
def test_every_layer_and_its_gradient_equal_the_models(family):
    model, batch = tiny_model(family), _batch()
    bias = _random_bias(batch)
    with frozen(model):
        states = []
        hooks = [layer.register_forward_hook(lambda *a: states.append(a[-1])) for layer in model.model.layers]
        nll = ModelLikelihood(model, batch)(bias)
        for hook in hooks:
            hook.remove()
        states = states[-len(hooks) :]
        weights = torch.rand(len(nll))
        *d_states, d_bias = torch.autograd.grad((nll * weights).sum(), [*states, bias])

        fast = FrozenDecoder(model, batch)
        fast_nll = fast(bias)
        outputs = [layer.out.clone() for layer in fast.layers]
        d_outputs = {}
        for index, layer in enumerate(fast.layers):
            layer.backward = _spy(layer.backward, d_outputs, index)
        (fast_d_bias,) = torch.autograd.grad((fast_nll * weights).sum(), [bias])
    states[-1], d_states[-1] = states[-1][:, batch.loss_rows], d_states[-1][:, batch.loss_rows]
    for index, (state, d_state) in enumerate(zip(states, d_states, strict=True)):
        _assert_near(f"output of layer {index}", outputs[index], state[0])
        _assert_near(f"gradient of the output of layer {index}", d_outputs[index], d_state[0])
    _assert_near("negative log-likelihoods", fast_nll, nll)
    _assert_near("gradient of the bias", fast_d_bias, d_bias)


def _spy(backward, seen, index):
    def spied(d_out, d_x):
        seen[index] = d_out.clone()
        return backward(d_out, d_x)

    return spied


def _assert_near(name, actual, expected):
    # Two orders of the same float32 sums: some 1e-6 of the largest value.
    scale = expected.abs().max().item()
    error = (actual - expected).abs().max().item()
    assert error <= 2e-5 * scale, f"{name}: error {error:.2e} at scale {scale:.2e}"


@pytest.mark.parametrize("answer_loss", ["value", "all"])
def test_fast_and_general_path_give_the_same_masks(answer_loss):
    model, rollouts = tiny_model("qwen3"), random_rollouts(LENGTHS)
    config = MaskConfig(steps=25, lr=4e-3, answer_loss=answer_loss)
    fast = optimize_masks(model, rollouts, config, likelihood=FrozenDecoder)
    general = optimize_masks(model, rollouts, config, likelihood=ModelLikelihood)
    for one, other in zip(fast, general, strict=True):
        torch.testing.assert_close(one.mask, other.mask, atol=1e-3, rtol=0)
        assert one.loss_final == pytest.approx(other.loss_final, abs=1e-4)


def test_one_layer_is_first_and_last_at_once():
    model, batch = tiny_model(), _batch()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    bias = _random_bias(batch)
    with frozen(model):
        (fast,) = torch.autograd.grad(FrozenDecoder(model, batch)(bias).sum(), [bias])
        (general,) = torch.autograd.grad(ModelLikelihood(model, batch)(bias).sum(), [bias])
    _assert_near("gradient of the bias", fast, general)


def test_a_backward_after_the_next_call_is_refused():
    model, batch = tiny_model(), _batch()
    with frozen(model):
        decoder = FrozenDecoder(model, batch)
        first = decoder(_random_bias(batch)).sum()
        decoder(_random_bias(batch))
        with pytest.raises(RuntimeError, match="called again before this call's backward"):
            first.backward()


def test_logits_in_chunks_equal_logits_at_once(monkeypatch):
    model, batch = tiny_model(), _batch()
    bias = _random_bias(batch)
    results = []
    for at_a_time in (2**24, 3 * 61):
        monkeypatch.setattr("atmanrl.saliency.cost._LOGITS_AT_A_TIME", at_a_time)
        monkeypatch.setattr("atmanrl.saliency.decoder._CPU_BLOCK", 7 if at_a_time < 2**24 else 512)
        with frozen(model):
            nll = FrozenDecoder(model, batch)(bias)
            results.append((nll.detach(), *torch.autograd.grad(nll.sum(), [bias])))
    for one, other in zip(*results, strict=True):
        _assert_near("chunked", one, other)


def test_a_bfloat16_decoder_is_as_exact_as_the_bfloat16_model():
    batch = _batch()
    bias = _random_bias(batch)
    gradients = {}
    for name, dtype, make in [
        ("exact", torch.float32, ModelLikelihood),
        ("model", torch.bfloat16, ModelLikelihood),
        ("decoder", torch.bfloat16, FrozenDecoder),
    ]:
        model = tiny_model(dtype=dtype)
        with frozen(model):
            (gradients[name],) = torch.autograd.grad(make(model, batch)(bias).sum(), [bias])
    error = {name: (gradients[name] - gradients["exact"]).norm().item() for name in ("model", "decoder")}
    assert error["decoder"] <= 2 * error["model"]


def test_models_that_the_fast_path_would_get_wrong_go_the_general_way():
    assert why_unsupported(tiny_model()) is None
    assert "Gemma3ForCausalLM is none of" in why_unsupported(tiny_model("gemma3"))
    assert "float64" in why_unsupported(tiny_model(dtype=torch.float64))
    adapted = tiny_model()
    adapted.model.layers[1].mlp.up_proj = type("QuantisedLinear", (nn.Linear,), {})(32, 48, bias=False)
    assert why_unsupported(adapted) == "model.layers.1.mlp.up_proj is a QuantisedLinear"
    mixed = tiny_model()
    mixed.lm_head.bfloat16()
    assert "dtypes" in why_unsupported(mixed)
    hooked = tiny_model()
    hooked(torch.tensor([[1, 2]]), output_hidden_states=True)
    assert why_unsupported(hooked) is None
    for name in ("model.layers.0.mlp", "model.norm", "lm_head", "model"):
        hook = hooked.get_submodule(name).register_forward_hook(lambda module, inputs, output: 2 * output)
        assert why_unsupported(hooked) == f"{name} has hooks or a forward of its own"
        hook.remove()


def test_replaced_norms_go_the_general_way():
    for name in ("model.norm", "model.layers.1.input_layernorm"):
        model = tiny_model()
        model.set_submodule(name, nn.LayerNorm(32))
        assert why_unsupported(model) == f"{name} is a LayerNorm"
        model = tiny_model()
        model.get_submodule(name).variance_epsilon = 0.1
        assert why_unsupported(model) == f"{name} has an epsilon of its own"
    model = tiny_model()
    model.model.layers[0].self_attn = AtManAttention(model.config, 0)
    assert why_unsupported(model) is None


@pytest.mark.parametrize("family", ["llama", "mistral window", "qwen3"])
def test_a_step_executes_at_most_1_05_times_the_necessary_operations(family):
    model, batch = tiny_model(family), _batch()
    with frozen(model):
        decoder = FrozenDecoder(model, batch)
        decoder(_random_bias(batch))
        with FlopCounterMode(display=False) as counter:
            bias = _random_bias(batch)
            torch.autograd.grad(decoder(bias).sum(), [bias])
    necessary = necessary_flops(DecoderShape.of(model), batch, decoder.windows)
    assert 1.0 <= counter.get_total_flops() / necessary <= 1.05


def test_necessary_operations_of_a_small_batch_counted_by_hand():
    model = tiny_model()
    batch = pack([whole(Rollout([1, 2], [3, 4], [5, 6]))], device=torch.device("cpu"))
    # Rows: two of the CoT and the first of the answer; the last two predict the answer.
    h, dq, dkv, m, rows, n = 32, 64, 32, 48, 3, 2
    after = 2 * dq * h + 6 * h * m
    linear = rows * after + rows * (2 * h * (dq + 2 * dkv) + after) + rows * 4 * h * dkv + n * (2 * h * dq + after)
    linear += n * 2 * h * VOCABULARY
    own, prefix, last_own, last_prefix = 6, 6, 5, 4
    attention = dq * (4 * 12 + 4 * 12 + 4 * 12 + 10 * own + 6 * prefix + 4 * 9 + 10 * last_own + 6 * last_prefix)
    assert necessary_flops(DecoderShape.of(model), batch, [None] * 3) == 2 * linear + attention


def test_bytes_kept_for_the_backward_are_at_most_half_of_plain_autograds():
    model, batch = tiny_model(), _batch()
    model.train()
    plain = saved_bytes(
        model, lambda: model.model(batch.ids[None], position_ids=batch.positions[None], use_cache=False)
    )
    with frozen(model):
        kept = FrozenDecoder(model, batch).kept_bytes
    assert kept <= plain / 2


@pytest.mark.parametrize("family", ["llama tied", "qwen3"])
def test_the_bytes_said_to_be_kept_are_those_alive_between_forward_and_backward(family):
    model = tiny_model(family)
    batch = pack([whole(Rollout([1, 2], [3] * 400, [4, 5]))] * 4, device=torch.device("cpu"))
    bias = _random_bias(batch)
    with frozen(model):
        # Once before, so that nothing is made for the first time while it is watched.
        FrozenDecoder(model, batch)(bias)
        with torch.profiler.profile(profile_memory=True) as profile:
            decoder = FrozenDecoder(model, batch)
            loss = decoder(bias)
    alive = sum(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    workspace = decoder._d_rows.nbytes
    assert loss.requires_grad
    assert decoder.kept_bytes == pytest.approx(alive - workspace, rel=0.03)
