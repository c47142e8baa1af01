"""What the saliency reward does to chains of thought: three arms on Ledger, the same seeds and budget for each.

    python -m benchmarks.claim                      what is missing of 8 seeds, then the results file
    python -m benchmarks.claim --seeds 0 1 2 3      these seeds alone; several processes may share the work directory

Every run starts from the built-in checkpoint and is `atmanrl train --config ledger` with another reward. Runs of one
seed share the order of the prompts. What is measured, on held-out prompts sampled with one fixed seed, is kept in one
file per run in the work directory, so that a stopped call goes on where it was. `benchmarks.claim_report` reads it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from atmanrl.config import ModelConfig
from atmanrl.evaluation.faithfulness import with_deletion_effects
from atmanrl.evaluation.records import DELETION, RESTORED, Run, write_text_atomically
from atmanrl.evaluation.summary import summarize
from atmanrl.models import load_policy
from atmanrl.training.config import load_recipe
from benchmarks.device import RESULTS, commit

ARMS = {
    "outcome": {"saliency_weight": "0"},
    "restored": {"direction": "restored"},
    "printed": {"direction": "printed"},
}
# A run of the recipe, evaluated on all held-out prompts there are.
SETTING = {
    "learning_rate": "2e-4",
    "max_steps": "80",
    "evaluation.prompts": "256",
    "evaluation.samples": "2",
    "evaluation.before": "false",
    "save_strategy": "no",
    "report_to": "none",
}
SEEDS = range(8)


def measure(run: Run, model: str) -> dict[str, float]:
    """Every metric of a held-out run by name, and how well leave-one-out finds the needed tokens."""
    policy, _ = load_policy(ModelConfig(model))
    scored = with_deletion_effects(policy, run)
    # Intervals are formed over seeds: the prompts' bootstrap is not needed.
    rows = [row for score in (RESTORED, DELETION) for row in summarize(replace(scored, score=score), resamples=1).rows]
    return {row.name: row.runs[0].value for row in rows if row.runs[0].value is not None} | errors(run)


def errors(run: Run) -> dict[str, float]:
    """Shares of all chains: those that copy more needed values than were asked for, and wrong ones with and without."""
    n = len(run.rollouts)
    # The expected answer names each asked pair.
    repeated = [r.classes.count("needed") > len((r.expected or "").split()) // 2 for r in run.rollouts]
    wrong = [not rollout.correct for rollout in run.rollouts]
    return {
        "repeated": sum(repeated) / n,
        "wrong_repeated": sum(a and b for a, b in zip(wrong, repeated, strict=True)) / n,
        "wrong_otherwise": sum(a and not b for a, b in zip(wrong, repeated, strict=True)) / n,
    }


def train_and_measure(
    name: str, options: Mapping[str, str], work: Path, measured: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """What ``measured`` finds in the directory of a Ledger run with these options; kept in the work directory."""
    path, directory = work / f"{name}.json", work / name
    if not path.is_file():
        arguments = [part for key, value in options.items() for part in (f"--{key}", value)]
        arguments += ["--output_dir", str(directory), "--overwrite"]
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", "atmanrl", "train", "--config", "ledger", *arguments], check=True)
        write_text_atomically(path, json.dumps(measured(directory), indent=1) + "\n")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@dataclass(frozen=True)
class Comparison:
    """Arms of one training run that differ in some options, each with the same seeds.

    Attributes:
        name: of the results file.
        arms: by name, what each overrides in the Ledger recipe beside ``setting``.
        setting: what all of them override.
        seeds: of the whole comparison.
        measure: the metrics of a held-out run and of the model that wrote it.
    """

    name: str
    arms: Mapping[str, Mapping[str, str]]
    setting: Mapping[str, str]
    seeds: Sequence[int]
    measure: Callable[[Run, str], dict[str, float]]

    def main(self, description: str | None) -> int:
        """The command line: train and measure what is missing, and write the results file."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--seeds", type=int, nargs="+", help="run these and write no results")
        parser.add_argument("--work", type=Path, default=Path("runs") / self.name, metavar="DIR")
        arguments = parser.parse_args()
        arguments.work.mkdir(parents=True, exist_ok=True)
        seeds = self.seeds if arguments.seeds is None else arguments.seeds
        runs = [self.run_one(arm, seed, arguments.work) for seed in seeds for arm in self.arms]
        if arguments.seeds is None:
            self.save(runs, self.start(arguments.work))
        return 0

    def run_one(self, arm: str, seed: int, work: Path) -> dict[str, Any]:
        """Train one arm with one seed and measure it, unless the work directory holds the result."""

        def measured(directory: Path) -> dict[str, Any]:
            metrics = self.measure(Run.load(directory / "after.json"), str(directory / "model"))
            return {"arm": arm, "seed": seed, "metrics": metrics}

        options = {**self.setting, **self.arms[arm], "seed": str(seed)}
        return train_and_measure(f"{arm}-{seed}", options, work, measured)

    def start(self, work: Path) -> dict[str, float]:
        """The metrics of the checkpoint every run starts from, on the same prompts with the same draws."""
        path = work / "start.json"
        if not path.is_file():
            arguments = [part for name, value in self.setting.items() for part in (f"--{name}", value)]
            command = ["evaluate", "--config", "ledger", "--checkpoints", "ledger", "--output", str(work / "start")]
            subprocess.run([sys.executable, "-m", "atmanrl", *command, *arguments], check=True)
            metrics = self.measure(Run.load(work / "start" / "ledger.json"), "ledger")
            write_text_atomically(path, json.dumps(metrics, indent=1) + "\n")
        content: dict[str, float] = json.loads(path.read_text())
        return content

    def save(self, runs: Sequence[Mapping[str, Any]], start: Mapping[str, float]) -> None:
        """Write the results file in place of an older one."""
        content = {
            "commit": commit(),
            "versions": {package: version(package) for package in ("torch", "transformers", "trl")},
            "recipe": load_recipe("ledger", list(self.setting.items())).to_yaml(),
            "arms": self.arms,
            "start": start,
            "runs": runs,
        }
        for old in RESULTS.glob(f"{self.name}_*.json"):
            old.unlink()
        date = datetime.datetime.now(datetime.UTC).date()
        write_text_atomically(
            RESULTS / f"{self.name}_{date}_{content['commit']}.json", json.dumps(content, indent=1) + "\n"
        )


CLAIM = Comparison("ledger_claim", ARMS, SETTING, SEEDS, measure)


if __name__ == "__main__":
    sys.exit(CLAIM.main(__doc__))
