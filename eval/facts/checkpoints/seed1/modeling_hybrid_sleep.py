"""Lets transformers load this checkpoint with trust_remote_code=True."""

from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM, HybridSleepModel

__all__ = ["HybridSleepConfig", "HybridSleepForCausalLM", "HybridSleepModel"]
