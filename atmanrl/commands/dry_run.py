"""``atmanrl train --dry-run``: what one update takes, from the configuration alone."""

from __future__ import annotations

from atmanrl.recipe import Recipe
from atmanrl.trainer import AtManGRPOConfig


def describe_update(recipe: Recipe, args: AtManGRPOConfig) -> str:
    return args.arithmetic.describe()
