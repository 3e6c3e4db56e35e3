"""What one pass of a sleep hands to the next, and what a sleep leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hybrid_sleep.sleep.backbone import Backbone
from hybrid_sleep.sleep.options import last_writer
from hybrid_sleep.sleep.report import Change
from hybrid_sleep.sleep.state import LayerState
from hybrid_sleep.sleep.trees import map_tensors

if TYPE_CHECKING:
    from hybrid_sleep.sleep.cache import Window


class Carry(NamedTuple):
    """The passes of R rows so far.

    h: `[R, L, D]`, hidden states that the last pass left, which the next one reads.
    source: `[R, L, D]`, what every pass reads where hidden states are not carried; else None.
    S: fast weights of the looped layers.
    start: per layer, all else that a pass, or the coda, starts from: the same in every pass.
    context: positions and masks, see `Backbone.context`.
    active: bool `[R]`, rows that the next pass still updates; None for all.
    left: per layer, what passes and coda leave beside `S`.
    change: `[R, layers of S, 2]`, squared norms of the last pass; None if none was measured.
    """

    h: torch.Tensor
    source: torch.Tensor | None
    S: dict[int, torch.Tensor]
    start: dict[int, LayerState]
    context: Any
    active: torch.Tensor | None
    left: dict[int, LayerState]
    change: torch.Tensor | None

    @property
    def entering(self) -> torch.Tensor:
        """`[R, L, D]`, hidden states that go into the next pass."""
        return self.h if self.source is None else self.source

    def update(self, **new: Any) -> Carry:
        """With `new` fields in active rows, and the old ones in all others."""

        def pick(x: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
            if old is None:
                return x
            assert self.active is not None
            return torch.where(self.active.view(-1, *[1] * (x.ndim - 1)), x, old)

        if self.active is not None:
            new = {name: map_tensors(pick, x, getattr(self, name)) for name, x in new.items()}
        return self._replace(**new)


class Outcome(NamedTuple):
    """What passes 2..N leave. after: per layer, the state that crosses the boundary; empty where
    none ran. depths: `[R]`, passes of each row. changes: of each pass. path: how they were run."""

    after: dict[int, LayerState]
    depths: torch.Tensor
    changes: list[Change]
    path: str


def writer_of(backbone: Backbone, window: Window) -> int | None:
    """The last block that a sleep of this window must run, see `last_writer`."""
    attention_layers = [i for i, state in window.states.items() if state.slots]
    return last_writer(backbone.options, backbone.fast_weight_layers, attention_layers)


def after_passes(
    S: dict[int, torch.Tensor], left: dict[int, LayerState]
) -> dict[int, LayerState]:
    """Per layer, the state that crosses the boundary: fast weights, and what else is left."""
    return left | {i: left.get(i, LayerState())._replace(S=x) for i, x in S.items()}


def after_pass_one(backbone: Backbone, window: Window, *, watch: bool, cut: bool) -> Carry:
    """Where pass 2 starts: hidden states and fast weights of pass 1, short-term states as they were
    when the window opened, and for the coda its fast weights of that time as well.

    watch: rows may stop one by one. cut: no gradients into pass 1.
    """
    first, end = backbone.options.loop
    S = {
        i: state.S
        for i, state in window.states.items()
        if first <= i < end and state.S is not None
    }
    h, S = map_tensors(torch.Tensor.detach, (window.hidden, S)) if cut else (window.hidden, S)
    context = backbone.context(
        window.kept,
        window.lengths,
        int(window.kept.max()),
        window.first_position,
        window.hidden,
        sleeping=True,
    )
    active = torch.ones(len(h), dtype=torch.bool, device=h.device) if watch else None
    start = {i: state for i, state in window.opening.items() if i >= first}
    source = h if backbone.options.carry == "fast_weights" else None
    return Carry(h, source, S, start, context, active, left={}, change=None)
