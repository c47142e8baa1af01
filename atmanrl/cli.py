"""The command line: parse, import late, call. Loading this module, and ``--help``, load no torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from atmanrl.config import DTYPES, ModelConfig
from atmanrl.errors import InputError, RunError
from atmanrl.recipe import builtin_recipes, parse_overrides

TRAIN_HELP = """\
Any key of a recipe can be overridden: --learning_rate 1e-6, --mask.steps 100, --data.path train.jsonl. Keys are the
sections model.*, data.*, evaluation.* and credit_assignment.*, a section of settings for each estimator (mask.*,
sparse_mask.*, integrated.*, leave_one_out.*, ...), and the fields of AtManGRPOConfig, which are those of TRL's
GRPOConfig and of Hugging Face's TrainingArguments as well. --print-config lists them all. Hyphens and underscores are
the same.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status.

    0; 1 where a check failed or a run had to stop; 2 for input that cannot be used.
    """
    parser = _parser()
    known, rest = parser.parse_known_args(
        [_hyphenated(each) for each in (sys.argv[1:] if arguments is None else arguments)]
    )
    try:
        if known.command == "train":
            from atmanrl.training.run import train

            return train(
                known.config,
                parse_overrides(rest),
                dry_run=known.dry_run,
                overwrite=known.overwrite,
                resume=known.resume,
                print_config=known.print_config,
            )
        if known.command == "evaluate":
            from atmanrl.evaluation.evaluate import evaluate_command

            return evaluate_command(
                known.config,
                parse_overrides(rest),
                checkpoints=known.checkpoints,
                output=known.output,
                faithfulness=known.faithfulness,
                initial_model=known.initial_model,
            )
        if known.command == "explain":
            return _explain(known, parse_overrides(rest))
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        if known.command == "compare":
            from atmanrl.evaluation.compare import compare_command

            return compare_command(known.before, known.after, output=known.output)
        if known.command == "bench":
            return _bench(known)
        from atmanrl.doctor import doctor

        return doctor()
    except RunError as error:
        print(f"atmanrl {known.command}: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        # Hours into a training run any other error is a bug, and its traceback is what one needs.
        if known.command == "train" and not isinstance(error, InputError):
            raise
        print(f"atmanrl {known.command}: {error}", file=sys.stderr)
        return 2


def _hyphenated(argument: str) -> str:
    """An option's name as the parsers know it: ``--dry_run`` is ``--dry-run``; keys of recipes take either."""
    name, equals, value = argument.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if name.startswith("--") else argument


