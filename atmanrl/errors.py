"""The errors that the command line shows without a traceback; importing this module loads no torch."""

from __future__ import annotations


class InputError(ValueError):
    """Input that cannot be used: a recipe, data, a model's name or a directory. The message says what and where."""


class RunError(Exception):
    """A run that had to stop for want of disk or memory. The message says of what, and how to go on."""
