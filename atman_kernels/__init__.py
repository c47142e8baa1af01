"""Attention with a trainable additive bias per key, for GPUs and CPUs; nothing of size s x s is ever stored."""

from atman_kernels.attention import attention, attention_varlen, backend, debug_checks
from atman_kernels.plan import AttentionPlan, SharedPrefix

__all__ = ["AttentionPlan", "SharedPrefix", "attention", "attention_varlen", "backend", "debug_checks"]
