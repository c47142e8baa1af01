"""Which tokens of a chain of thought the answer rests on."""

from atmanrl.saliency.engine import optimize_masks
from atmanrl.saliency.result import NonFiniteLossError, RolloutSaliency, SaliencyResult, Trajectory
from atmanrl.saliency.working_copy import working_copy

__all__ = ["NonFiniteLossError", "RolloutSaliency", "SaliencyResult", "Trajectory", "optimize_masks", "working_copy"]
