"""The trainer's configuration: TRL's GRPOConfig with the paper's numbers and the fields of the saliency reward."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from trl import GRPOConfig

from atmanrl.config import CreditConfig, MaskConfig
from atmanrl.saliency import Estimator, make_estimator
from atmanrl.training.batches import BatchArithmetic
from atmanrl.training.rewards import Direction, Reduction

Target = Literal["predicted", "correct"]


@dataclass
class AtManGRPOConfig(GRPOConfig):  # type: ignore[misc]
    """TRL's ``GRPOConfig`` plus the saliency reward; defaults are the paper's (AtManRL, arXiv 2604.16158).

    The reward is R = R_out + saliency_weight * R_sal, with R_out 0 for a correct answer and -1 otherwise, and the loss
    L = -(1/G) sum_i (1/|o_i|) sum_t min(r_t A_i, clip(r_t, 1 - epsilon, 1 + epsilon) A_i) with A_i = R_i - mean(R) of
    the group: ``scale_rewards="none"``, ``loss_type="grpo"``, no KL term. ``importance_sampling_level="sequence"`` puts
    one length-normalised ratio per rollout in place of r_t.

    Attributes:
        saliency_weight: weight of R_sal; with 0 the run is TRL's own, step for step.
        direction: see :func:`atmanrl.saliency_reward`.
        reduction: see :func:`atmanrl.saliency_reward`.
        target: which answer the mask's loss teacher-forces: the rollout's own ("predicted") or the gold ("correct").
        mask: how masks are optimised.
        saliency_estimator: what scores the tokens, "mask" (the paper's) or another of `atmanrl.ESTIMATORS`, or "best";
            R_sal then averages `TokenScores.restored`.
        credit_assignment: how a rollout's advantage is spread over its tokens; by default evenly.
        log_saliency: compute and log the saliency also where ``saliency_weight`` is 0; it changes no number of the run.
        skip_non_finite: leave a rollout with a NaN or infinite loss, mask or reward out instead of stopping; a loss
            stops a run under FSDP or DeepSpeed all the same.
        page_steps: optimiser steps between two pages of sampled rollouts coloured by saliency; 0 for none.
        page_rollouts: rollouts on a page.
    """

    saliency_weight: float = 1.0
    direction: str = "restored"
    reduction: str = "causal"
    target: str = "predicted"
    mask: MaskConfig = field(default_factory=MaskConfig)
    saliency_estimator: str = "mask"
    credit_assignment: CreditConfig = field(default_factory=CreditConfig)
    log_saliency: bool = False
    skip_non_finite: bool = False
    page_steps: int = 50
    page_rollouts: int = 16
    report_to: str | list[str] | None = field(default_factory=lambda: ["tensorboard"])

    per_device_train_batch_size: int = 2
    gradient_accumulation_steps: int = 32
    num_iterations: int = 2
    num_train_epochs: float = 8.0
    max_completion_length: int = 1024
    learning_rate: float = 1e-6
    lr_scheduler_type: str = "constant"
    scale_rewards: str = "none"
    loss_type: str = "grpo"
    logging_steps: float = 1
    save_strategy: str = "epoch"
    save_total_limit: int | None = 2
    bf16: bool | None = None
    # The loader hands out prompts, which are no tensors.
    dataloader_pin_memory: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.mask, Mapping):
            self.mask = MaskConfig(**self.mask)
        if isinstance(self.credit_assignment, Mapping):
            self.credit_assignment = CreditConfig(**self.credit_assignment)
        for name, choices in (("direction", Direction), ("reduction", Reduction), ("target", Target)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {getattr(self, name)!r}")
        self.estimator()
        if self.reward_weights is not None:
            raise ValueError(f"reward_weights {self.reward_weights}: the one free weight is saliency_weight")
        if self.credit_assignment.strategy != "none" and self.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel computes with one advantage per rollout; credit_assignment needs its own"
            )
        if self.load_best_model_at_end or self.save_strategy == "best":
            raise ValueError("no best model is kept: checkpoints are rotated by age alone")
        if self.bf16 is None and not self.fp16:
            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        arithmetic = BatchArithmetic.check(
            num_generations=self.num_generations,
            per_device_train_batch_size=self.per_device_train_batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            num_iterations=self.num_iterations,
            # What a launcher sets; the process group itself comes up inside super().__post_init__().
            processes=int(os.environ.get("WORLD_SIZE", "1")),
            generation_batch_size=self.generation_batch_size,
            steps_per_generation=self.steps_per_generation,
        )
        super().__post_init__()
        if self.save_strategy == "steps":
            arithmetic.check_save_steps(self.save_steps)
        self.arithmetic = arithmetic

    @property
    def scores_tokens(self) -> bool:
        """Whether anything in a run reads its rollouts' saliency."""
        return bool(self.saliency_weight or self.log_saliency) or self.credit_assignment.strategy == "saliency"

    def estimator(self) -> Estimator:
        """What scores the tokens.

        Raises:
            ValueError: for an unknown name.
        """
        return make_estimator(self.saliency_estimator, mask=self.mask)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**super().to_dict(), "mask": asdict(self.mask), "credit_assignment": asdict(self.credit_assignment)}
