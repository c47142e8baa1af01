"""Tasks: prompts, gold answers, and how an answer is read from a completion."""

from __future__ import annotations

from atmanrl.config import DataConfig
from atmanrl.tasks import gsm8k, ledger, mmlu
from atmanrl.tasks.files import DataError
from atmanrl.tasks.task import Task

__all__ = ["DataConfig", "DataError", "Task", "load_task"]

_LOADERS = {"ledger": ledger.load, "gsm8k": gsm8k.load, "mmlu": mmlu.load}


def load_task(config: DataConfig, *, leave_out: bool = False) -> Task:
    """The task named by ``config``, its rows loaded and its gold answers checked.

    Args:
        config: which task, and where its rows are.
        leave_out: leave a row out that cannot be used, instead of raising; `Task.left_out` says which and why.

    Raises:
        DataError: for a file that is missing, not UTF-8, malformed, lacks a column or has a gold answer that cannot be
            read (with file and line), and for a hub that cannot be reached (with how to pass a local file).
    """
    return _LOADERS[config.name](config, [] if leave_out else None)
