"""The same weights in a model that never sleeps: all of the past stays in the KV cache."""

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

    What it says means little, as the weights were made for short windows; what it costs is what
    keeping the past costs.
    """
    config = copy.deepcopy(model.config)
    config.window = tokens
    keeper = HybridSleepForCausalLM(config)
    keeper.load_state_dict(model.state_dict(), assign=True)
    keeper.set_attn_implementation(model.config._attn_implementation)
    return keeper.eval()


def appended(cache: KeepingCache) -> list[torch.Tensor]:
    """Keys and values of every attention layer copied to make room for one more token.

    A forward does this too; a server that reserves its memory beforehand need not.
    """
    kept = [x for state in cache.states.values() for x in state.slots]
    return [torch.cat((x, x[:, :, -1:]), dim=2) for x in kept]
