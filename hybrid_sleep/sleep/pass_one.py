"""Pass 1 over some tokens: the layers once, and what later passes read is kept aside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from hybrid_sleep.sleep.backbone import Backbone
from hybrid_sleep.sleep.state import LayerState


class PassOne(NamedTuple):
    """What pass 1 leaves.

    outputs: `[B, T, D]` each: what the last layer gives; where all are asked for, the input and
        what each layer gives.
    hidden: `[B, T, D]`, what the passes of a sleep start from.
    states: by layer, the states after these tokens.
    """

    outputs: list[torch.Tensor]
    hidden: torch.Tensor
    states: dict[int, LayerState]


def pass_one(
    backbone: Backbone,
    h: torch.Tensor,
    states: Mapping[int, LayerState],
    context: Any,
    *,
    every_layer: bool = False,
) -> PassOne:
    """All layers over `h: [B, T, D]`, which starts from `states`; see `Backbone.run_blocks`.

    every_layer: keep what each of them gives.
    """
    layers, (_, end) = backbone.options.layers(len(backbone.blocks)), backbone.options.loop
    handed_on = backbone.options.start_of_passes
    # Where every layer is asked for, each is a range of its own.
    stops = range(1, layers + 1) if every_layer else sorted({handed_on, end, layers} - {0})
    outputs, start, hidden = [h], 0, h
    after: dict[int, LayerState] = {}
    for stop in stops:
        out, new = backbone.run_blocks(range(start, stop), h, states, context)
        assert out is not None
        h = out
        outputs.append(h)
        after |= new
        if stop == handed_on:
            # The loop's output, not the coda's.
            hidden = h
        start = stop
    return PassOne(outputs if every_layer else outputs[-1:], hidden, after)
