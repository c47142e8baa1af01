"""Credit per token in the trainer: what reaches the loss, from which forward, and what it changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from atmanrl.config import CreditConfig, ModelConfig, SeriesConfig
from atmanrl.models import load_policy
from atmanrl.rhythm import credit as credit_assignment
from atmanrl.tasks import Task
from atmanrl.training.trainer import AtManGRPOConfig, AtManGRPOTrainer
from tests.atmanrl.ledger_training import FEW_STEPS, Losses, longer_ledger, settings, train


@pytest.fixture(scope="module")
def longer() -> Task:
    return longer_ledger()


@pytest.mark.parametrize("strategy", ["coupled", "random"])
def test_a_gain_of_1_is_a_run_without_credit_assignment_bit_for_bit(
    longer: Task, tmp_path: Path, strategy: str
) -> None:
    credit = CreditConfig(strategy=strategy, gain=1.0)
    plain, plain_lines = train(longer, tmp_path / "plain", saliency_weight=0.0)
    ours, lines = train(longer, tmp_path / "ours", saliency_weight=0.0, credit_assignment=credit)
    shared = plain_lines[0].keys()
    assert [{name: line.get(name) for name in shared} for line in lines] == [
        {name: line.get(name) for name in shared} for line in plain_lines
    ]
    assert lines[0]["credit/gamma_mean"] == 1.0
    assert any(line["grad_norm"] > 0 for line in lines)
    for (name, parameter), expected in zip(ours.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(parameter, expected), name


class Advantages(AtManGRPOTrainer):
    """Keeps the advantages that reach the loss, with the completions' masks."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self.seen = getattr(self, "seen", [])
        self.seen.append((inputs["advantages"].clone(), inputs["completion_mask"].bool()))
        return super()._compute_loss(model, inputs)


@pytest.mark.parametrize("implementation", ["sdpa", "atman"])
def test_the_loss_gets_the_credit_of_every_token_together_with_the_saliency_reward(
    longer: Task, tmp_path: Path, implementation: str
) -> None:
    model, tokenizer = load_policy(ModelConfig("ledger", attn_implementation=implementation))
    credit = CreditConfig(strategy="global", gain=3.0, series=SeriesConfig(horizon=(2, 50)))
    args = AtManGRPOConfig(**settings(tmp_path, mask=FEW_STEPS, max_steps=2, credit_assignment=credit))
    losses = Losses()
    trainer = Advantages(model, args, longer, tokenizer, callbacks=[losses])
    own_forwards = []
    original = credit_assignment.attention_series
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            credit_assignment, "attention_series", lambda *a, **k: own_forwards.append(1) or original(*a, **k)
        )
        trainer.train()
    # A policy on "atman" shows its attention in the pass for the old log-probabilities.
    assert len(own_forwards) == (1 if implementation == "sdpa" else 0)
    for advantages, mask in trainer.seen:
        assert advantages.shape == mask.shape
        for row, valid in zip(advantages, mask, strict=True):
            values = row[valid]
            plain = values.abs().min()
            amplified = (values.abs() > 1.5 * plain).sum()
            assert torch.allclose(values.abs(), torch.where(values.abs() > 1.5 * plain, 3 * plain, plain))
            assert amplified == (round(0.4 * len(values)) if plain > 0 else 0)
    assert any(bool((advantages != 0).any()) for advantages, _ in trainer.seen)
    assert losses.lines[0]["credit/gamma_mean"] == pytest.approx(1.8, abs=0.1)
    assert "rewards/saliency/mean" in losses.lines[0]


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_pass_that_may_be_the_references_is_not_read(longer: Task, tmp_path: Path, beta: float) -> None:
    """The reference of a LoRA policy is the same model with its adapter switched off."""
    model, tokenizer = load_policy(ModelConfig("ledger", attn_implementation="atman"))
    args = AtManGRPOConfig(**settings(tmp_path, credit_assignment=CreditConfig(strategy="global")))
    trainer = AtManGRPOTrainer(model, args, longer, tokenizer)
    trainer.beta = beta
    ids = torch.ones(2, 20, dtype=torch.int64)
    with torch.no_grad():
        trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 15)
    assert trainer._credit.needs_forward == bool(beta)


@pytest.mark.parametrize("strategy", ["coupled", "entropy"])
def test_the_forward_of_the_credit_changes_neither_masks_nor_rewards(
    longer: Task, tmp_path: Path, strategy: str
) -> None:
    credit = CreditConfig(strategy=strategy, gain=1.0)
    plain, plain_lines = train(longer, tmp_path / "plain", mask=FEW_STEPS, max_steps=4)
    ours, lines = train(longer, tmp_path / "ours", mask=FEW_STEPS, max_steps=4, credit_assignment=credit)
    for line, expected in zip(lines, plain_lines, strict=True):
        assert {key: value for key, value in line.items() if not key.startswith("credit/")} == expected
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), ours.model.parameters(), strict=True))


@pytest.mark.parametrize("implementation", ["sdpa", "atman"])
def test_truncated_rollouts_that_the_loss_leaves_out_get_no_credit_of_their_own(
    longer: Task, tmp_path: Path, implementation: str
) -> None:
    model, tokenizer = load_policy(ModelConfig("ledger", attn_implementation=implementation))
    args = AtManGRPOConfig(
        **settings(
            tmp_path,
            max_steps=2,
            max_completion_length=14,
            mask_truncated_completions=True,
            saliency_weight=0.0,
            credit_assignment=CreditConfig(strategy="coupled", series=SeriesConfig(horizon=(2, 50))),
        )
    )
    trainer = Advantages(model, args, longer, tokenizer)
    trainer.train()
    left_out = [not bool(mask.any()) for _, masks in trainer.seen for mask in masks]
    assert 0 < sum(left_out) < len(left_out)


@pytest.mark.parametrize("strategy", ["local", "entropy", "saliency"])
def test_every_strategy_changes_what_is_learned(longer: Task, tmp_path: Path, strategy: str) -> None:
    plain, _ = train(longer, tmp_path / "plain", saliency_weight=0.0)
    ours, _ = train(longer, tmp_path / "ours", saliency_weight=0.0, credit_assignment=CreditConfig(strategy=strategy))
    assert any(not torch.equal(a, b) for a, b in zip(plain.model.parameters(), ours.model.parameters(), strict=True))


def test_credit_assignment_refuses_the_liger_loss(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use_liger_kernel computes with one advantage per rollout"):
        AtManGRPOConfig(**settings(tmp_path, use_liger_kernel=True, credit_assignment=CreditConfig(strategy="random")))
