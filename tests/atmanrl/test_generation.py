"""Only the recipe decides how tokens are drawn, whatever the checkpoint's generation config says."""

from __future__ import annotations

import logging

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from atmanrl import generation
from atmanrl.generation import GenerationSettings, generate, recipe_alone
from atmanrl.tasks.ledger import CHECKPOINT

PENALTIES = {
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "min_p": 0.9,
    "top_p": 0.1,
    "top_k": 1,
    "temperature": 9.0,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.3,
    "eta_cutoff": 0.3,
    "suppress_tokens": [5, 6, 9],
    "begin_suppress_tokens": [5, 6, 9],
    "bad_words_ids": [[5], [6]],
    "sequence_bias": [[[5], -9.0]],
    "min_new_tokens": 12,
    "min_length": 40,
    "forced_eos_token_id": 9,
    "guidance_scale": 2.0,
    "exponential_decay_length_penalty": (1, 5.0),
    "num_beams": 3,
    "max_time": 1e-9,
    "stop_strings": ["c"],
    "return_dict_in_generate": True,
}


@pytest.fixture(scope="module")
def ledger():
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT), AutoTokenizer.from_pretrained(CHECKPOINT)


def drawn(model, tokenizer):
    prompt = tokenizer.encode("a 6 c 0 ? c <cot>")
    settings = (GenerationSettings(12, 0.0), GenerationSettings(12, 1.0, samples=4))
    return [generate(model, tokenizer, [prompt], each, seed=0) for each in settings]


@pytest.mark.parametrize("name", PENALTIES)
def test_no_setting_of_the_checkpoint_changes_a_completion(ledger, monkeypatch, name):
    model, tokenizer = ledger
    plain = drawn(model, tokenizer)
    monkeypatch.setattr(model.generation_config, name, PENALTIES[name])
    assert drawn(model, tokenizer) == plain
    assert getattr(model.generation_config, name) == PENALTIES[name]


def test_every_field_that_transformers_knows_is_at_its_default_while_tokens_are_drawn(ledger, monkeypatch):
    model, _ = ledger
    config = model.generation_config
    fields = [name for name in vars(GenerationConfig()) if name not in generation._NO_SAMPLING and name[0] != "_"]
    for name in fields:
        monkeypatch.setattr(config, name, "set by the checkpoint", raising=False)
    monkeypatch.setattr(config, "a_custom_field", 1, raising=False)
    ends = config.eos_token_id
    with recipe_alone(model, GenerationConfig(max_new_tokens=3)):
        assert {name: getattr(config, name) for name in fields} == {
            name: getattr(GenerationConfig(), name) for name in fields
        }
        assert not hasattr(config, "a_custom_field")
        assert config.eos_token_id == ends
    assert all(getattr(config, name) == "set by the checkpoint" for name in fields)


def test_what_the_checkpoint_would_have_changed_is_said_once(ledger, monkeypatch, caplog):
    model, tokenizer = ledger
    monkeypatch.setattr(generation, "_said", set())
    with caplog.at_level(logging.WARNING, logger="atmanrl.generation"):
        drawn(model, tokenizer)
        assert not caplog.records
        monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.1)
        drawn(model, tokenizer)
        drawn(model, tokenizer)
    (record,) = caplog.records
    assert record.getMessage().endswith("only the recipe's sampling settings count: repetition_penalty=1.1")
