"""Saliency of chain-of-thought tokens: its estimators, and one function that runs them."""

from atmanrl.models import working_copy
from atmanrl.saliency.attention import FutureInfluence, ReceivedAttention
from atmanrl.saliency.decoder import why_unsupported
from atmanrl.saliency.estimate import BEST, ESTIMATORS, Random, estimate_saliency, make_estimator, optimize_masks
from atmanrl.saliency.gradients import Gradient, Integrated
from atmanrl.saliency.leave_one_out import Suppression, substitution_effects
from atmanrl.saliency.mask import Mask
from atmanrl.saliency.scores import Estimator, NonFiniteLossError, Passes, TokenScores, Trajectory
from atmanrl.saliency.sparse_mask import SparseMask

__all__ = [
    "BEST",
    "ESTIMATORS",
    "Estimator",
    "FutureInfluence",
    "Gradient",
    "Integrated",
    "Mask",
    "NonFiniteLossError",
    "Passes",
    "Random",
    "ReceivedAttention",
    "SparseMask",
    "Suppression",
    "TokenScores",
    "Trajectory",
    "estimate_saliency",
    "make_estimator",
    "optimize_masks",
    "substitution_effects",
    "why_unsupported",
    "working_copy",
]
