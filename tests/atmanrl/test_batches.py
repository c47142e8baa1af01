"""Batch arithmetic: what fits is described, what does not is refused with the nearest numbers that do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atmanrl.training.config import BatchArithmetic, BatchArithmeticError

PAPER = {
    "num_generations": 8,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 32,
    "num_iterations": 2,
}


def test_the_papers_batch_is_8_queries_of_8_rollouts_used_for_two_steps() -> None:
    batch = BatchArithmetic.check(**PAPER)
    assert (batch.queries, batch.generation_batch_size, batch.steps_per_generation) == (8, 64, 2)
    # 7473 examples fill 934 batches; the ninth part of a batch is dropped in each epoch.
    assert batch.optimizer_steps(7473, 8) == 934 * 2 * 8
    assert "8 queries x 8 rollouts = 64 rollouts" in batch.describe()


def test_processes_share_the_batch() -> None:
    batch = BatchArithmetic.check(**{**PAPER, "gradient_accumulation_steps": 8}, processes=4)
    assert (batch.generation_batch_size, batch.micro_batches_per_generation, batch.steps_per_generation) == (64, 8, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generations": 1}, "num_generations must be at least 2, got 1"),
        ({"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
        ({"num_generations": 7}, "64 rollouts does not hold whole groups of num_generations 7.*: 56 or 70 rollouts"),
        ({"generation_batch_size": 60}, "60 rollouts does not hold whole groups .*: 56 or 64 rollouts"),
        ({"gradient_accumulation_steps": 30, "generation_batch_size": 64}, "nearest that works: 16 or 32"),
        ({"generation_batch_size": 64, "steps_per_generation": 32}, "give one"),
    ],
)
def test_sizes_that_clash_are_named_with_the_nearest_that_work(changes: dict[str, int], message: str) -> None:
    with pytest.raises(BatchArithmeticError, match=message):
        BatchArithmetic.check(**{**PAPER, **changes})


@given(
    st.integers(2, 12), st.integers(1, 6), st.integers(1, 12), st.integers(1, 3), st.integers(1, 4), st.integers(1, 80)
)
def test_what_is_accepted_divides_evenly(
    generations: int, micro: int, accumulation: int, passes: int, processes: int, batch_size: int
) -> None:
    try:
        batch = BatchArithmetic.check(
            num_generations=generations,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            num_iterations=passes,
            processes=processes,
            generation_batch_size=batch_size,
        )
    except BatchArithmeticError:
        divides = batch_size % generations == 0 and batch_size % (micro * processes) == 0
        assert not divides or (batch_size // (micro * processes) * passes) % accumulation
        return
    assert batch.queries * generations == batch_size
    assert batch.micro_batches_per_generation * micro * processes == batch_size
    assert batch.steps_per_generation * accumulation == batch.micro_batches_per_generation * passes


def test_too_few_examples_and_saves_inside_a_batch_are_refused() -> None:
    batch = BatchArithmetic.check(**PAPER)
    with pytest.raises(BatchArithmeticError, match=r"5 example\(s\), but one generation batch takes 8 queries"):
        batch.optimizer_steps(5, 1)
    with pytest.raises(BatchArithmeticError, match=r"save_steps 5 .*nearest that works: 4 or 6"):
        batch.check_save_steps(5)
