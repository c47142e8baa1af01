"""`atmanrl` that waits for a file: before a step of its training, and before it ends. Tests send it signals.

A signal that is sent at a moment of a run may come after the run's end: on a busy machine the sender sleeps for longer
than the run takes. This one cannot end.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from atmanrl.cli import main
from atmanrl.training.trainer import AtManGRPOTrainer


def main_behind(gate: Path, step: int, arguments: list[str]) -> int:
    """Exit status of a command that waits for ``gate`` after ``step`` optimiser steps, and at its end."""
    training_step = AtManGRPOTrainer.training_step

    def wait() -> None:
        while not gate.exists():
            time.sleep(0.005)

    def held(self: AtManGRPOTrainer, *rest: Any, **options: Any) -> Any:
        if self.state.global_step >= step:
            wait()
        return training_step(self, *rest, **options)

    AtManGRPOTrainer.training_step = held  # type: ignore[method-assign]
    status = main(arguments)
    wait()
    return status


if __name__ == "__main__":
    sys.exit(main_behind(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
