"""Decoding: one token a row, over buffers with room for a whole window.

A cache replaces its tensors and never writes in them, so that gradients flow and copies are cheap.
For one token that is dear: appending it copies every key, value and hidden state of the window. A
sleeping model's memory has one size for ever, so all of it fits into buffers that are made once a
window and written in place, and the step over them is the same program for every token:

    cache  ->  Decoder        the second token in a row that comes alone
    token  ->  decode_step    slots and hidden states where it stands, all else to a second set
    Decoder  ->  cache        a full window, or whoever looks at what the cache holds

Whatever is no such token goes the ordinary way, `forward.py`: prompts, gradients, sleeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from hybrid_sleep.sleep.backbone import Backbone, DecodesInPlace
from hybrid_sleep.sleep.compiling import StepCompiler, varies
from hybrid_sleep.sleep.history import MOST_LATER
from hybrid_sleep.sleep.pass_one import pass_one
from hybrid_sleep.sleep.state import LayerState, pad_slots
from hybrid_sleep.sleep.trees import map_tensors

if TYPE_CHECKING:
    from hybrid_sleep.sleep.cache import SleepCache

FEWEST_SLOTS = 64
Finish = Callable[[torch.Tensor], torch.Tensor]


class Step(NamedTuple):
    """What a decode step reads and leaves, of B rows whose windows have room for L tokens.

    tokens: ids `[B, 1]` or embeddings `[B, 1, D]`.
    active: bool `[B]`, rows that take a token; of the others nothing changes. None for all.
    counts: `[B]`, tokens in each row's window. kept: `[B]`, older slots that stay visible.
    first: `[B]`, position of the window's first token. since: `[B]`, tokens that the history has.
    states: by layer, before this token; slots have room for it, and stale ones are finite.
    after: by layer, fast weights and tails of the same shapes, which those after it go into.
    hidden: `[B, L + 1, D]`, what passes start from.
    embedded: `[B, MOST_LATER + 1, D]`, tokens that the history, a hash of them, does not have yet.
    """

    tokens: torch.Tensor
    active: torch.Tensor | None
    counts: torch.Tensor
    kept: torch.Tensor
    first: torch.Tensor
    since: torch.Tensor
    states: dict[int, LayerState]
    after: dict[int, LayerState]
    hidden: torch.Tensor
    embedded: torch.Tensor


def decode_step(backbone: DecodesInPlace, step: Step, finish: Finish | None) -> torch.Tensor:
    """`[B, 1, D]`, what the last layer gives of one token a row; zeros where a row takes none.

    finish: what is made of that instead, such as logits. Writes in place: slots, `hidden` and
    `embedded` where the token stands, and all of `after`.
    """
    h = backbone.embed(step.tokens) if step.tokens.ndim == 2 else step.tokens
    widths = [x.shape[2] for state in step.states.values() for x in state.slots] or [0]
    active = None if step.active is None else step.active[:, None]
    context = backbone.decoding_context(
        step.kept + step.counts, step.first + step.counts, widths[0], active, h
    )
    (out,), hidden, after = pass_one(backbone, h, step.states, context)
    for i, state in after.items():
        for x, buffer in zip(state.carried, step.after[i].carried, strict=True):
            buffer.copy_(x)
    step.hidden.scatter_(1, step.counts[:, None, None].expand_as(h), hidden)
    step.embedded.scatter_(1, (step.counts - step.since)[:, None, None].expand_as(h), h)
    if active is not None:
        out = out.where(active[..., None], 0)
    return out if finish is None else finish(out)


class Decoder:
    """The open windows of a cache in buffers, as long as they take one token a row at a time.

    path: how steps are run, and why.
    """

    # Steps may follow in inference mode and outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, cache: SleepCache, compiler: StepCompiler | None):
        options, hidden = cache.options, cache.hidden
        assert hidden is not None
        (rows, tokens, width), device = hidden.shape, hidden.device
        self._compiler, self.path = compiler, "in place"
        self._before, self._filled = cache.counts, int((cache.kept + cache.counts).max())
        self._window, self._room = options.window, 0
        # With one place more than a window has: a row without a token whose window is full writes
        # there. All of a buffer is laid out as no part of it is, which would compile a step anew,
        # so there is one slot that no step looks at.
        self._most = 1 + options.window + (options.window - 1 if options.is_sliding else 0)
        self._slots = {
            i: tuple(pad_slots(x, self._most + 1) for x in state.slots)
            for i, state in cache.states.items()
        }
        carried = {i: state._replace(slots=()) for i, state in cache.states.items()}
        # What was never written is attended by nobody, and must be finite all the same.
        room = hidden.new_zeros(rows, options.window + 1, width)
        self._step = Step(
            tokens=torch.zeros(rows, 1, dtype=torch.long, device=device),
            active=None,
            counts=cache.counts.to(device),
            kept=cache.kept.to(device),
            first=cache.first_position.to(device),
            since=cache.counts.to(device, copy=True),
            states=map_tensors(torch.clone, carried),
            after=map_tensors(torch.empty_like, carried),
            hidden=torch.cat((hidden, room[:, tokens:]), dim=1),
            embedded=hidden.new_zeros(rows, MOST_LATER + 1, width),
        )
        self._width = self._new = 0

    def __call__(
        self,
        backbone: DecodesInPlace,
        tokens: torch.Tensor,
        active: torch.Tensor | None,
        finish: Finish | None,
    ) -> torch.Tensor:
        """Take in `tokens: [B, 1, ...]`, see `Step`; active: bool `[B]`, None for all.

        Returns what `decode_step` does. On an exception, Ctrl-C included, all is as it was.
        """
        # A window that has just begun does not cost what a full one does.
        width = min(self._most, max(FEWEST_SLOTS, 1 << self._filled.bit_length()))
        if width != self._width:
            self._look_at(width)
        if active is not None:
            active = active.to(tokens.device)
        step = self._step._replace(tokens=tokens, active=active)
        if self._compiler is None:
            h = decode_step(backbone, step, finish)
        else:
            h = self._compiler(decode_step, backbone, step, finish)
            self.path = f"in place, {self._compiler.path}"
        # Two of each, so that a step which was broken off leaves what it started from.
        self._step = step._replace(
            counts=step.counts + (1 if active is None else active),
            states=step.after,
            after=step.states,
        )
        self._filled += 1
        self._new += 1
        self._room -= 1
        return h

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self._step.hidden.device

    def has_room(self, counts: torch.Tensor, active: torch.Tensor | None) -> bool:
        """Whether the windows, which hold `counts: [B]` tokens, take one more of `active` rows."""
        if active is not None:
            return not bool((counts[active] == self._window).any())
        if self._room < 1:
            # Of rows that took no token there is more than was counted.
            self._room = self._window - int(counts.max())
        return self._room > 0

    def _look_at(self, width: int) -> None:
        """Let steps attend over the first `width` slots from now on."""
        views = {i: tuple(x[:, :, :width] for x in slots) for i, slots in self._slots.items()}
        if self._compiler is not None and self._most > FEWEST_SLOTS:
            map_tensors(lambda x: varies(x, 2), views)

        def through(states: dict[int, LayerState]) -> dict[int, LayerState]:
            return {i: state._replace(slots=views[i]) for i, state in states.items()}

        step, self._width = self._step, width
        self._step = step._replace(states=through(step.states), after=through(step.after))

    def give_back(self, cache: SleepCache) -> None:
        """Hand the cache what the buffers hold, as large as it is without them."""
        self._look_at(int((cache.kept + cache.counts).max()))
        self.remember(cache, all_of_them=True)
        cache.states = {
            i: state._replace(slots=tuple(x.clone() for x in state.slots))
            for i, state in self._step.states.items()
        }
        cache.hidden = self._step.hidden[:, : int(cache.counts.max())].clone()

    def remember(self, cache: SleepCache, *, all_of_them: bool) -> None:
        """Put the tokens that are new into the cache's history, or only if it is time to."""
        if not all_of_them and self._new < MOST_LATER:
            return
        new = cache.counts - self._before
        longest = int(new.max())
        if longest and cache.owner is not None:
            cache.extend_history(self._step.embedded[:, :longest].clone(), new)
        self._before, self._new = cache.counts, 0
        self._step = self._step._replace(since=self._step.counts.clone())


