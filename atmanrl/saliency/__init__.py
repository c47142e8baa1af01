"""Which tokens of a chain of thought the answer rests on."""

from atmanrl.saliency.engine import optimize_masks
from atmanrl.saliency.result import NonFiniteLossError, RolloutSaliency, SaliencyResult, Trajectory

__all__ = ["NonFiniteLossError", "RolloutSaliency", "SaliencyResult", "Trajectory", "optimize_masks"]
