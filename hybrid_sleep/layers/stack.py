"""Run a range of blocks over one block of tokens: one pass of the model or part of one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hybrid_sleep.layers.context import Context
from hybrid_sleep.sleep.checkpointing import Checkpointing, recompute
from hybrid_sleep.sleep.options import SleepOptions
from hybrid_sleep.sleep.state import LayerState

# Which rows sleep when is decided in every call, from counters that are never the same: traced, it
# would be compiled again each time.
NOT_COMPILED = (
    "windows and sleeps are run by Python, which decides from what the cache holds; compile the "
    "blocks, which is where the time goes: for block in model.model.layers: block.compile()"
)


class Stack:
    """Blocks over explicit states: the part of `sleep.backbone.Backbone` that runs them."""

    config: Any
    layers: nn.ModuleList
    later_layers: nn.ModuleList
    checkpointing: Checkpointing

    if TYPE_CHECKING:
        # Of the model that this is a part of.
        @property
        def options(self) -> SleepOptions: ...

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers in the order in which they are applied, the same one again where shared, and
        behind them those that later passes have of their own."""
        distinct = len(self.layers)
        first = [self.layers[i % distinct] for i in range(self.config.num_hidden_layers)]
        return [*first, *self.later_layers]

    def run_blocks(
        self,
        layers: range,
        h: torch.Tensor,
        states: Mapping[int, LayerState],
        context: Context,
        *,
        last_writer: int | None = None,
        recomputing: bool = False,
    ) -> tuple[torch.Tensor | None, dict[int, LayerState]]:
        """Apply `blocks[i] for i in layers` to `h: [B, T, D]`, see `Backbone.run_blocks`.

        With `checkpointing.group`, so many blocks at a time are computed again in the backward
        (`recomputing`: this is one such group). States are arguments and results of what is
        recomputed, so nothing is lost on the way.
        """
        after: dict[int, LayerState] = {}
        blocks = self.blocks
        behind = self.options.behind(layers.start, len(blocks))
        group = self.checkpointing.group
        if group is not None and not recomputing and torch.is_grad_enabled():
            for first in range(0, len(layers), group):
                part = layers[first : first + group]
                run = partial(self.run_blocks, part, last_writer=last_writer, recomputing=True)
                own = {i - behind: states[i - behind] for i in part if i - behind in states}
                h, new = recompute(run, h, own, context)
                after |= new
                if h is None:
                    break
            return h, after
        for i in layers:
            layer = i - behind
            h, after[layer] = blocks[i](h, states.get(layer), context, layer == last_writer)
            if layer == last_writer:
                break
        return h, after
