"""Which tokens of a chain of thought the answer rests on."""

from atmanrl.models import working_copy
from atmanrl.saliency.decoder import why_unsupported
from atmanrl.saliency.engine import optimize_masks
from atmanrl.saliency.result import NonFiniteLossError, RolloutSaliency, SaliencyResult, Trajectory

__all__ = [
    "NonFiniteLossError",
    "RolloutSaliency",
    "SaliencyResult",
    "Trajectory",
    "optimize_masks",
    "why_unsupported",
    "working_copy",
]