def _explain(known: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    from atmanrl.evaluation.explain import explain_command

    if known.statistics:
        return _statistics(known, overrides)
    if known.plot is not None:
        raise ValueError("--plot needs --statistics")
    return explain_command(
        ModelConfig(known.model, known.revision, known.dtype),
        overrides,
        examples=known.input,
        prompt=known.prompt,
        completion=known.completion,
        answer=known.answer,
        html=known.html,
        json=known.json,
        csv=known.csv,
        max_new_tokens=known.max_new_tokens,
        temperature=known.temperature,
        seed=known.seed,
        color=known.color,
        estimators=known.estimator or ["mask"],
        deletion=known.deletion,
        record_every=known.record_every,
    )


def _statistics(known: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    from atmanrl.evaluation.explain import examples_of, generation_of
    from atmanrl.rhythm.report import statistics_command

    for option in ("html", "csv", "deletion", "record_every", "estimator"):
        if getattr(known, option):
            raise ValueError(f"--{option.replace('_', '-')} is not for --statistics, which scores no tokens")
    return statistics_command(
        ModelConfig(known.model, known.revision, known.dtype),
        examples_of(known.input, known.prompt, known.completion, known.answer),
        overrides,
        plot=known.plot,
        json=known.json,
        generation=generation_of(known.max_new_tokens, known.temperature),
        temperature=known.temperature,
        seed=known.seed,
        color=known.color,
    )


def _bench(known: argparse.Namespace) -> int:
    from atmanrl.bench import bench_command

    least, most = known.cot
    return bench_command(
        model=known.model,
        shape=known.shape,
        dtype=known.dtype,
        queries=known.queries,
        rollouts=known.rollouts,
        prompt=known.prompt,
        cot=(least, most),
        answer=known.answer,
        arms=known.arms,
        steps=known.steps,
        output=known.output,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atmanrl", description="Saliency of a chain of thought, and reinforcement learning on it."
    )
    parser.add_argument("--version", action="version", version=f"atmanrl {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a model with GRPO on outcome and saliency rewards",
        description="Train a model with GRPO on outcome and saliency rewards.",
        epilog=TRAIN_HELP,
        allow_abbrev=False,
    )
    train.add_argument(
        "--config", required=True, metavar="RECIPE", help=f"a YAML file, or one of: {', '.join(builtin_recipes())}"
    )
    train.add_argument(
        "--dry-run", action="store_true", help="print batch sizes and the estimated cost of an update, then stop"
    )
    train.add_argument("--print-config", action="store_true", help="print every setting with its value, and stop")
    again = train.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue the run in output_dir from its last checkpoint")
    again.add_argument("--overwrite", action="store_true", help="delete the run that output_dir holds")

    _add_evaluate(commands)
    _add_explain(commands)
    compare = commands.add_parser(
        "compare",
        help="compare two files of explain or evaluate, prompt by prompt",
        description="Print the paired comparison of two files that explain or evaluate wrote: two models' completions "
        "of the same prompts, or two estimators' scores of the same completions.",
    )
    compare.add_argument("before", type=Path, metavar="BEFORE.json")
    compare.add_argument("after", type=Path, metavar="AFTER.json")
    compare.add_argument("--output", type=Path, metavar="DIR", help="also write report.html, plots and tables there")

    _add_bench(commands)
    commands.add_parser(
        "doctor",
        help="check the installation: versions, devices, kernels",
        description="Check the installation: versions, devices, and every available kernel against the reference.",
    )
    return parser


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="accuracy, length and saliency of checkpoints on held-out prompts",
        description="Evaluate checkpoints on the same held-out prompts; several are compared with the first.",
        epilog="Any key of the recipe can be overridden: --evaluation.prompts 64, --evaluation.saliency false, "
        "--saliency_estimator best, --sparse-mask.sparsity 0.2, --data.path test.jsonl.",
        allow_abbrev=False,
    )
    evaluate.add_argument(
        "--config",
        required=True,
        metavar="RECIPE",
        help=f"a YAML file, such as a run's config.yaml, or one of: {', '.join(builtin_recipes())}",
    )
    evaluate.add_argument(
        "--checkpoints",
        nargs="+",
        default=[],
        metavar="MODEL",
        help='directories, Hugging Face ids or "ledger"; the recipe\'s model if left out',
    )
    evaluate.add_argument(
        "--output",
        type=Path,
        default=Path("runs/evaluation"),
        metavar="DIR",
        help="where the results go (default: %(default)s)",
    )
    evaluate.add_argument(
        "--faithfulness",
        action="store_true",
        help="also change every chain of thought (cut, hide, replace) and measure the effect on the answer",
    )
    evaluate.add_argument(
        "--initial-model",
        metavar="MODEL",
        help="with --faithfulness: also let this model read every checkpoint's chains of thought",
    )


def _add_explain(commands: Any) -> None:
    explain = commands.add_parser(
        "explain",
        help="score each token of a chain of thought by its effect on the answer",
        description="Score each token of a chain of thought by its effect on the answer.",
        epilog="Each estimator's own settings are a section of its name: --mask.steps 100 (or --mask.preset half), "
        "--sparse-mask.sparsity 0.2, --integrated.steps 9, --fai.horizon [10,50].",
        allow_abbrev=False,
    )
    explain.add_argument("--model", required=True, help='directory, Hugging Face id, or "ledger" (built in)')
    explain.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    explain.add_argument("--dtype", default="float32", choices=DTYPES, help="of the parameters (default: %(default)s)")
    given = explain.add_mutually_exclusive_group(required=True)
    given.add_argument(
        "--input",
        type=Path,
        metavar="FILE.jsonl",
        help='one object per line: "prompt" (text or messages); optionally "completion", "answer", "expected", "id"',
    )
    given.add_argument("--prompt", help="one prompt")
    explain.add_argument("--completion", help="its completion; the model writes one if left out")
    explain.add_argument("--answer", help="the answer as it stands in the completion, where nothing announces it")
    explain.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="length limit of written completions (default: the context's end)",
    )
    explain.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="of written completions (default: 0, greedy)"
    )
    explain.add_argument("--seed", type=int, default=0, help="of sampling and of random scores (default: %(default)s)")
    explain.add_argument(
        "--estimator",
        nargs="+",
        metavar="NAME",
        help="estimators of saliency: mask (the paper's, the default), best, sparse-mask, integrated, gradient, "
        "leave-one-out, atman, atman-concept, attention, fai or random; the page can switch between several",
    )
    explain.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page")
    explain.add_argument("--json", type=Path, metavar="FILE", help="write what `atmanrl compare` reads")
    explain.add_argument("--csv", type=Path, metavar="FILE", help="write a row per token")
    explain.add_argument(
        "--deletion", action="store_true", help="also hide each token in turn: how much the answer's loss rises"
    )
    explain.add_argument(
        "--statistics",
        action="store_true",
        help="instead of scores: WAAD and FAI of every token, their coupling, and the effect of replaced tokens; "
        "--series.window and --series.horizon can be set",
    )
    explain.add_argument("--plot", type=Path, metavar="FILE", help="with --statistics: picture of the first completion")
    explain.add_argument(
        "--record-every", type=int, metavar="STEPS", help="also record the course of masks and losses, for the page"
    )
    explain.add_argument("--no-color", dest="color", action="store_false", help="print without colours")


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="throughput of mask optimisation, beside other ways to write it",
        description="Measure one step of mask optimisation, forward and backward of all rollouts' losses without "
        "AdamW: the engine's fast and general path, the loop that the paper suggests, batched SDPA and FlexAttention.",
        allow_abbrev=False,
    )
    given = bench.add_mutually_exclusive_group()
    given.add_argument("--model", help='directory, Hugging Face id, or "ledger" (built in)')
    given.add_argument(
        "--shape",
        default="llama-30m",
        help="random weights of llama-30m, llama-30m-untied or llama-3.2-3b (default: %(default)s)",
    )
    bench.add_argument("--dtype", default="float32", choices=DTYPES, help="of the parameters (default: %(default)s)")
    sizes = (
        ("queries", 8, "distinct prompts"),
        ("rollouts", 8, "per query"),
        ("prompt", 150, "tokens"),
        ("answer", 8, "tokens"),
        ("steps", 2, "timed, after one to warm up and one to count"),
    )
    for name, default, meaning in sizes:
        bench.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{meaning} (default: %(default)s)"
        )
    bench.add_argument(
        "--cot",
        type=int,
        nargs=2,
        default=(150, 250),
        metavar=("LEAST", "MOST"),
        help="tokens of a chain of thought (default: 150 250)",
    )
    bench.add_argument(
        "--arms",
        nargs="+",
        default=["fast", "general", "sdpa", "flex", "paper"],
        metavar="ARM",
        help="of fast, fast-captured, general, paper, paper-answer-logits, sdpa, sdpa-by-8 and flex; ratios are to the "
        "first that runs (default: fast general sdpa flex paper)",
    )
    bench.add_argument("--output", type=Path, metavar="FILE.json", help="also write the measurements there")


def _version() -> str:
    try:
        return version("atmanrl")
    except PackageNotFoundError:
        return "(source tree)"


if __name__ == "__main__":
    sys.exit(main())
