"""A plain copy computes what the wrapped policy computes, and training with adapters leaves the weights alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers.modeling_utils

from atmanrl import MaskConfig, Rollout, optimize_masks
from atmanrl.cli import main
from atmanrl.config import ModelConfig
from atmanrl.models import load_model, load_policy, plain, plain_copy
from atmanrl.saliency.decoder import why_unsupported
from tests.atmanrl.tiny import llama

IDS = torch.tensor([[1, 5, 9, 6, 12, 4]])


def with_adapters(model: Any) -> Any:
    """LoRA on every linear layer, away from its start at zero."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return adapted.eval()


def test_a_copy_of_an_adapted_model_computes_its_logits_on_the_fast_path() -> None:
    adapted = with_adapters(llama(50))
    before = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    copied = plain_copy(adapted, torch.float32)
    expected = adapted(IDS).logits
    torch.testing.assert_close(copied(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    with adapted.disable_adapter():
        assert (adapted(IDS).logits - expected).abs().max() > 1e-2
    assert why_unsupported(copied) is None
    for name, parameter in adapted.named_parameters():
        assert torch.equal(parameter, before[name]), name


@contextmanager
def gathered(parameters: Sequence[Any]) -> Iterator[None]:
    for parameter in parameters:
        parameter.data = parameter.whole
    yield
    for parameter in parameters:
        parameter.data = torch.empty(0)


@pytest.fixture
def zero3(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run with ZeRO-3 finds, without DeepSpeed: making a model the usual way shards it."""
    deepspeed: Any = ModuleType("deepspeed")
    deepspeed.__spec__ = ModuleSpec("deepspeed", None)
    deepspeed.zero = SimpleNamespace(GatheredParameters=gathered, Init=lambda **_: pytest.fail("the copy is sharded"))
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    monkeypatch.setattr(transformers.modeling_utils, "is_deepspeed_zero3_enabled", lambda: True)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.usefixtures("zero3")
def test_a_copy_of_a_model_sharded_by_zero3_is_whole_and_has_its_adapters(adapted: bool) -> None:
    model = with_adapters(llama(50)) if adapted else llama(50)
    expected = model(IDS).logits
    for i, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.whole, parameter.data = i, parameter.data, torch.empty(0)
    torch.testing.assert_close(plain_copy(model, torch.float32)(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert not any(parameter.numel() for parameter in model.parameters())


def test_a_policy_that_zero3_shards_while_it_is_loaded_is_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(50)
    for i, parameter in enumerate(model.parameters()):
        parameter.ds_id = i
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    assert load_model(ModelConfig("ledger"), device="meta").device.type == "cpu"


@pytest.mark.usefixtures("zero3")
def test_a_dry_run_under_zero3_shards_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "ledger", "--output_dir", str(tmp_path / "run"), "--dry-run"]) == 0
    assert "0.1405 M parameters in float32" in capsys.readouterr().out


def test_masks_of_the_copy_are_those_of_the_adapted_model() -> None:
    adapted = with_adapters(llama(50))
    rollouts = [Rollout((1, 5, 9), (6, 12, 4, 8), (7, 2)), Rollout((1, 3), (9, 9, 30), (11,))]
    config = MaskConfig(steps=20, lr=0.01)
    ours = optimize_masks(plain_copy(adapted, torch.float32), rollouts, config)
    theirs = optimize_masks(adapted, rollouts, config)
    for a, b in zip(ours, theirs, strict=True):
        assert a.loss_initial == pytest.approx(b.loss_initial, abs=1e-5)
        torch.testing.assert_close(a.mask, b.mask, atol=1e-3, rtol=0)


def test_a_copy_keeps_tied_embeddings_tied_and_has_the_dtype_asked_for() -> None:
    model = llama(50, tie_word_embeddings=True)
    copied = plain_copy(model, torch.bfloat16)
    assert copied.get_output_embeddings().weight is copied.get_input_embeddings().weight
    assert {parameter.dtype for parameter in copied.parameters()} == {torch.bfloat16}
    # Rotary frequencies are no weights: rounded, they would shift every position.
    assert torch.equal(copied.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    torch.testing.assert_close(copied(IDS).logits.float(), model(IDS).logits, atol=0.02, rtol=0)


def test_a_model_with_whole_weights_is_not_copied() -> None:
    model = llama(50)
    assert plain(model, torch.float32) is model
    assert plain(model, torch.bfloat16) is not model


def test_an_adapter_that_is_no_lora_is_refused_by_name() -> None:
    adapted = peft.get_peft_model(
        llama(50), peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    )
    with pytest.raises(ValueError, match="k_proj is a Linear: only an unmerged plain LoRA"):
        plain_copy(adapted, torch.float32)


def test_training_adapters_changes_no_weight_and_saves_the_merged_model(tmp_path: Path) -> None:
    command = [
        *("train", "--config", "ledger", "--data.ledger.train_size", "4", "--output_dir", str(tmp_path / "run")),
        *("--per_device_train_batch_size", "8", "--num_generations", "4", "--max_steps", "2", "--save_strategy", "no"),
        *("--mask.steps", "3", "--learning_rate", "1e-2", "--model.lora.rank", "4", "--report_to", "none"),
        *("--evaluation.prompts", "4", "--evaluation.samples", "1"),
    ]
    assert main(command) == 0
    start, _ = load_policy(ModelConfig("ledger"))
    saved = peft.PeftModel.from_pretrained(start, tmp_path / "run" / "adapter").eval()
    trained, _ = load_policy(ModelConfig(str(tmp_path / "run" / "model")))
    torch.testing.assert_close(trained(IDS).logits, saved(IDS).logits, atol=1e-4, rtol=1e-4)
    with saved.disable_adapter():
        assert (saved(IDS).logits - trained(IDS).logits).abs().max() > 1e-3
    assert (tmp_path / "run" / "summary.json").is_file()


def test_a_policy_that_lacks_a_parameter_is_not_copied_with_whatever_lay_in_memory() -> None:
    model = llama(50)
    del model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"no parameter model\.layers\.0\.mlp\.up_proj\.weight"):
        plain_copy(model, torch.float32)
