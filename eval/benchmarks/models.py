"""Small untrained models to time: cost does not depend on what the weights have learned."""

from __future__ import annotations

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
) -> Any:
    """A HybridSleepForCausalLM with alternating attention and `state_space` layers, heads of 32."""
    import torch

    from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM

    heads = max(2, hidden // 32)
    config = HybridSleepConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
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
    return HybridSleepForCausalLM(config).to(device).eval()