def decode(
    backbone: Backbone,
    cache: SleepCache,
    tokens: torch.Tensor,
    real: torch.Tensor | None,
    *,
    plain: bool = True,
    finish: Finish | None = None,
) -> torch.Tensor | None:
    """`[B, 1, D]` of one more token a row; None where it has to go the ordinary way.

    tokens, real: as in `forward.forward`. plain: nothing is asked for but the last layer's hidden
    states. finish: see `decode_step`. `cache.decoding` says which way was taken, and why.
    """
    active = None if real is None else real[:, 0]
    reason = _refusal(cache, tokens, plain)
    if reason is None and cache.decoder is None:
        if not isinstance(backbone, DecodesInPlace):
            reason = "this backbone has no `decoding_context`"
        elif cache.single and cache.hidden is not None:
            cache.decoder = Decoder(cache, backbone.compiler if cache.compile else None)
        else:
            reason = "the first token that comes alone"
    decoder = cache.decoder
    if reason is None and decoder is not None and not decoder.has_room(cache.counts, active):
        reason = "a window is full"
    if reason is not None or decoder is None:
        cache.decoding = f"appended: {reason}"
        return None
    out = decoder(cast(DecodesInPlace, backbone), tokens, active, finish)
    new = torch.ones_like(cache.counts) if active is None else active.long()
    cache.counts, cache.positions = cache.counts + new, cache.positions + new
    cache.columns += 1
    decoder.remember(cache, all_of_them=False)
    cache.decoding = decoder.path
    return out


def _refusal(cache: SleepCache, tokens: torch.Tensor, plain: bool) -> str | None:
    """Why these tokens cannot go into buffers, or None."""
    if tokens.shape[1] > 1:
        return "several tokens"
    if torch.is_grad_enabled():
        return "gradients are on"
    if not plain:
        return "hidden states of every layer, or supervised tokens"
    if torch.is_autocast_enabled(tokens.device.type):
        return "autocast is on"
    return None
