"""The trainer against TRL's own, and what it adds: rewards, metrics, and stopping at numbers that are none."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from atmanrl import MaskConfig, estimate_saliency, optimize_masks, saliency_reward
from atmanrl.answers import split_completion
from atmanrl.config import DataConfig, LedgerConfig, ModelConfig
from atmanrl.models import load_policy
from atmanrl.rollout import Rollout
from atmanrl.tasks import Task, load_task
from atmanrl.training.callbacks import RolloutPages
from atmanrl.training.trainer import AtManGRPOConfig, AtManGRPOTrainer, NonFiniteError
from tests.atmanrl.ledger_training import FEW_STEPS, Losses, longer_ledger, settings, train
from tests.atmanrl.tiny import byte_level_tokenizer, llama, write_gsm8k


@pytest.fixture(scope="module")
def ledger() -> Task:
    return load_task(DataConfig(ledger=LedgerConfig(train_size=4, test_size=2)))


@pytest.fixture(scope="module")
def longer() -> Task:
    return longer_ledger()


def train_with_trl(task: Task, directory: Path) -> tuple[GRPOTrainer, list[dict[str, float]]]:
    model, tokenizer = load_policy(ModelConfig("ledger"))

    def outcome(completion_ids: list[list[int]], answer: list[str], **columns: Any) -> list[float]:
        rewards = []
        for ids, gold in zip(completion_ids, answer, strict=True):
            parsed = split_completion(ids, tokenizer, task.answer_format).answer
            rewards.append(0.0 if parsed is not None and task.answer_format.matches(parsed.value, gold) else -1.0)
        return rewards

    losses = Losses()
    trainer = GRPOTrainer(
        model,
        reward_funcs=[outcome],
        args=GRPOConfig(**settings(directory)),
        train_dataset=task.train,
        processing_class=tokenizer,
        callbacks=[losses],
    )
    trainer.train()
    return trainer, losses.lines


@pytest.mark.parametrize("log_saliency", [False, True], ids=["off", "logged"])
def test_with_weight_0_every_loss_and_parameter_is_trls_own_bit_for_bit(
    ledger: Task, tmp_path: Path, log_saliency: bool
) -> None:
    # Three generation batches at two per epoch: the order of a second epoch is compared as well.
    ours, our_lines = train(ledger, tmp_path / "ours", saliency_weight=0.0, log_saliency=log_saliency)
    theirs, their_lines = train_with_trl(ledger, tmp_path / "theirs")
    shared = their_lines[0].keys()
    assert {"loss", "grad_norm", "reward", "entropy"} <= shared
    assert [{name: line.get(name) for name in shared} for line in our_lines] == [
        {name: line.get(name) for name in shared} for line in their_lines
    ]
    for (name, parameter), expected in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(parameter, expected), name


@pytest.mark.parametrize("estimator", ["mask", "best", "attention"])
def test_the_saliency_reward_of_a_batch_is_that_of_its_rollouts(ledger: Task, tmp_path: Path, estimator: str) -> None:
    model, tokenizer = load_policy(ModelConfig("ledger"))
    chosen = {"mask": FEW_STEPS, "saliency_estimator": estimator, "direction": "printed"}
    args = AtManGRPOConfig(**settings(tmp_path, saliency_weight=0.5, **chosen))
    trainer = AtManGRPOTrainer(model, args, ledger, tokenizer)
    rows = [ledger.train[i] for i in range(2) for _ in range(4)]
    batch = trainer._generate_and_score_completions(rows)
    rollouts, outcomes = [], []
    for i, row in enumerate(rows):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist()
        split = split_completion(batch["completion_ids"][i].tolist(), tokenizer, ledger.answer_format)
        rollouts.append(Rollout(prompt, split.cot_ids, split.answer_ids, split.marker_ids))
        correct = split.answer is not None and ledger.answer_format.matches(split.answer.value, row["answer"])
        outcomes.append(0.0 if correct else -1.0)
    if estimator == "mask":
        saliency = saliency_reward(optimize_masks(model, rollouts, FEW_STEPS), direction="printed")
    else:
        saliency = saliency_reward(estimate_saliency(model, rollouts, estimator), direction="printed")
    rewards = torch.tensor(outcomes) + 0.5 * saliency
    groups = rewards.view(2, 4)
    torch.testing.assert_close(batch["advantages"], (groups - groups.mean(dim=1, keepdim=True)).flatten())
    assert saliency.std() > 0


def test_training_changes_parameters_and_logs_masks_by_token_class(ledger: Task, tmp_path: Path) -> None:
    trainer, lines = train(ledger, tmp_path, max_steps=2)
    before, _ = load_policy(ModelConfig("ledger"))
    assert any(
        not torch.equal(now, then) for now, then in zip(trainer.model.parameters(), before.parameters(), strict=True)
    )
    first, second = lines
    for name in (
        "rewards/saliency/mean",
        "mask/loss_initial",
        "mask/loss_final",
        "mask/loss_unmasked",
        "mask/restored_mass",
        "answers/parse_failures",
        "completions/clipped_ratio",
        "frac_reward_zero_std",
        "cot/filler",
        "mask/restored/needed",
    ):
        assert name in first, name
        # The second pass over the batch samples and scores nothing.
        assert name not in second, name
    assert first["mask/loss_final"] < first["mask/loss_initial"]
    assert set(trainer.seconds) == {"generation", "saliency", "update"}
    assert trainer.model.training
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_the_rollouts_for_a_page_are_those_that_were_rewarded(ledger: Task, tmp_path: Path) -> None:
    trainer, lines = train(ledger, tmp_path, max_steps=2, reduction="tokens")
    run = trainer.sampled(8)
    assert run is not None
    assert run.label == "step 2"
    means = [statistics.fmean(record.restored) for record in run.rollouts if record.restored]
    assert sum(means) / 8 == pytest.approx(lines[0]["rewards/saliency/mean"], abs=1e-6)
    assert statistics.fmean(bool(record.correct) for record in run.rollouts) == lines[0]["answers/accuracy"]
    assert {name for record in run.rollouts for name in record.classes} == {"needed", "filler", "other"}
    assert len({record.prompt_id for record in run.rollouts}) == 2
    unscored, _ = train(ledger, tmp_path, max_steps=2, saliency_weight=0.0)
    assert unscored.sampled(8) is None


@pytest.mark.parametrize("every", [2, 0])
def test_pages_are_written_every_so_many_steps(ledger: Task, tmp_path: Path, every: int) -> None:
    model, tokenizer = load_policy(ModelConfig("ledger"))
    trainer = AtManGRPOTrainer(model, AtManGRPOConfig(**settings(tmp_path, mask=FEW_STEPS)), ledger, tokenizer)
    trainer.add_callback(RolloutPages(partial(trainer.sampled, 3), every))
    parts: list[str] = []
    trainer.watch = parts.append
    trainer.train()
    pages = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "rollouts").glob("*.html")}
    assert sorted(pages) == (["step-2.html", "step-4.html", "step-6.html"] if every else [])
    assert all("Rollouts sampled before" in page for page in pages.values())
    assert parts[:4] == ["generation", "update", "saliency", "update"]


def test_a_real_step_on_a_gsm8k_file_with_a_random_llama(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    task = load_task(DataConfig(name="gsm8k", path=str(write_gsm8k(tmp_path / "train.jsonl")), answers="flexible"))
    model = llama(len(tokenizer))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    args = AtManGRPOConfig(**settings(tmp_path / "run", mask=FEW_STEPS, max_steps=2, max_completion_length=32))
    trainer = AtManGRPOTrainer(model, args, task, tokenizer)
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.state.log_history[0]["mask/loss_final"] < trainer.state.log_history[0]["mask/loss_initial"]
    assert any(not torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))


def test_a_strict_task_logs_what_a_flexible_parser_would_accept_as_well(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    task = load_task(DataConfig(name="gsm8k", path=str(write_gsm8k(tmp_path / "train.jsonl")), prompt_style="plain"))
    forms = ("The final answer is {}", "so it is {}", "#### {}", "no idea")

    def answered(prompts: list[str], trainer: AtManGRPOTrainer) -> dict[str, Any]:
        gold = {row["prompt"]: row["answer"] for row in task.train}
        texts = [forms[i % len(forms)].format(gold[prompt]) for i, prompt in enumerate(prompts)]
        prompt_ids, completion_ids = ([tokenizer(text)["input_ids"] for text in each] for each in (prompts, texts))
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}

    args = AtManGRPOConfig(**settings(tmp_path / "run", mask=FEW_STEPS, max_steps=1))
    trainer = AtManGRPOTrainer(llama(len(tokenizer)), args, task, tokenizer, rollout_func=answered)
    trainer.train()
    line = trainer.state.log_history[0]
    assert (line["answers/accuracy"], line["answers/accuracy_flexible"]) == (0.25, 0.75)
    assert line["rewards/outcome/mean"] == -0.75


@pytest.mark.parametrize("part", ["reward", "loss", "mask"])
def test_a_number_that_is_not_finite_stops_the_run_and_leaves_its_rollout_on_disk(
    ledger: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    break_part(monkeypatch, part)
    with pytest.raises(NonFiniteError, match=f"{part}.*not finite.*step-1-process-0.json"):
        train(ledger, tmp_path, max_steps=2)
    (path,) = (tmp_path / "non_finite").iterdir()
    written = json.loads(path.read_text(encoding="utf-8"))
    assert part in written["what"]
    assert written["rollouts"][0]["prompt"].startswith("<b>")
    assert written["rollouts"][0]["completion_ids"]


def test_sharded_weights_cannot_leave_a_loss_out(ledger: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their backward waits for every process in every layer: without this one's part it would wait for ever."""
    break_part(monkeypatch, "loss")
    monkeypatch.setattr("atmanrl.training.trainer.is_whole", lambda model: False)
    with pytest.raises(NonFiniteError, match="cannot leave out a loss under FSDP or DeepSpeed"):
        train(ledger, tmp_path, max_steps=2, skip_non_finite=True)


