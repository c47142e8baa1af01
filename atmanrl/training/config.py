"""The trainer's configuration: TRL's GRPOConfig with the paper's numbers, the saliency's fields, checked batch sizes.

The words, as the messages and `docs/training.md` use them:

    query             one prompt of the data set
    rollout           one sampled completion; each query gets ``num_generations`` of them, its group
    generation batch  the rollouts sampled, and scored, together: ``queries * num_generations``
    micro-batch       rollouts in one forward and backward on one process: ``per_device_train_batch_size``
    optimiser step    ``processes * per_device_train_batch_size * gradient_accumulation_steps`` rollouts
    pass              one use of the whole generation batch; it is used ``num_iterations`` times, then sampled anew
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from trl import GRPOConfig

from atmanrl.config import CreditConfig, MaskConfig
from atmanrl.errors import InputError
from atmanrl.recipe import Overrides
from atmanrl.saliency import Estimator, make_estimator
from atmanrl.settings import SECTIONS, Settings, estimator_from, estimator_sections, read_settings
from atmanrl.training.rewards import Direction, Reduction

Target = Literal["predicted", "correct"]


class BatchArithmeticError(InputError):
    """The sizes contradict one another; the message has the numbers that clash and the nearest that work."""


@dataclass(frozen=True)
class BatchArithmetic:
    """Sizes that fit together; build it with `BatchArithmetic.check`."""

    num_generations: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    num_iterations: int
    processes: int
    generation_batch_size: int

    @classmethod
    def check(
        cls,
        *,
        num_generations: int,
        per_device_train_batch_size: int,
        gradient_accumulation_steps: int,
        num_iterations: int,
        processes: int = 1,
        generation_batch_size: int | None = None,
        steps_per_generation: int | None = None,
    ) -> BatchArithmetic:
        """Derive the generation batch and check that groups, micro-batches and steps divide it.

        Args:
            num_generations: rollouts per query, at least 2: a group of one has advantage 0.
            per_device_train_batch_size: rollouts per micro-batch and process.
            gradient_accumulation_steps: micro-batches per optimiser step.
            num_iterations: passes over each generation batch.
            processes: number of training processes.
            generation_batch_size: rollouts sampled together over all processes; default: one optimiser step's.
            steps_per_generation: the same in micro-batches; give at most one of the two.

        Raises:
            BatchArithmeticError: naming the numbers that clash and the nearest ones that work.
        """
        sizes = {
            "per_device_train_batch_size": per_device_train_batch_size,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "num_iterations": num_iterations,
            "generation_batch_size": generation_batch_size,
            "steps_per_generation": steps_per_generation,
        }
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise BatchArithmeticError(f"{name} must be at least 1, got {size}")
        if num_generations < 2:
            raise BatchArithmeticError(
                f"num_generations must be at least 2, got {num_generations}: "
                f"advantages are differences inside a query's group of rollouts"
            )
        if generation_batch_size is not None and steps_per_generation is not None:
            raise BatchArithmeticError(
                f"generation_batch_size {generation_batch_size} and steps_per_generation {steps_per_generation} "
                f"both state how many rollouts are sampled together: give one"
            )
        slice_size = per_device_train_batch_size * processes
        if steps_per_generation is not None:
            generation_batch_size = slice_size * steps_per_generation
        elif generation_batch_size is None:
            generation_batch_size = slice_size * gradient_accumulation_steps
        arithmetic = cls(
            num_generations=num_generations,
            per_device_train_batch_size=per_device_train_batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            num_iterations=num_iterations,
            processes=processes,
            generation_batch_size=generation_batch_size,
        )
        arithmetic._check_divisibility()
        return arithmetic

    def _check_divisibility(self) -> None:
        slice_size = self.per_device_train_batch_size * self.processes
        unit = math.lcm(slice_size, self.num_generations)
        if self.generation_batch_size % slice_size or self.generation_batch_size % self.num_generations:
            raise BatchArithmeticError(
                f"a generation batch of {self.generation_batch_size} rollouts does not hold whole groups of "
                f"num_generations {self.num_generations} in whole micro-batches of per_device_train_batch_size "
                f"{self.per_device_train_batch_size} x {self.processes} process(es); nearest that works: "
                f"{_join(_neighbours(self.generation_batch_size, unit))} rollouts "
                f"({_join([size // slice_size for size in _neighbours(self.generation_batch_size, unit)])} "
                f"micro-batches, with gradient_accumulation_steps or steps_per_generation)"
            )
        # Otherwise a batch would be split over optimiser steps so that a step mixes two generation batches, and no
        # step ends where a batch does: nothing could be resumed exactly.
        whole, accumulated = self.micro_batches_per_generation, self.gradient_accumulation_steps
        if (whole * self.num_iterations) % accumulated:
            divisors = [n for n in range(1, whole * self.num_iterations + 1) if whole * self.num_iterations % n == 0]
            below = max(n for n in divisors if n <= accumulated)
            above = min((n for n in divisors if n >= accumulated), default=below)
            raise BatchArithmeticError(
                f"{self.num_iterations} pass(es) over {whole} micro-batches are not a whole number of optimiser steps "
                f"of gradient_accumulation_steps {accumulated}; nearest that works: {_join(sorted({below, above}))}"
            )

    @property
    def queries(self) -> int:
        """Queries per generation batch, over all processes."""
        return self.generation_batch_size // self.num_generations

    @property
    def micro_batches_per_generation(self) -> int:
        """Micro-batches one pass takes on each process."""
        return self.generation_batch_size // (self.per_device_train_batch_size * self.processes)

    @property
    def steps_per_generation(self) -> int:
        """Optimiser steps between one sampling and the next."""
        return self.micro_batches_per_generation * self.num_iterations // self.gradient_accumulation_steps

    def check_save_steps(self, save_steps: float) -> None:
        """Check that checkpoints fall where a generation batch ends: elsewhere the batch would have to be stored too.

        Raises:
            BatchArithmeticError: with the nearest multiples; for a share of the run, as transformers takes it.
        """
        if save_steps < 1:
            raise BatchArithmeticError(
                f"save_steps {save_steps} is a share of the run: give optimiser steps, in multiples of the "
                f"{self.steps_per_generation} of a generation batch"
            )
        if save_steps % self.steps_per_generation:
            raise BatchArithmeticError(
                f"save_steps {save_steps:g} would save inside a generation batch of {self.steps_per_generation} "
                f"optimiser steps, from where no run can be resumed exactly; nearest that works: "
                f"{_join(_neighbours(int(save_steps), self.steps_per_generation))}"
            )

    def describe(self) -> str:
        """The sizes in words, one per line."""
        micro, processes = self.per_device_train_batch_size, self.processes
        step = micro * processes * self.gradient_accumulation_steps
        return "\n".join(
            [
                f"generation batch  {self.queries} queries x {self.num_generations} rollouts"
                f" = {self.generation_batch_size} rollouts",
                f"optimiser step    {micro} rollouts x {processes} process(es) x {self.gradient_accumulation_steps}"
                f" accumulated = {step} rollouts",
                f"passes            {self.num_iterations} over each generation batch"
                f" = {self.steps_per_generation} optimiser step(s) per sampling",
            ]
        )

    def optimizer_steps(self, examples: int, epochs: float) -> int:
        """Optimiser steps of ``epochs`` passes over a data set of ``examples`` queries; an incomplete batch is dropped.

        Raises:
            BatchArithmeticError: if the data set does not fill one generation batch.
        """
        if examples < self.queries:
            raise BatchArithmeticError(
                f"the training data has {examples} example(s), but one generation batch takes {self.queries} queries "
                f"({self.generation_batch_size} rollouts / num_generations {self.num_generations}); nearest that "
                f"works: a generation batch of {examples * self.num_generations} rollouts, or {self.queries} examples"
            )
        return math.ceil(epochs * (examples // self.queries) * self.steps_per_generation)


def _neighbours(value: int, unit: int) -> list[int]:
    """The positive multiples of ``unit`` next below and above ``value``."""
    below = value // unit * unit
    return [multiple for multiple in (below, below + unit) if multiple > 0]


def _join(values: list[int]) -> str:
    return " or ".join(map(str, values))


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
        saliency_estimator: the estimator of token scores: "mask" (the paper's), another of `atmanrl.ESTIMATORS`,
            "best", or an estimator with settings of its own; R_sal then averages `TokenScores.restored`.
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
    saliency_estimator: str | Estimator = "mask"
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
        chosen = self.saliency_estimator
        return make_estimator(chosen, mask=self.mask) if isinstance(chosen, str) else chosen

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        estimator = self.saliency_estimator
        return {
            **super().to_dict(),
            "mask": asdict(self.mask),
            "credit_assignment": asdict(self.credit_assignment),
            "saliency_estimator": estimator if isinstance(estimator, str) else repr(estimator),
        }


def load_recipe(name_or_path: str, overrides: Overrides = (), *, under: Path | None = None) -> Settings:
    """Every setting of a recipe: the sections, an estimator's own among them, and the fields of `AtManGRPOConfig`.

    Args:
        name_or_path: a built-in recipe, or a file.
        overrides: see `atmanrl.recipe.parse_overrides`.
        under: see `atmanrl.settings.read_settings`.

    Raises:
        RecipeError: see `atmanrl.settings.read_settings`.
    """
    # The paper's mask is a field of the trainer's configuration.
    estimators = {name: section for name, section in estimator_sections().items() if name != "mask"}
    return read_settings(overrides, {**SECTIONS, **estimators}, recipe=name_or_path, under=under, top=AtManGRPOConfig)


def training_config(recipe: Settings, **changed: Any) -> AtManGRPOConfig:
    """The trainer's configuration of a recipe, the estimator with the settings of its section.

    Raises:
        InputError: for values that do not go together, with their place.
    """
    if recipe.values["disable_tqdm"] is None:
        # The run has a progress line of its own.
        changed["disable_tqdm"] = True
    args: AtManGRPOConfig = recipe.make(AtManGRPOConfig, **changed)
    if args.saliency_estimator != "mask":
        args.saliency_estimator = estimator_from(str(args.saliency_estimator), recipe)
    return args
