"""GRPO with outcome and saliency rewards: TRL's trainer with one more reward column.

TRL samples, forms groups and advantages, weighs, logs and optimises. What is added: the rollouts' exact token ids reach
the saliency computation together with the live policy (`AtManGRPOTrainer.saliency` is an ordinary TRL reward function);
NaN stops the run with its rollout on disk. That a run can be resumed exactly is `atmanrl.training.checkpoints`'s part.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback

from atmanrl.answers import CompletionSplit, rollout_from_completion, split_completion
from atmanrl.evaluation.recording import Completion, record_one, score_name
from atmanrl.evaluation.records import Run
from atmanrl.generation import recipe_alone
from atmanrl.models import encode_prompt, end_of_turn_ids, is_whole
from atmanrl.rhythm.credit import CreditAssignment, weighted_advantages
from atmanrl.rollout import Rollout
from atmanrl.saliency import NonFiniteLossError, TokenScores, estimate_saliency, working_copy
from atmanrl.saliency.support import check_model
from atmanrl.tasks import Task
from atmanrl.training.checkpoints import ResumableGRPOTrainer
from atmanrl.training.config import AtManGRPOConfig
from atmanrl.training.rewards import (
    log_values,
    mask_metrics,
    restored_per_class,
    saliency_reward,
    tokens_per_class,
)

__all__ = ["AtManGRPOConfig", "AtManGRPOTrainer", "NonFiniteError"]

_FOREIGN_TOKENS = "tokens that the policy did not write would be scored as its chain of thought"

logger = logging.getLogger(__name__)


@dataclass
class _Batch:
    """This process's part of a generation batch, one entry per rollout; filled as TRL goes on with it."""

    rows: Sequence[Mapping[str, Any]] = ()
    prompt_ids: Sequence[list[int]] = ()
    completion_ids: Sequence[list[int]] = ()
    splits: Sequence[CompletionSplit] = ()
    masks: Mapping[int, TokenScores] = field(default_factory=dict)


class NonFiniteError(FloatingPointError):
    """A loss, mask or reward is NaN or infinite; the rollouts it came from are in the file the message names."""


