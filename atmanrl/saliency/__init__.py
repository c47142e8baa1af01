"""Which tokens of a chain of thought the answer rests on."""

from atmanrl.saliency.engine import NonFiniteLossError, optimize_masks
from atmanrl.saliency.result import RolloutSaliency, SaliencyResult

__all__ = ["NonFiniteLossError", "RolloutSaliency", "SaliencyResult", "optimize_masks"]
