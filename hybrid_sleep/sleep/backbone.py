"""Backbone: the few things that a model must offer to sleep."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import nn

from hybrid_sleep.sleep.checkpointing import Checkpointing, Truncation
from hybrid_sleep.sleep.options import SleepOptions
from hybrid_sleep.sleep.state import LayerState

if TYPE_CHECKING:
    from hybrid_sleep.sleep.compiling import StepCompiler
    from hybrid_sleep.sleep.execution import SleepEngine


class Backbone(Protocol):
    """A stack of blocks that take and return explicit states. Whatever has these can sleep.

    options: what its windows and sleeps are.
    blocks: one a layer, in their order; behind them, where `options.distinct_passes` is above 1,
        one for each layer of the loop in pass 2, in pass 3 and so on. Only looked at (their number,
        weights, hooks and dropout).
    fast_weight_layers: indices of the layers whose state has an `S`.
    training: as of `nn.Module`.
    checkpointing, truncation: how the backward recomputes and where it ends; both empty to do all.
    engine: replays passes from CUDA graphs; None never does.
    """

    checkpointing: Checkpointing
    truncation: Truncation
    engine: SleepEngine | None
    training: bool

    @property
    def options(self) -> SleepOptions: ...

    @property
    def blocks(self) -> Sequence[nn.Module]: ...

    @property
    def fast_weight_layers(self) -> Collection[int]: ...

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[B, T, D]` of ids `[B, T]`, in the dtype that the blocks compute in."""

    def context(
        self,
        past: torch.Tensor,
        new: torch.Tensor,
        width: int,
        first_position: torch.Tensor,
        like: torch.Tensor,
        *,
        sleeping: bool,
    ) -> Any:
        """A tree of tensors that tells blocks where `new: [B]` tokens a row stand.

        past: `[B]`, slots that each row has filled, of `width` that the attention layers hold.
        first_position: `[B]`, position of the first new token. All three lie on the CPU.
        like: a tensor of the device and dtype to compute in. sleeping: in passes 2..N.
        """

    def run_blocks(
        self,
        layers: range,
        h: torch.Tensor,
        states: Mapping[int, LayerState],
        context: Any,
        *,
        last_writer: int | None = None,
    ) -> tuple[torch.Tensor | None, dict[int, LayerState]]:
        """Apply `blocks[i] for i in layers` to `h: [B, T, D]`, each from the state of its layer
        (missing: nothing). States and `last_writer` are by layer, whichever pass has the block.

        Returns the new hidden states and the layers' states after them, and leaves `states` as
        they are, but for slots that it writes in place where a `decoding_context` says so. Pads
        behind a row's last token change no state. Convolution tails are among the states where a
        later token may need them: in pass 1, and under sliding eviction.
        last_writer: stop at this block and only let it update its state; h comes back as None.
        """


@runtime_checkable
class DecodesInPlace(Backbone, Protocol):
    """A backbone whose tokens are decoded in place where they come one by one, see `decoding`.

    compiler: compiles decode steps; None never does.
    """

    compiler: StepCompiler | None

    def decoding_context(
        self,
        place: torch.Tensor,
        position: torch.Tensor,
        width: int,
        active: torch.Tensor | None,
        like: torch.Tensor,
    ) -> Any:
        """The context of one token a row whose slots have room: blocks write there, in place.

        place, position: `[B]`, the slot that the token goes to, and its position. width: slots that
        the attention layers hold. active: bool `[B, 1]`, rows that take a token; None for all.
        like: a tensor of the dtype to compute in. All tensors lie on its device.
        """
