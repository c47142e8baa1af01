"""`atmanrl bench` measures every arm on the same problem and says which did not run."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig

from atmanrl.cli import main
from atmanrl.saliency import throughput
from tests.atmanrl.tiny_models import tiny_model

TINY = ["--queries", "2", "--rollouts", "2", "--prompt", "5", "--cot", "6", "9", "--answer", "2", "--steps", "1"]


@pytest.fixture
def tiny_shape(monkeypatch):
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    monkeypatch.setitem(throughput.SHAPES, "tiny", config)


def test_all_arms_are_measured_and_agree(tiny_shape, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    file = tmp_path / "bench.json"
    assert main(["bench", "--shape", "tiny", *TINY, "--output", str(file)]) == 0
    printed = capsys.readouterr().out
    results = json.loads(file.read_text())
    arms = {arm["arm"]: arm for arm in results["arms"]}
    assert list(arms) == ["fast", "general", "sdpa", "flex", "paper"]
    for name in ("fast", "general", "sdpa", "paper"):
        assert arms[name]["seconds"] > 0
        assert arms[name]["gradient_error"] < 1e-3
        assert name in printed
    assert results["necessary_flops"] > 0


def test_unknown_arms_and_shapes_are_refused(tiny_shape, capsys):
    assert main(["bench", "--shape", "tiny", *TINY, "--arms", "slow"]) == 2
    assert "unknown arm 'slow'; choose from fast, fast-captured, general" in capsys.readouterr().err
    assert main(["bench", "--shape", "huge", *TINY]) == 2
    assert "unknown shape 'huge'; choose one of llama-30m" in capsys.readouterr().err
    assert main(["bench", "--shape", "tiny", *TINY[:-2], "--steps", "0"]) == 2
    assert "must be at least 1" in capsys.readouterr().err


def test_windows_and_unknown_layers_are_said_instead_of_compared_wrongly(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    arms = ["--arms", "fast", "general", "sdpa", "paper"]
    tiny_model("mistral window").save_pretrained(tmp_path / "mistral")
    assert main(["bench", "--model", str(tmp_path / "mistral"), *TINY, *arms]) == 0
    assert capsys.readouterr().out.count("not run: written for full attention") == 2
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4))
    gpt2.save_pretrained(tmp_path / "gpt2")
    file = tmp_path / "bench.json"
    assert main(["bench", "--model", str(tmp_path / "gpt2"), *TINY, *arms, "--output", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "operations not counted" in printed
    assert "nan" not in printed
    by_name = {arm["arm"]: arm for arm in json.loads(file.read_text())["arms"]}
    assert "GPT2LMHeadModel is none of" in by_name["fast"]["skipped"]
    assert by_name["paper"]["gradient_error"] < 1e-3


def test_rollouts_longer_than_the_models_context_are_refused(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path)
    assert main(["bench", "--model", str(tmp_path), *TINY, "--prompt", "100000"]) == 2
    assert "the model's context holds" in capsys.readouterr().err
