"""Estimators of token saliency behind one interface, from a single forward to hundreds."""

from atmanrl.saliency.estimators.attention import FutureInfluence, ReceivedAttention
from atmanrl.saliency.estimators.bias_path import Gradient, Integrated
from atmanrl.saliency.estimators.chance import Random
from atmanrl.saliency.estimators.estimate import BEST, ESTIMATORS, estimate_saliency, make_estimator
from atmanrl.saliency.estimators.interface import Estimator, Passes, TokenScores
from atmanrl.saliency.estimators.masks import Mask, SparseMask
from atmanrl.saliency.estimators.suppression import Suppression, substitution_effects

__all__ = [
    "BEST",
    "ESTIMATORS",
    "Estimator",
    "FutureInfluence",
    "Gradient",
    "Integrated",
    "Mask",
    "Passes",
    "Random",
    "ReceivedAttention",
    "SparseMask",
    "Suppression",
    "TokenScores",
    "estimate_saliency",
    "make_estimator",
    "substitution_effects",
]