def test_deepspeed_cannot_leave_a_loss_out(ledger: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-2 sums what the processes' backward passes reach first, second and so on, whichever parameter it is of."""
    break_part(monkeypatch, "loss")
    compute_loss = GRPOTrainer._compute_loss

    def under_deepspeed(self: Any, model: Any, inputs: Any) -> torch.Tensor:
        self.is_deepspeed_enabled = True
        return compute_loss(self, model, inputs)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", under_deepspeed)
    with pytest.raises(NonFiniteError, match="cannot leave out a loss under FSDP or DeepSpeed"):
        train(ledger, tmp_path, max_steps=2, skip_non_finite=True)


@pytest.mark.parametrize("part", ["reward", "loss", "mask"])
def test_skipping_leaves_the_rollout_out_and_trains_on(
    ledger: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    break_part(monkeypatch, part)
    trainer, _ = train(ledger, tmp_path, max_steps=2, skip_non_finite=True)
    assert trainer.state.global_step == 2
    assert (tmp_path / "non_finite").is_dir()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def break_part(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Make the first rollout's mask loss, its reward, or the first micro-batch's loss NaN, once."""
    from atmanrl.saliency import NonFiniteLossError
    from atmanrl.training import trainer

    broken = []

    def once() -> bool:
        broken.append(part)
        return len(broken) == 1

    if part == "mask":

        def optimize(model: Any, rollouts: Any, *rest: Any, **options: Any) -> Any:
            if once():
                raise NonFiniteLossError(0, float("nan"), "at step 1")
            return estimate_saliency(model, rollouts, *rest, **options)

        monkeypatch.setattr(trainer, "estimate_saliency", optimize)
    elif part == "reward":

        def reward(masks: Any, *rest: Any) -> torch.Tensor:
            values = saliency_reward(masks, *rest)
            return values.index_fill(0, torch.tensor([0]), float("nan")) if once() else values

        monkeypatch.setattr(trainer, "saliency_reward", reward)
    else:
        original = GRPOTrainer._compute_loss

        def compute_loss(self: Any, model: Any, inputs: Any) -> torch.Tensor:
            loss = original(self, model, inputs)
            return loss * float("nan") if once() else loss

        monkeypatch.setattr(GRPOTrainer, "_compute_loss", compute_loss)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"direction": "up"}, "direction must be one of restored, printed, got 'up'"),
        ({"saliency_estimator": "atmam"}, "unknown estimator 'atmam'.*did you mean 'atman'"),
        ({"target": "gold"}, "target must be one of predicted, correct, got 'gold'"),
        ({"reward_weights": [1.0, 2.0]}, "the one free weight is saliency_weight"),
        ({"num_generations": 3}, "does not hold whole groups of num_generations 3.*nearest that works: 12 rollouts"),
        ({"save_strategy": "steps", "save_steps": 3}, "save_steps 3 .*nearest that works: 2 or 4"),
        ({"save_strategy": "steps", "save_steps": 0.5}, "save_steps 0.5 is a share of the run"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "no best model is kept"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AtManGRPOConfig(**settings(tmp_path, **overrides))


@pytest.mark.parametrize("argument", ["tools", "environment_factory", "env_mask"])
def test_tokens_that_the_policy_did_not_write_are_refused(ledger: Task, tmp_path: Path, argument: str) -> None:
    def answered(prompts: list[str], trainer: AtManGRPOTrainer) -> dict[str, Any]:
        ids = [[1, 2]] * len(prompts)
        return {"prompt_ids": ids, "completion_ids": ids, "logprobs": None, "env_mask": [[1, 0]] * len(prompts)}

    model, tokenizer = load_policy(ModelConfig("ledger"))
    given = {"rollout_func": answered} if argument == "env_mask" else {argument: [print]}
    with pytest.raises(ValueError, match=f"{argument}: tokens that the policy did not write"):
        AtManGRPOTrainer(model, AtManGRPOConfig(**settings(tmp_path)), ledger, tokenizer, **given).train()


def test_an_evaluation_during_training_changes_no_number_of_it(longer: Task, tmp_path: Path) -> None:
    plain, expected = train(longer, tmp_path / "plain", max_steps=4)
    asked = {"eval_strategy": "steps", "eval_steps": 2, "num_generations_eval": 2, "per_device_eval_batch_size": 2}
    with pytest.MonkeyPatch.context() as patch:
        # Sampling for the evaluation draws from the generators that the training goes on with.
        evaluate = AtManGRPOTrainer.evaluate
        patch.setattr(AtManGRPOTrainer, "evaluate", lambda self, *a, **k: with_generators_kept(evaluate, self, *a, **k))
        ours, lines = train(longer, tmp_path / "ours", max_steps=4, **asked)
    evaluations = [line for line in lines if "eval_reward" in line]
    assert len(evaluations) == 2
    assert "eval_rewards/saliency/mean" in evaluations[0]
    assert [line for line in lines if "eval_reward" not in line] == expected
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), ours.model.parameters(), strict=True))
    pages = [trainer.sampled(8) for trainer in (plain, ours)]
    assert pages[0] is not None
    assert pages[0] == pages[1]


def with_generators_kept(function: Any, *arguments: Any, **options: Any) -> Any:
    with torch.random.fork_rng():
        return function(*arguments, **options)


def test_a_configuration_serves_several_trainers(ledger: Task, tmp_path: Path) -> None:
    args = AtManGRPOConfig(**settings(tmp_path))
    model, tokenizer = load_policy(ModelConfig("ledger"))
    AtManGRPOTrainer(model, args, ledger, tokenizer)
    assert args.reward_weights is None


def test_a_configuration_survives_json(tmp_path: Path) -> None:
    config = AtManGRPOConfig(**settings(tmp_path, mask={"steps": 7}))
    assert config.mask == replace(MaskConfig(), steps=7)
    assert json.loads(config.to_json_string())["mask"]["steps"] == 7
