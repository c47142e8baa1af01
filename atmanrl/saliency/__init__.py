"""Which tokens of a chain of thought the answer rests on."""

from atmanrl.saliency.decoder import why_unsupported
from atmanrl.saliency.engine import optimize_masks
from atmanrl.saliency.result import NonFiniteLossError, RolloutSaliency, SaliencyResult, Trajectory
from atmanrl.saliency.working_copy import working_copy

__all__ = [
    "NonFiniteLossError",
    "RolloutSaliency",
    "SaliencyResult",
    "Trajectory",
    "optimize_masks",
    "why_unsupported",
    "working_copy",
]
