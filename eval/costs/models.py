"""Untrained models to time: cost does not depend on what the weights have learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

VOCABULARY = 256


def untrained(
    state_space: str,
    *,
    hidden: int,
    layers: int,
    window: int,
    eviction: str = "hard",
    loop: tuple[int, int] | None = None,
    device: Any = "cpu",
    dtype: str = "float32",
    head_dim: int = 32,
    vocabulary: int = VOCABULARY,
    layer_types: Sequence[str] | None = None,
) -> Any:
    """A HybridSleepForCausalLM with alternating attention and `state_space` layers, heads of 32.

    layer_types: another order of layers; dtype: a torch dtype's name.
    """
    import torch

    from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM

    heads = max(2, hidden // head_dim)
    fields: dict[str, Any] = dict(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        layer_types=None if layer_types is None else list(layer_types),
        num_attention_heads=heads,
        state_space=state_space,
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=hidden // heads,
        linear_value_head_dim=hidden // heads,
        window=window,
        eviction=eviction,
        loop=loop,
    )
    torch.manual_seed(0)
    model = HybridSleepForCausalLM(HybridSleepConfig(**fields))
    return model.to(device, getattr(torch, dtype)).eval()
