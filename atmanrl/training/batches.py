"""Batch arithmetic of one GRPO update, checked before anything is loaded; importing this module loads no torch.

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
from dataclasses import dataclass

from atmanrl.errors import InputError


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
