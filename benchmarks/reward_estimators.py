"""Which estimator should the saliency reward be? Four arms of GRPO on Ledger, the same seeds and budget for each.

    python -m benchmarks.reward_estimators                what is missing of all seeds, then the results file
    python -m benchmarks.reward_estimators --seeds 0 1    these seeds alone; several processes may share the work directory

As `benchmarks.claim`, with another estimator behind the reward instead of another direction. Every held-out chain of
thought is scored by three estimators, whichever it was trained on, and its faithfulness is measured twice, with the
trained model and with the starting checkpoint as its reader.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from atmanrl.policy import load_policy
from atmanrl.recipe import ModelConfig, load_recipe
from atmanrl.records import RESTORED, Run, write_text_atomically
from atmanrl.scoring import DELETION, with_faithfulness, with_scores
from atmanrl.summary import summarize
from benchmarks.claim import SETTING as CLAIM
from benchmarks.claim import errors, train_and_measure
from benchmarks.device import RESULTS, commit

ARMS = {
    "outcome": {"saliency_weight": "0"},
    "mask": {"saliency_estimator": "mask"},
    "sparse-mask": {"saliency_estimator": "sparse-mask"},
    "leave-one-out": {"saliency_estimator": "leave-one-out"},
}
# What scores the held-out chains, by the name of the score in the record.
SCORES = {RESTORED: "mask", "sparse-mask": "sparse-mask", DELETION: "leave-one-out"}
SETTING = {**CLAIM, "evaluation.saliency": "false"}
SEEDS = range(6)
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


def run_one(arm: str, seed: int, work: Path) -> dict[str, Any]:
    """Train one arm with one seed and measure it, unless the work directory holds the result."""

    def measured(directory: Path) -> dict[str, Any]:
        metrics = measure(Run.load(directory / "after.json"), str(directory / "model"))
        return {"arm": arm, "seed": seed, "metrics": metrics}

    return train_and_measure(f"{arm}-{seed}", {**SETTING, **ARMS[arm], "seed": str(seed)}, work, measured)


def start(work: Path) -> dict[str, float]:
    """The metrics of the checkpoint every run starts from, on the same prompts with the same draws."""
    path = work / "start.json"
    if not path.is_file():
        arguments = [part for name, value in SETTING.items() for part in (f"--{name}", value)]
        command = ["evaluate", "--config", "ledger", "--checkpoints", "ledger", "--output", str(work / "start")]
        subprocess.run([sys.executable, "-m", "atmanrl", *command, *arguments], check=True)
        metrics = measure(Run.load(work / "start" / "ledger.json"), "ledger")
        write_text_atomically(path, json.dumps(metrics, indent=1) + "\n")
    content: dict[str, float] = json.loads(path.read_text())
    return content


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", help="run these and write no results")
    parser.add_argument("--work", type=Path, default=Path("runs/reward_estimators"), metavar="DIR")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    seeds = SEEDS if arguments.seeds is None else arguments.seeds
    runs = [run_one(arm, seed, arguments.work) for seed in seeds for arm in ARMS]
    if arguments.seeds is not None:
        return 0
    content = {
        "commit": commit(),
        "versions": {package: version(package) for package in ("torch", "transformers", "trl")},
        "recipe": load_recipe("ledger", list(SETTING.items())).to_yaml(),
        "arms": ARMS,
        "faithful": FAITHFUL,
        "start": start(arguments.work),
        "runs": runs,
    }
    for old in RESULTS.glob("reward_estimators_*.json"):
        old.unlink()
    date = datetime.datetime.now(datetime.UTC).date()
    write_text_atomically(
        RESULTS / f"reward_estimators_{date}_{content['commit']}.json", json.dumps(content, indent=1) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