class AtManGRPOTrainer(ResumableGRPOTrainer):
    """TRL's GRPO trainer on an `atmanrl.tasks.Task`, rewarding correct answers and salient chains of thought.

    Args:
        model: the policy; its attention must go through transformers' AttentionInterface.
        args: see `AtManGRPOConfig`.
        task: rows to train on and how their answers are read.
        processing_class: the policy's tokenizer.
        callbacks: further callbacks of transformers' Trainer.
        **kwargs: passed to ``trl.GRPOTrainer`` (``peft_config``, ``optimizers``, ``rollout_func``). ``eval_dataset`` is
            the task's test rows where ``args.eval_strategy`` asks for evaluations.

    Raises:
        ValueError: for tools or environments, whose tokens would be scored as the policy's chain of thought.

    Attributes:
        seconds: spent by this process so far on "generation", "saliency", "credit" and "update".
        part: the one that is under way.
        watch: called with the name of each part as it begins.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: AtManGRPOConfig,
        task: Task,
        processing_class: PreTrainedTokenizerBase,
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        for name in ("tools", "environment_factory"):
            if kwargs.get(name):
                raise ValueError(f"{name}: {_FOREIGN_TOKENS}")
        # TRL gets the weights of the reward functions through them; the caller's stay as they are.
        args = copy.copy(args)
        if args.eval_strategy != "no":
            kwargs.setdefault("eval_dataset", task.test)
        self.task = task
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.part = "update"
        self.watch: Callable[[str], None] = lambda part: None
        self._batch = _Batch()
        reward_funcs: list[Callable[..., list[float]]] = [self.outcome]
        args.reward_weights = [1.0]
        if args.scores_tokens:
            reward_funcs.append(self.saliency)
            args.reward_weights.append(args.saliency_weight)
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=task.train,
            processing_class=processing_class,
            callbacks=list(callbacks),
            **kwargs,
        )
        if args.scores_tokens:
            check_model(self._policy(), self.accelerator.unwrap_model(self.model))
        reduce = partial(self.accelerator.reduce, reduction="sum")
        self._credit = CreditAssignment(args.credit_assignment, reduce if self.accelerator.num_processes > 1 else None)
        self._end_ids = end_of_turn_ids(processing_class, self.eos_token_ids)

    # Reward functions: TRL calls them with the data set's columns and weighs, adds and logs what they return.

    def outcome(
        self, completion_ids: list[list[int]], answer: list[str], log_metric: Any, log_extra: Any, **columns: Any
    ) -> list[float]:
        """R_out: 0 where the parsed answer equals the gold answer, else -1."""
        predicted = [None if split.answer is None else split.answer.value for split in self._batch.splits]
        log_extra("predicted", predicted)
        correct = [
            value is not None and self.task.answer_format.matches(value, gold)
            for value, gold in zip(predicted, answer, strict=True)
        ]
        measured: dict[str, Sequence[float]] = {
            "answers/parse_failures": [value is None for value in predicted],
            "answers/accuracy": correct,
            "cot/tokens": [len(split.cot_ids) for split in self._batch.splits],
        }
        if (flexible := self.task.answer_format.flexible) is not None:
            accepted = [
                flexible.accepts(split.text, gold) for split, gold in zip(self._batch.splits, answer, strict=True)
            ]
            measured["answers/accuracy_flexible"] = accepted
        log_values(log_metric, measured | tokens_per_class(self._classes(), self.task.token_classes))
        return [0.0 if is_correct else -1.0 for is_correct in correct]

    def saliency(self, answer: list[str], log_metric: Any, **columns: Any) -> list[float]:
        """R_sal of every rollout, all scored in one call on the live policy; 0 where nothing can be."""
        rollouts = self._rollouts(answer)
        rewards = torch.zeros(len(rollouts))
        active = [i for i, rollout in enumerate(rollouts) if rollout.cot_ids and rollout.answer_ids]
        # TRL leaves a rollout whose rewards are all NaN out of its group; one whose mask failed must get there.
        rewards[active] = torch.nan
        with self._clock("saliency"):
            active, masks = self._scores(self._policy(), rollouts, active)
        self._batch.masks = dict(zip(active, masks, strict=True))
        rewards[active] = saliency_reward(masks, self.args.direction, self.args.reduction)
        classes = self._classes()
        restored = restored_per_class(masks, [classes[i] for i in active], self.task.token_classes)
        log_values(log_metric, mask_metrics(masks) | restored)
        return rewards.tolist()

    def sampled(self, most: int) -> Run | None:
        """The first ``most`` rollouts of this process's last generation batch with their masks; None without masks."""
        if not self._batch.masks:
            return None
        classify = self.task.classify_tokens
        records = []
        for i, row in enumerate(self._batch.rows[:most]):
            completion = Completion(
                prompt_id=f"{self.task.name}-{i // self.num_generations}",
                sample=i % self.num_generations,
                prompt_ids=self._batch.prompt_ids[i],
                completion_ids=self._batch.completion_ids[i],
                answer_format=self.task.answer_format,
                expected=row["answer"],
                classify=None if classify is None else partial(classify, row),
            )
            mask = self._batch.masks.get(i)
            reason = None if mask is not None else "no mask was optimised"
            records.append(
                record_one(self.processing_class, completion, self._batch.splits[i], mask, reason, self._end_ids)
            )
        settings = {"mask": asdict(self.args.mask), "task": self.task.name}
        return Run(
            label=f"step {self.state.global_step}",
            rollouts=tuple(records),
            score=score_name(self.args.estimator().name),
            settings=settings,
        )

    # The seams in TRL's trainer.

    def _generate(self, prompts: list[Any]) -> Any:
        # vLLM is told every setting, and has no generation config of its own to fill gaps from.
        alone = recipe_alone(self.accelerator.unwrap_model(self.model), getattr(self, "generation_config", None))
        with self._clock("generation"), alone:
            generated = super()._generate(prompts)
        if generated[2] is not None:
            raise ValueError(f"env_mask: {_FOREIGN_TOKENS}")
        self._batch.prompt_ids = generated[0]
        return generated

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        if isinstance(self.processing_class, ProcessorMixin):
            return super()._tokenize_prompts(prompts)
        template = {} if self.chat_template is None else {"chat_template": self.chat_template}
        kwargs = {**template, **self.chat_template_kwargs}
        return [encode_prompt(self.processing_class, prompt, kwargs) for prompt in prompts], None, {}

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids: list[list[int]]
    ) -> Tensor:
        self._batch.rows, self._batch.completion_ids = inputs, completion_ids
        self._batch.splits = [self._split(ids) for ids in completion_ids]
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        # TRL sums with nansum, which would take a NaN for a reward function that does not apply.
        broken = ~rewards.isfinite().all(dim=1)
        if broken.any():
            first = self.accelerator.process_index * len(prompts)
            own = [i for i in range(len(prompts)) if broken[first + i]]
            self._on_non_finite(
                "reward",
                [self._describe(self._batch.prompt_ids[i], completion_ids[i], reward=rewards[first + i]) for i in own],
            )
            rewards[broken] = torch.nan
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._credit.begin()
        before, self._batch = self._batch, _Batch()
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self.args.credit_assignment.strategy != "none":
            with self._clock("credit"):
                output["advantages"] = self._assign_credit(output)
        if not self.model.training:
            # An evaluation's; pages show what was trained on.
            self._batch = before
        return output

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *rest: Any, **kwargs: Any
    ) -> Any:
        plain = partial(super()._get_per_token_logps_and_entropies, model, input_ids, attention_mask, logits_to_keep)
        # The old log-probabilities. Where the reference is the policy without its adapter, its pass looks the same.
        if model is not self.model or torch.is_grad_enabled() or (self.beta and self.ref_model is None):
            return plain(*rest, **kwargs)
        response = attention_mask.bool()
        response[:, :-logits_to_keep] = False
        size = kwargs.get("batch_size") or (rest[0] if rest and rest[0] else len(input_ids))
        with self._credit.watching(self.accelerator.unwrap_model(self.model), response, size):
            return plain(*rest, **kwargs)

    def _compute_loss(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
        loss: Tensor = super()._compute_loss(model, inputs)
        if bool(loss.isfinite()):
            return loss
        prompts, completions = (
            [ids[mask.bool()].tolist() for ids, mask in zip(inputs[f"{part}_ids"], inputs[f"{part}_mask"], strict=True)]
            for part in ("prompt", "completion")
        )
        # Where weights are sharded, other processes wait for this one's part in every layer's backward. DeepSpeed adds
        # gradients up in the order in which they come: zeros in another one would let it mix up the others' gradients.
        self._on_non_finite(
            f"loss of optimiser step {self.state.global_step + 1}",
            [
                self._describe(prompt, completion, advantage=advantage)
                for prompt, completion, advantage in zip(prompts, completions, inputs["advantages"], strict=True)
            ],
            can_skip=is_whole(model) and not self.is_deepspeed_enabled,
        )
        # A gradient of zeros for every parameter: other processes wait for all of them.
        return torch.stack([0.0 * parameter.sum() for parameter in model.parameters() if parameter.requires_grad]).sum()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        before = self._elsewhere()
        start = time.perf_counter()
        loss: Tensor = super().training_step(*args, **kwargs)
        self.seconds["update"] += time.perf_counter() - start - (self._elsewhere() - before)
        return loss

    def _elsewhere(self) -> float:
        return sum(self.seconds.get(part, 0.0) for part in ("generation", "saliency", "credit"))

    # Own steps.

    def _split(self, completion_ids: Sequence[int]) -> CompletionSplit:
        return split_completion(completion_ids, self.processing_class, self.task.answer_format, end_ids=self._end_ids)

    def _rollouts(self, answer: Sequence[str]) -> list[Rollout]:
        if self.args.target == "predicted":
            return [
                Rollout(tuple(prompt_ids), split.cot_ids, split.answer_ids, split.marker_ids)
                for prompt_ids, split in zip(self._batch.prompt_ids, self._batch.splits, strict=True)
            ]
        return [
            rollout_from_completion(
                prompt_ids,
                completion_ids,
                self.processing_class,
                self.task.answer_format,
                target="correct",
                gold=gold,
                end_ids=self._end_ids,
            )
            for prompt_ids, completion_ids, gold in zip(
                self._batch.prompt_ids, self._batch.completion_ids, answer, strict=True
            )
        ]

    def _policy(self) -> PreTrainedModel:
        """The policy to compute on without training it; gathering a sharded one takes every process."""
        with self.accelerator.autocast():
            return working_copy(self.accelerator.unwrap_model(self.model))

    def _scores(
        self, model: PreTrainedModel, rollouts: Sequence[Rollout], active: list[int]
    ) -> tuple[list[int], list[TokenScores]]:
        """Scores of the ``active`` rollouts, in one call; those left out as non-finite are missing from both."""
        estimator = self.args.estimator()
        while True:
            try:
                return active, estimate_saliency(model, [rollouts[i] for i in active], estimator, progress=False)
            except NonFiniteLossError as error:
                index = active[error.rollout]
                rollout = rollouts[index]
                described = self._describe(rollout.prompt_ids, rollout.completion_ids)
                self._on_non_finite(f"mask ({error})", [described])
                active = [i for i in active if i != index]

    def _assign_credit(self, output: Mapping[str, Tensor]) -> Tensor:
        """(B, T) advantages gamma_t A of the completions' tokens; TRL's loss takes them in place of (B,)."""
        if self._credit.needs_forward:
            self._credit.forward(self._policy(), self._batch.prompt_ids, self._batch.completion_ids)
        found = self._credit.gammas(
            [len(ids) for ids in self._batch.completion_ids],
            {i: mask.restored for i, mask in self._batch.masks.items()},
            self.args.seed + self.state.global_step + (self.accelerator.process_index << 32),
        )
        values = torch.cat(found).double().to(self.accelerator.device)
        sums = torch.stack([torch.ones_like(values).sum(), values.sum(), values.square().sum()])
        count, total, squared = self.accelerator.gather(sums[None]).sum(0).tolist()
        own = self._metrics["train" if self.model.training else "eval"]
        own["credit/gamma_mean"].append(total / count)
        own["credit/gamma_std"].append(max(0.0, squared / count - (total / count) ** 2) ** 0.5)
        return weighted_advantages(
            output["advantages"], found, output["completion_ids"].shape[1], self._credit.config.sign
        )

    def _classes(self) -> list[list[str]]:
        """The class of each chain-of-thought token of the batch; nothing per rollout where the task knows none."""
        classify = self.task.classify_tokens
        if classify is None:
            return [[] for _ in self._batch.splits]
        texts = [self.processing_class.convert_ids_to_tokens(list(split.cot_ids)) for split in self._batch.splits]
        return [classify(row, text) for row, text in zip(self._batch.rows, texts, strict=True)]

    def _describe(self, prompt_ids: Sequence[int], completion_ids: Sequence[int], **numbers: Tensor) -> dict[str, Any]:
        return {
            "prompt": self.processing_class.decode(prompt_ids),
            "completion": self.processing_class.decode(completion_ids),
            "prompt_ids": list(prompt_ids),
            "completion_ids": list(completion_ids),
            **{name: str(value.tolist()) for name, value in numbers.items()},
        }

    def _on_non_finite(self, what: str, rollouts: list[dict[str, Any]], *, can_skip: bool = True) -> None:
        """Write the rollouts to disk; stop, unless the configuration says to leave them out and that can be done."""
        message = f"{what} is not finite in another process"
        if rollouts:
            folder = Path(self.args.output_dir) / "non_finite"
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"step-{self.state.global_step + 1}-process-{self.accelerator.process_index}.json"
            path.write_text(
                json.dumps({"what": what, "rollouts": rollouts}, indent=1, ensure_ascii=False), encoding="utf-8"
            )
            message = f"{what} is not finite; the {len(rollouts)} rollout(s) it came from are in {path}"
        if not can_skip:
            raise NonFiniteError(f"{message}; skip_non_finite cannot leave out a loss under FSDP or DeepSpeed")
        if not self.args.skip_non_finite:
            raise NonFiniteError(f"{message}; skip_non_finite leaves such rollouts out instead")
        logger.warning("%s, left out", message)

    @contextmanager
    def _clock(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        self._enter(part)
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start
        # Not after an exception: the message then names the part that the exception ended.
        self._enter("update")

    def _enter(self, part: str) -> None:
        self.part = part
        self.watch(part)
