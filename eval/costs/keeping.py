"""Two ways to hold a past: consolidated in fast weights, or kept whole in the KV cache.

The second is the same model with the same weights, and one window for all of the past.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from hybrid_sleep import HybridSleepForCausalLM, SleepCache


class KeepingCache(SleepCache):
    """A cache without the hidden states that only a sleep would read."""

    def append(self, states: dict[int, Any], hidden: torch.Tensor, new: torch.Tensor) -> None:
        """Take in `new: [B]` tokens a row: the states after them, nothing else."""
        self.states = self.states | states
        self.counts = self.counts + new
        self.positions = self.positions + new


def keeper_of(model: HybridSleepForCausalLM, tokens: int) -> HybridSleepForCausalLM:
    """`model` with one window of `tokens` tokens; parameters are shared, not copied.

    Its answers mean little, as the weights were trained for short windows; its cost is that of
    keeping the past.
    """
    config: Any = copy.deepcopy(model.config)
    config.window = tokens
    keeper = HybridSleepForCausalLM(config)
    keeper.load_state_dict(model.state_dict(), assign=True)
    keeper.set_attn_implementation(model.config._attn_implementation)
    return keeper.eval()


def appended(cache: SleepCache) -> list[torch.Tensor]:
    """Keys and values of every attention layer copied to make room for one more token.

    A forward does this too; a server that reserves its memory beforehand need not.
    """
    kept = [x for state in cache.states.values() for x in state.slots]
    return [torch.cat((x, x[:, :, -1:]), dim=2) for x in kept]


def consolidated(model: HybridSleepForCausalLM, ids: torch.Tensor, passes: int) -> SleepCache:
    """The cache after `ids`, whole windows, and a sleep over each of them."""
    cache = SleepCache(model.config)
    model(ids, cache=cache, sleep_passes=passes, logits_to_keep=1)
    model.sleep(cache, passes)
    return cache


def kept_cache(keeper: HybridSleepForCausalLM, ids: torch.Tensor) -> KeepingCache:
    """The cache after `ids`, with all their keys and values; keeper: see `keeper_of`."""
    cache = KeepingCache(keeper.config)
    keeper(ids, cache=cache, logits_to_keep=1)
    return cache
