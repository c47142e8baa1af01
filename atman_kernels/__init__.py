"""Attention with a trainable additive bias per key, for GPUs and CPUs; nothing of size s x s is ever stored."""

from atman_kernels.attention import attention, attention_varlen, backend, debug_checks
from atman_kernels.plan import AttentionPlan, SharedPrefix
from atman_kernels.statistics import AttentionStatistics, attention_statistics

__all__ = [
    "AttentionPlan",
    "AttentionStatistics",
    "SharedPrefix",
    "attention",
    "attention_statistics",
    "attention_varlen",
    "backend",
    "debug_checks",
]
