"""Which estimator should the saliency reward be? Four arms of GRPO on Ledger, the same seeds and budget for each.

    python -m benchmarks.reward_estimators                what is missing of 5 seeds, then the results file
    python -m benchmarks.reward_estimators --seeds 0 1    these seeds alone; several processes may share the directory

As `benchmarks.claim`, with another estimator behind the reward instead of another direction. Every held-out chain of
thought is scored by three estimators, whichever it was trained on, and its faithfulness is measured twice, with the
trained model and with the starting checkpoint as its reader.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from atmanrl.config import ModelConfig
from atmanrl.evaluation.faithfulness import with_faithfulness, with_scores
from atmanrl.evaluation.records import DELETION, RESTORED, Run
from atmanrl.evaluation.summary import summarize
from atmanrl.models import load_policy
from benchmarks.claim import SETTING as CLAIM
from benchmarks.claim import Comparison, errors

ARMS = {
    "outcome": {"saliency_weight": "0"},
    "mask": {"saliency_estimator": "mask"},
    "sparse-mask": {"saliency_estimator": "sparse-mask"},
    "leave-one-out": {"saliency_estimator": "leave-one-out"},
}
# What scores the held-out chains, by the name of the score in the record.
SCORES = {RESTORED: "mask", "sparse-mask": "sparse-mask", DELETION: "leave-one-out"}
SETTING = {**CLAIM, "evaluation.saliency": "false"}
SEEDS = range(5)
# Faithfulness takes 132 variants per completion.
FAITHFUL = 128


def measure(run: Run, model: str) -> dict[str, float]:
    """Every metric of a held-out run under each of `SCORES`, and the faithfulness of its first chains."""
    policy, tokenizer = load_policy(ModelConfig(model))
    for name, estimator in SCORES.items():
        run = with_scores(policy, run, estimator, name, progress=False)
    first = [item for item in run.rollouts if item.sample == 0][:FAITHFUL]
    read = with_faithfulness(policy, tokenizer, replace(run, rollouts=tuple(first), score=DELETION))
    read = with_faithfulness(*load_policy(ModelConfig("ledger")), read, prefix="initial_")
    # Intervals are formed over seeds: the prompts' bootstrap is not needed.
    found = [summarize(replace(run, score=name), resamples=1) for name in SCORES]
    measured = {name for item in read.rollouts for name in item.measures}
    rows = [row for summary in found for row in summary.rows]
    rows += [row for row in summarize(read, resamples=1).rows if row.name in measured]
    return {row.name: row.runs[0].value for row in rows if row.runs[0].value is not None} | errors(run)


REWARDS = Comparison("reward_estimators", ARMS, SETTING, SEEDS, measure)


if __name__ == "__main__":
    sys.exit(REWARDS.main(__doc__))
