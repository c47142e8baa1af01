"""What the kernels do not compute is refused by name, and bad arguments are told the numbers that clash."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import PreTrainedModel, StaticCache
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from atman_kernels import AttentionPlan
from atman_kernels.hf import KeyValueRecord, atman_mask
from tests.atman_kernels.families import VOCABULARY, padding_mask, random_ids, random_model


def refusal(what: str) -> str:
    return rf'^attn_implementation="atman" does not support {what}.*; use "eager" or "sdpa" for it$'


def test_logit_softcapping_is_refused():
    model = random_model("gemma2", attn_logit_softcapping=50.0)
    with pytest.raises(ValueError, match=refusal(r"logit softcapping \(Gemma2Attention: softcap 50\.0\)")):
        model(random_ids(1, 4))


def test_attention_sinks_are_refused():
    config = transformers.GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        pad_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation("atman")
    with pytest.raises(ValueError, match=refusal(r"attention sinks \(GptOssAttention\)")):
        model(random_ids(1, 4))


def test_dropout_is_refused_in_training_only():
    model = random_model("llama", attention_dropout=0.1)
    model(random_ids(1, 4))
    with pytest.raises(ValueError, match=refusal(r"attention dropout \(LlamaAttention: p = 0\.1")):
        model.train()(random_ids(1, 4))


def test_attention_maps_are_refused():
    with pytest.raises(ValueError, match=refusal("output_attentions=True")):
        random_model("llama")(random_ids(1, 4), output_attentions=True)


def test_bidirectional_attention_is_refused():
    with pytest.raises(ValueError, match=refusal(r"bidirectional attention \(LlamaAttention\)")):
        random_model("llama")(random_ids(1, 4), is_causal=False)


def test_positions_that_restart_are_refused_without_a_plan():
    position_ids = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(ValueError, match=refusal("packed sequences told apart by position_ids")):
        random_model("llama")(random_ids(1, 5), position_ids=position_ids, use_cache=False)


def a_mask_of_ones_own(batch_idx, head_idx, q_idx, kv_idx):
    return kv_idx <= q_idx - 1


OVERLAY = sliding_window_overlay(3)
COMBINATION = "a combination of causal and window masks other than their intersection"
REFUSED = {
    "packed sequences": and_masks(causal_mask_function, packed_sequence_mask_function(torch.zeros(1, 4))),
    "chunked attention": chunked_causal_mask_function(2, torch.zeros(1)),
    "blocks of bidirectional attention": or_masks(causal_mask_function, blockwise_overlay(torch.zeros(1, 4))),
    "bidirectional attention": bidirectional_mask_function,
    "bidirectional sliding-window attention": sliding_window_bidirectional_mask_function(3),
    COMBINATION: or_masks(causal_mask_function, OVERLAY),
    "the mask function a_mask_of_ones_own": and_masks(causal_mask_function, a_mask_of_ones_own),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("rows", [1, 4])
def test_other_mask_functions_are_refused_by_name(name, rows):
    model = random_model("llama")
    mask = atman_mask(1, rows, 4, 4 - rows, mask_function=REFUSED[name])
    layer = model.model.layers[0].self_attn
    hidden = torch.randn(1, rows, 32)
    position_embeddings = model.model.rotary_emb(hidden, torch.arange(rows)[None])
    with pytest.raises(ValueError, match=refusal(name)):
        layer(hidden, position_embeddings=position_embeddings, attention_mask=mask)


@pytest.mark.parametrize(
    ("mask_function", "window"),
    [
        (causal_mask_function, None),
        (sliding_window_causal_mask_function(3), 3),
        (and_masks(causal_mask_function, sliding_window_causal_mask_function(7), OVERLAY), 3),
    ],
)
def test_causal_masks_with_windows_are_understood(mask_function, window):
    mask = atman_mask(1, 4, 4, mask_function=mask_function)
    assert (mask.window, mask.refused) == (window, None)


def test_a_window_without_causality_is_refused():
    assert atman_mask(1, 4, 4, mask_function=OVERLAY).refused == COMBINATION


def causal(n: int) -> torch.Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_4d_mask_that_is_causal_with_padding_is_computed(dtype):
    model, ids, padding = random_model("llama"), random_ids(2, 6), padding_mask([6, 4], "left")
    matrix = (causal(6) & padding.bool()[:, None, :])[:, None]
    if dtype != torch.bool:
        matrix = torch.where(matrix, 0.0, torch.finfo(dtype).min)
    with torch.no_grad():
        expected = model(ids, attention_mask=padding, position_ids=torch.arange(6)[None]).logits
        assert torch.equal(model(ids, attention_mask=matrix).logits, expected)


@pytest.mark.parametrize(
    ("matrix", "what"),
    [
        (torch.ones(1, 1, 6, 6, dtype=torch.bool), "a 4D attention mask that is not causal attention with padding"),
        (causal(6)[None, None].index_fill(3, torch.tensor(2), False) | torch.eye(6).bool(), "a 4D attention mask that"),
        (torch.full((1, 1, 6, 6), -0.5), "a 4D attention mask with values other than 0 and -inf .*key_bias"),
        (causal(6)[None, None].long(), "a 4D attention mask of dtype torch.int64"),
        (causal(6).expand(1, 4, 6, 6), r"a 4D attention mask of shape \(1, 4, 6, 6\) where \(1, 1, 6, 6\)"),
    ],
)
def test_other_4d_masks_are_refused(matrix, what):
    with pytest.raises(ValueError, match=refusal(what)):
        random_model("llama")(random_ids(1, 6), attention_mask=matrix)


def test_a_three_dimensional_mask_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(B, T\), got \(1, 6, 6\)"):
        random_model("llama")(random_ids(1, 6), attention_mask=causal(6)[None])


def test_generate_rejects_key_bias():
    with pytest.raises(ValueError, match=r"not used by the model: \['key_bias'\]"):
        random_model("llama").generate(random_ids(1, 4), key_bias=torch.zeros(1, 4), max_new_tokens=1)


def test_other_implementations_drop_key_bias_in_silence():
    model, ids, bias = random_model("llama", "sdpa"), random_ids(1, 4), torch.tensor([[-9.0, 0.0, 0.0, 0.0]])
    assert torch.equal(model(ids, key_bias=bias).logits, model(ids).logits)
    model.set_attn_implementation("atman")
    assert not torch.equal(model(ids, key_bias=bias).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("key_bias", "message"),
    [
        (torch.zeros(2, 5), r"one number per token that the model has seen, shape \(2, 6\), got \(2, 5\)"),
        (torch.zeros(1, 6), r"shape \(2, 6\), got \(1, 6\)"),
        (torch.zeros(6), r"shape \(2, 6\), got \(6,\)"),
        (torch.zeros(2, 1, 6, 6), r"shape \(2, 6\), got \(2, 1, 6, 6\)"),
        (torch.zeros(2, 6, dtype=torch.bfloat16), "key_bias must be float32, got torch.bfloat16"),
        (torch.zeros(2, 6, dtype=torch.int64), "key_bias must be float32, got torch.int64"),
        (torch.zeros(2, 6, device="meta"), "key_bias is on meta, the model's keys on cpu"),
        (torch.full((2, 6), torch.nan), "key_bias must be finite or -inf, got nan"),
        (torch.full((2, 6), torch.inf), "key_bias must be finite or -inf, got inf"),
    ],
)
@pytest.mark.parametrize("attention_mask", [None, torch.ones(2, 6)])
def test_a_wrong_key_bias_is_told_what_is_wrong(key_bias, message, attention_mask):
    with pytest.raises(ValueError, match=message):
        random_model("llama")(random_ids(2, 6), attention_mask=attention_mask, key_bias=key_bias)


def test_a_bias_for_the_new_tokens_alone_is_refused():
    model = random_model("llama")
    for cache in (None, StaticCache(config=model.config, max_cache_len=9)):
        cache = model(random_ids(1, 4), past_key_values=cache, use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"shape \(1, 6\), got \(1, 2\)"):
            model(random_ids(1, 2), past_key_values=cache, key_bias=torch.zeros(1, 2))


def packed(model: PreTrainedModel, **kwargs: object) -> None:
    arguments = {"position_ids": torch.arange(4)[None], "attention_plan": AttentionPlan([4]), "use_cache": False}
    model(random_ids(1, 4), **{**arguments, **kwargs})


def test_a_plan_needs_a_packed_batch():
    with pytest.raises(ValueError, match=r"packed batch of shape \(1, T_total\), got a batch of 2"):
        random_model("llama")(random_ids(2, 4), attention_plan=AttentionPlan([4]), use_cache=False)


def test_a_plan_needs_the_rows_it_describes():
    with pytest.raises(ValueError, match="the plan describes 5 rows and 5 keys, the tensors have 4 and 4"):
        packed(random_model("llama"), attention_plan=AttentionPlan([2, 3]))


def test_a_packed_bias_has_one_number_per_packed_token():
    with pytest.raises(ValueError, match=r"shape \(1, 4\), got \(4,\)"):
        packed(random_model("llama"), key_bias=torch.zeros(4))


def test_a_prefix_needs_a_plan():
    with pytest.raises(ValueError, match="shared_prefix needs attention_plan"):
        random_model("llama")(random_ids(1, 4), shared_prefix=KeyValueRecord())


def test_a_prefix_needs_every_layer():
    model, record = random_model("llama"), KeyValueRecord()
    packed(model, capture=record)
    plan = AttentionPlan([4], prefix_start=[0], prefix_length=[4])
    with pytest.raises(ValueError, match="shared_prefix has 2 layers, but layer 2 needs one"):
        packed(model, attention_plan=plan, shared_prefix=[record.layer(0), record.layer(1)])
    with pytest.raises(ValueError, match="one SharedPrefix per layer, got a single one"):
        packed(model, attention_plan=plan, shared_prefix=record.layer(0))
    with pytest.raises(ValueError, match="no keys were recorded for layer 0"):
        packed(model, attention_plan=plan, shared_prefix=KeyValueRecord())


@pytest.mark.parametrize("family", ["StableLm", "Nemotron"])
@pytest.mark.parametrize("tokens", [8, 1])
def test_a_bias_that_reaches_no_layer_is_an_error(family, tokens):
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "pad_token_id": 0,
    }
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**shape)).eval()
    model.set_attn_implementation("atman")
    ids = random_ids(1, tokens)
    model(ids)
    with pytest.raises(ValueError, match=rf"^{family}\w*Attention did not get key_bias, which the model's forward"):
        model(ids, key_bias=torch.zeros(1, tokens))
    model(ids)
