"""Ledger: what the generator promises, what the shipped checkpoint does, and that its script reproduces it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from atmanrl.config import DataConfig, LedgerConfig
from atmanrl.tasks import DataError, load_task
from atmanrl.tasks.ledger import (
    CHECKPOINT,
    FILLER,
    NAMES,
    WORDS,
    build_tokenizer,
    classify_tokens,
    sample_chain,
    sample_examples,
)
from benchmarks.ledger_pretrain import (
    PretrainConfig,
    batches,
    main,
    measure,
    measure_interventions,
    measure_suppression,
    pretrain,
)

RECORD = json.loads((CHECKPOINT / "record.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT).eval()


def test_every_word_is_one_token_and_prompts_begin_with_one_bos():
    tokenizer = build_tokenizer()
    assert len(tokenizer) == len(WORDS)
    prompt = load_task(DataConfig()).train[0]["prompt"]
    ids = tokenizer.encode(prompt)
    assert len(ids) == len(prompt.split()) + 1
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == f"<b> {prompt}"


def test_answers_repeat_the_asked_pairs_in_the_order_asked():
    task = load_task(DataConfig(train_limit=50))
    for row in task.train:
        ledger, asked = row["prompt"].split(" ? ")
        words = ledger.split()
        pairs = dict(zip(words[::2], words[1::2], strict=True))
        assert asked.split() == [*row["asked"], "<cot>"]
        assert row["answer"] == " ".join(f"{name} {pairs[name]}" for name in row["asked"])


def test_rows_follow_from_the_seed_and_held_out_prompts_are_disjoint_across_seeds():
    sizes = LedgerConfig(train_size=2000, test_size=300)
    tasks = [load_task(DataConfig(seed=seed, ledger=sizes)) for seed in (0, 1)]
    again = load_task(DataConfig(seed=0, ledger=sizes))
    assert again.train["prompt"][:] == tasks[0].train["prompt"][:]
    assert tasks[0].train["prompt"][:] != tasks[1].train["prompt"][:]
    trained = {prompt for task in tasks for prompt in task.train["prompt"]}
    held_out = {prompt for task in tasks for prompt in task.test["prompt"]}
    assert not trained & held_out
    assert len(set(tasks[0].train["prompt"])) == 2000


def test_filler_and_lookups_come_with_their_probabilities():
    config = LedgerConfig()
    rng = random.Random(0)
    examples = list(islice(sample_examples(config, 0, held_out=False), 4000))
    chains = [sample_chain(example, config, rng, example.pairs) for example in examples]
    gaps = len(chains) * (config.asked - 1)
    filler = sum(word in FILLER for chain in chains for word in chain)
    lookups = sum(sum(word in NAMES for word in chain) - config.asked for chain in chains)
    p = config.filler_probability
    # Five standard errors of a geometric and of a Bernoulli mean.
    assert filler / gaps == pytest.approx(p / (1 - p), abs=5 * (p / (1 - p) ** 2 / gaps) ** 0.5)
    q = config.lookup_probability
    assert lookups / gaps == pytest.approx(q, abs=5 * (q * (1 - q) / gaps) ** 0.5)


def test_chains_copy_the_asked_pairs_in_order():
    config = LedgerConfig()
    rng = random.Random(1)
    for example in islice(sample_examples(config, 0, held_out=False), 50):
        chain = sample_chain(example, config, rng, example.pairs)
        copied = [(name, value) for name, value in pairwise(chain) if name in NAMES]
        assert all(example.pairs[name] == value for name, value in copied)
        assert tuple(name for name, _ in copied if name in example.asked) == example.asked


def test_classes_tell_needed_values_from_filler_and_the_rest():
    words = ["c", "0", ".", ".", "b", "6", "~", "d", "4", "e", "8", "<ans>", "c", "0", "b", "6", "e", "8", "<eos>"]
    needed, filler, other = "needed", "filler", "other"
    chain = [other, needed, filler, filler, other, needed, filler, other, other, other, needed]
    assert classify_tokens({"asked": ["c", "b", "e"]}, words) == chain + [other] * 8
    assert classify_tokens({"asked": ["c"]}, []) == []
    task = load_task(DataConfig(train_limit=1, test_limit=1))
    assert task.classify_tokens is classify_tokens
    assert task.token_classes == (needed, filler, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"asked": 6}, r"asked must lie between 1 and pairs \(5\), got 6"),
        ({"pairs": 9}, r"pairs must be at most 8, the number of names, got 9"),
        ({"filler_probability": 1.0}, r"filler_probability must lie in \[0, 1\), got 1.0"),
        ({"random_value_fraction": -0.1}, r"random_value_fraction must lie in \[0, 1\], got -0.1"),
        ({"test_size": 0}, "train_size and test_size must be positive, got 4096 and 0"),
    ],
)
def test_impossible_ledgers_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        load_task(DataConfig(ledger=LedgerConfig(**settings)))


def test_a_ledger_with_fewer_prompts_than_rows_is_an_error():
    with pytest.raises(DataError, match=r"make about 70 train prompts; train_size must be at most 35, got 40"):
        load_task(DataConfig(ledger=LedgerConfig(pairs=1, asked=1, train_size=40, test_size=5)))


def test_the_shipped_checkpoint_is_small_and_reaches_its_recorded_accuracy(model, tokenizer):
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 2_000_000
    measured = RECORD["measured"]
    assert 0.95 <= measured["accuracy"] <= 0.99
    rows = list(load_task(DataConfig(seed=5, ledger=LedgerConfig(test_size=200))).test)
    now = measure(model, tokenizer, rows)
    # Four standard errors of 200 samples.
    assert now["accuracy"] == pytest.approx(measured["accuracy"], abs=4 * (0.02 * 0.98 / 200) ** 0.5)
    assert now["filler"] == pytest.approx(measured["filler"], abs=0.5)
    assert measured["filler"] > 1


def test_the_shipped_tokenizer_is_the_built_one(tokenizer):
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    prompt = load_task(DataConfig(train_limit=1)).train[0]["prompt"]
    assert tokenizer.encode(prompt) == build_tokenizer().encode(prompt)


def test_the_answer_follows_the_needed_values_and_nothing_filler_says(model, tokenizer):
    """The truth that `classify_tokens` states, by intervention on the chain of thought."""
    config = LedgerConfig()
    examples = list(islice(sample_examples(config, 1, held_out=True), 60))
    counts = measure_interventions(model, tokenizer, examples, config, seed=1)
    assert counts["intact chain"] == {"replaced": 60, "changed": 0}
    assert counts["needed value"] == {"replaced": 180, "changed": 180}
    assert counts["filler"]["replaced"] > 50
    assert counts["filler"]["changed"] == 0
    assert counts["other value"]["replaced"] > 10
    assert counts["other value"]["changed"] == 0
    for kind in ("asked name", "other name"):
        assert counts[kind]["changed"] <= 0.05 * counts[kind]["replaced"]


def test_a_suppressed_chain_is_missed_and_an_unbiased_one_is_not(model, tokenizer):
    examples = list(islice(sample_examples(LedgerConfig(), 1, held_out=True), 40))
    attention = model.config._attn_implementation
    suppressed = measure_suppression(model, tokenizer, examples, LedgerConfig())
    assert suppressed["loss_intact"] < 0.02
    assert suppressed["loss_suppressed"] > 10 * suppressed["loss_intact"]
    assert model.config._attn_implementation == attention
    unbiased = measure_suppression(model, tokenizer, examples, LedgerConfig(), bias=0.0)
    assert unbiased["loss_suppressed"] == pytest.approx(suppressed["loss_intact"], rel=1e-4)


def test_masked_chains_carry_no_loss_and_their_answers_follow_them():
    tokenizer = build_tokenizer()
    config = PretrainConfig(batch_size=200)
    batch = next(batches(config, tokenizer))
    chain_marker, answer_marker = (tokenizer.convert_tokens_to_ids(word) for word in ("<cot>", "<ans>"))
    masked = 0
    for ids, weights in zip(batch.input_ids.tolist(), batch.weights.tolist(), strict=True):
        start, end = ids.index(chain_marker) + 1, ids.index(answer_marker)
        assert not any(weights[:start])
        assert all(weight == 1 for weight, i in zip(weights[end + 1 :], ids[end + 1 :], strict=True) if i)
        assert set(weights[start:end]) in ({0}, {1})
        masked += not any(weights[start:end])
    # Five standard errors of a binomial.
    share = config.ledger.random_value_fraction
    assert masked / 200 == pytest.approx(share, abs=5 * (share * (1 - share) / 200) ** 0.5)


def test_pretraining_is_a_function_of_its_configuration():
    config = PretrainConfig(batch_size=8, log_every=1)
    runs = [pretrain(config, build_tokenizer(), steps=3) for _ in range(2)]
    assert runs[0][1] == runs[1][1]
    for a, b in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert pretrain(replace(config, seed=1), build_tokenizer(), steps=3)[1] != runs[0][1]


@pytest.mark.slow
def test_the_script_retraces_the_recorded_loss():
    config = PretrainConfig(**{**RECORD["config"], "ledger": LedgerConfig(**RECORD["config"]["ledger"])})
    assert config == PretrainConfig(seed=config.seed)
    _, losses = pretrain(config, build_tokenizer(), steps=50)
    assert losses == {50: pytest.approx(RECORD["losses"]["50"], rel=1e-3)}


def test_the_script_writes_a_loadable_checkpoint_with_its_record(tmp_path, capsys):
    main(["--output", str(tmp_path), "--steps", "4", "--warmup", "2", "--batch_size", "4", "--evaluated", "10"])
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["config"]["steps"] == 4
    assert record["command"].startswith("python -m benchmarks.ledger_pretrain --output")
    assert set(record["measured"]) == {"prompts", "accuracy", "cot_tokens", "filler", "needed"}
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert json.loads(capsys.readouterr().out)["parameters"] == record["parameters"] == RECORD["parameters"]


def test_importing_the_configuration_loads_no_torch():
    code = "import sys, atmanrl.config; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_documented_figures_are_those_of_the_record():
    text = (Path(__file__).parents[2] / "docs" / "ledger.md").read_text("utf-8")
    measured = RECORD["measured"]
    assert f"held-out prompts its accuracy is {measured['accuracy']:.3f}, with {measured['filler']:.2f} filler" in text
    assert f"and {measured['cot_tokens']:.2f} tokens per chain of thought" in text
    assert f"a Llama of {RECORD['parameters']:,} parameters" in text
    for kind, count in RECORD["interventions"].items():
        if kind != "intact chain":
            assert f"| {kind} | {count['replaced']} | {count['changed']} |" in text
    suppression = RECORD["suppression"]
    assert f"{suppression['loss_intact']:.4f} nats" in text
    assert f"{suppression['loss_suppressed']:.2f} with a bias of -4" in text
    assert RECORD["command"] in text
