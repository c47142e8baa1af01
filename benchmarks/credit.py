"""Does it help to give some tokens more of the advantage? Seven arms of GRPO on two Ledgers, the same seeds for each.

    python -m benchmarks.credit                      what is missing of all seeds, then the results file
    python -m benchmarks.credit --seeds 0 1          these seeds alone; several processes may share the work directory

Every run starts from the built-in checkpoint, rewards the outcome alone and differs from the others of its seed in
``credit_assignment.strategy`` only. "ledger" is the task of pre-training, which the checkpoint solves almost always;
"longer" has 8 pairs in the prompt in place of 5, on which it fails mostly. One file per run stays in the work
directory, so that a stopped call goes on where it was. `benchmarks.credit_report` reads the results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from atmanrl.evaluation.records import Run, write_text_atomically
from atmanrl.evaluation.summary import summarize
from atmanrl.tasks import load_task
from atmanrl.training.config import load_recipe
from benchmarks.claim import train_and_measure
from benchmarks.device import RESULTS, commit

TASKS = {"longer": {"data.ledger.pairs": "8"}, "ledger": {}}
# The masks of the saliency arm are those of the preset "tenth": 20 steps in place of the paper's 200.
ARMS: dict[str, dict[str, str]] = {
    "none": {},
    "local": {},
    "global": {},
    "coupled": {},
    "random": {},
    "entropy": {},
    "saliency": {"mask.steps": "20", "mask.lr": "1e-2"},
}
# The learning rate is a quarter of the recipe's: at that rate every arm is through within 40 steps. The horizon begins
# at 3 tokens: completions have some 17, and the paper's 10 would leave most of them without a later row.
SETTING = {
    "saliency_weight": "0",
    "learning_rate": "5e-5",
    "max_steps": "60",
    "credit_assignment.series.horizon": "[3, 100]",
    "evaluation.prompts": "256",
    "evaluation.samples": "2",
    "evaluation.before": "false",
    "evaluation.saliency": "false",
    "page_steps": "0",
    "save_strategy": "no",
    "report_to": "none",
}
SEEDS = {"longer": range(8), "ledger": range(6)}
CURVES = {"answers/accuracy": "accuracy", "cot/tokens": "cot_tokens"}


def options(task: str, arm: str, seed: int) -> dict[str, str]:
    """What a run overrides in the Ledger recipe."""
    return {**SETTING, **TASKS[task], **ARMS[arm], "credit_assignment.strategy": arm, "seed": str(seed)}


def run_one(task: str, arm: str, seed: int, work: Path) -> dict[str, Any]:
    """Held-out metrics and the training curves of one run, one point per generation batch."""

    def measured(directory: Path) -> dict[str, Any]:
        rows = summarize(Run.load(directory / "after.json"), resamples=1).rows
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        curves = {name: [[line["step"], line[key]] for line in lines if key in line] for key, name in CURVES.items()}
        metrics = {row.name: row.runs[0].value for row in rows if row.runs[0].value is not None}
        return {"task": task, "arm": arm, "seed": seed, "metrics": metrics, "curves": curves}

    return train_and_measure(f"{task}-{arm}-{seed}", options(task, arm, seed), work, measured)


def start(task: str, work: Path) -> dict[str, float]:
    """The metrics of the checkpoint every run starts from."""
    path = work / f"{task}-start.json"
    if not path.is_file():
        arguments = [part for key, value in (SETTING | TASKS[task]).items() for part in (f"--{key}", value)]
        command = ["evaluate", "--config", "ledger", "--checkpoints", "ledger", "--output", str(work / f"{task}-start")]
        subprocess.run([sys.executable, "-m", "atmanrl", *command, *arguments], check=True)
        rows = summarize(Run.load(work / f"{task}-start" / "ledger.json"), resamples=1).rows
        metrics = {row.name: row.runs[0].value for row in rows if row.runs[0].value is not None}
        write_text_atomically(path, json.dumps(metrics, indent=1) + "\n")
    content: dict[str, float] = json.loads(path.read_text())
    return content


def explained(task: str, work: Path) -> dict[str, Any]:
    """What `atmanrl explain --statistics` finds on the checkpoint every run starts from, without the single series."""
    path = work / f"{task}-explained.json"
    if not path.is_file():
        recipe = load_recipe("ledger", list((SETTING | TASKS[task]).items()))
        examples = work / f"{task}-prompts.jsonl"
        rows = load_task(recipe.data).test["prompt"]
        examples.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in rows))
        horizon = SETTING["credit_assignment.series.horizon"]
        command = ["explain", "--model", "ledger", "--input", str(examples), "--statistics", "--json", str(path)]
        command += ["--temperature", "1", "--max-new-tokens", "64", "--series.horizon", horizon]
        subprocess.run([sys.executable, "-m", "atmanrl", *command], check=True)
    content: dict[str, Any] = json.loads(path.read_text())
    del content["rollouts"]
    return content


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", help="run these and write no results")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--work", type=Path, default=Path("runs/credit"), metavar="DIR")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    runs = [
        run_one(task, arm, seed, arguments.work)
        for task in arguments.tasks
        for seed in (SEEDS[task] if arguments.seeds is None else arguments.seeds)
        for arm in ARMS
    ]
    if arguments.seeds is not None:
        return 0
    content = {
        "commit": commit(),
        "versions": {package: version(package) for package in ("torch", "transformers", "trl")},
        "recipe": load_recipe("ledger", list(SETTING.items())).to_yaml(),
        "tasks": TASKS,
        "arms": ARMS,
        "start": {task: start(task, arguments.work) for task in arguments.tasks},
        "explain": {task: explained(task, arguments.work) for task in arguments.tasks},
        "runs": runs,
    }
    for old in RESULTS.glob("credit_*.json"):
        old.unlink()
    path = RESULTS / f"credit_{datetime.datetime.now(datetime.UTC).date()}_{content['commit']}.json"
    write_text_atomically(path, json.dumps(content) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
