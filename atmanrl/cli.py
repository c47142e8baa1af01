"""The command line: parse, import late, call. Loading this module, and ``--help``, load no torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from atmanrl.errors import InputError
from atmanrl.recipe import builtin_recipes, parse_overrides

TRAIN_HELP = """\
Any key of a recipe can be overridden: --learning_rate 1e-6, --mask.steps 100, --data.path train.jsonl. Keys are the
sections model.*, data.*, evaluation.* and mask.*, and the fields of atmanrl.trainer.AtManGRPOConfig, which are those of
TRL's GRPOConfig and of Hugging Face's TrainingArguments as well.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status: 0, 1 where a check failed, 2 for input that cannot be used."""
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    try:
        if known.command == "train":
            from atmanrl.commands.train import train

            return train(
                known.config,
                parse_overrides(rest),
                dry_run=known.dry_run,
                overwrite=known.overwrite,
                resume=known.resume,
            )
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        from atmanrl.commands.doctor import doctor

        return doctor()
    except InputError as error:
        print(f"atmanrl {known.command}: {error}", file=sys.stderr)
        return 2


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
        "--dry-run", action="store_true", help="print the batch arithmetic and what an update costs, and stop"
    )
    again = train.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue the run in output_dir from its last checkpoint")
    again.add_argument("--overwrite", action="store_true", help="delete the run that output_dir holds")

    commands.add_parser(
        "doctor",
        help="check the installation: versions, devices, kernels",
        description="Check the installation: versions, devices, and every available kernel against the reference.",
    )
    return parser


def _version() -> str:
    try:
        return version("atmanrl")
    except PackageNotFoundError:
        return "(source tree)"


if __name__ == "__main__":
    sys.exit(main())
