"""SleepCache: the short-term memory of an open window and the fast weights that outlive it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

import torch
from transformers import Cache

from hybrid_sleep.sleep.history import History
from hybrid_sleep.sleep.masks import append_index
from hybrid_sleep.sleep.options import SleepOptions
from hybrid_sleep.sleep.state import LayerState, put_rows, take_rows, take_slots
from hybrid_sleep.sleep.trees import map_tensors, tensors_of
from hybrid_sleep.sleep.weights import FormerOwner, Owner

if TYPE_CHECKING:
    from hybrid_sleep.sleep.decoding import Decoder
    from hybrid_sleep.sleep.report import SleepReport

ROW_COUNTERS = ("counts", "kept", "positions", "sleeps")


@dataclass
class Window:
    """The open windows of R rows, which a sleep starts from.

    rows: `[R]`, ascending indices of these rows in the cache, on the CPU as all counters are.
    hidden: `[R, L, D]`, outputs of the last looped block in pass 1, or what went into the first
        one where hidden states are not carried.
    lengths, kept, first_position: `[R]`; tokens in the window, older slots that stay visible,
        position of the window's first token.
    states: per layer, what pass 1 left.
    opening: per layer, what a later pass starts from: tails and slots as they were when the window
        opened, and the fast weights of that time, of the coda or wherever none are carried.
    """

    rows: torch.Tensor
    hidden: torch.Tensor
    lengths: torch.Tensor
    kept: torch.Tensor
    first_position: torch.Tensor
    states: dict[int, LayerState]
    opening: dict[int, LayerState]


Held = TypeVar("Held")


class Settled(Generic[Held]):
    """A field of a cache that is in a decoder's buffers at times, and out of them when read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, cache: SleepCache, owner: type) -> Held:
        cache.settle()
        return vars(cache)[self._name]

    def __set__(self, cache: SleepCache, value: Held) -> None:
        vars(cache)[self._name] = value


class SleepCache(Cache):
    """All that a model carries from token to token for a batch of rows; constant in size.

    Per row: keys and values of the open window (and, under sliding eviction, of the L - 1 tokens
    before it), the window's pass-1 hidden states, short-convolution tails, fast weights, and counts
    of its tokens, of those in the window, and of its sleeps. `history` is a hash of all tokens so
    far, by which generate() recognises a text. Tensors are replaced, never written in place, so
    gradients flow through them and a copy is cheap.

    states: `LayerState` by layer; a layer that has processed nothing is missing. opening: by layer,
    what a sleep of the open window must start it from. reports: a `SleepReport` for each sleep
    outside of training. finished: set by generate(), rows that take no more tokens in this call.

    SleepCache(options): `SleepOptions`, or a config that has them as `sleep_options`. ValueError
    for anything else.
    """

    states = Settled[dict[int, LayerState]]()
    hidden = Settled["torch.Tensor | None"]()
    history = Settled[History]()

    def __init__(self, options: Any):
        given = getattr(options, "sleep_options", options)
        if not isinstance(given, SleepOptions):
            raise ValueError(
                "options must be SleepOptions or the config of a model that sleeps, such as a "
                f"HybridSleepConfig, got {type(options).__name__}; use model.config"
            )
        super().__init__(layers=[])
        self.options = given
        self.reports: list[SleepReport] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything; the cache is as new and takes any batch size."""
        self.decoder: Decoder | None = None
        self.single = self.compile = False
        self.decoding = "nothing decoded yet"
        self.states = {}
        self.opening: dict[int, LayerState] = {}
        self.hidden = None
        self._open_rows(0)
        self.columns = 0
        self.finished: torch.Tensor | None = None
        self.reports.clear()
        self.owner: Owner | FormerOwner | None = None

    def _open_rows(self, batch: int) -> None:
        self.counts, self.kept, self.positions, self.sleeps = (
            torch.zeros(batch, dtype=torch.long) for _ in ROW_COUNTERS
        )
        self.supervised = torch.zeros(batch, dtype=torch.bool)
        self.history = History.empty(batch)

    def extend_history(self, h: torch.Tensor, new: torch.Tensor) -> None:
        """Add the last `new: [B]` tokens of each row, embeddings `h: [B, n, D]`, to the history."""
        # Not by `self.history`, which would take the cache out of its decoder.
        held = vars(self)["_history"]
        self.history = held.extend(h, self.positions - new, new)

    def settle(self) -> None:
        """Take back what a decoder holds in its buffers; whoever looks at the cache does."""
        decoder, self.decoder, self.single = self.decoder, None, False
        if decoder is not None:
            decoder.give_back(self)

    @property
    def batch_size(self) -> int:
        """Rows held, or -1 before the first token (transformers' convention)."""
        return len(self.counts) or -1

    def open(self, batch: int) -> None:
        """Make room for `batch` rows; a cache that holds another number of rows is refused."""
        if not len(self.counts):
            self._open_rows(batch)
        elif len(self.counts) != batch:
            raise ValueError(
                f"cache holds {len(self.counts)} rows, but the input has {batch}; pass "
                "as many rows, or use batch_select_indices() / batch_repeat_interleave() first"
            )

    @property
    def first_position(self) -> torch.Tensor:
        """`[B]`: position of each window's first token (0 under hard eviction)."""
        # RoPE positions restart where nothing older is attended to, so they stay within the window
        # that training has seen; older keys that stay were rotated by theirs, which must run on.
        return self.positions - self.counts if self.options.is_sliding else self.positions * 0

    @property
    def slots(self) -> int:
        """Slots of keys and values that each attention layer holds per row at present."""
        return max((x.shape[2] for state in self.states.values() for x in state.slots), default=0)

    def append(
        self, states: dict[int, LayerState], hidden: torch.Tensor, new: torch.Tensor
    ) -> None:
        """Take in `new: [B]` tokens a row: the states after them and their pass-1 hidden states."""
        self.states = self.states | states
        width = 0
        if self.hidden is not None:
            width = self.hidden.shape[1]
            hidden = torch.cat((self.hidden, hidden), dim=1)
        # Kept until the boundary, so that no sleep has to compute pass 1 again.
        index = append_index(self.counts, new, width)
        if index is not None:
            index = index.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[2])
            hidden = hidden.gather(1, index)
        self.hidden = hidden
        self.counts = self.counts + new
        self.positions = self.positions + new

    def window(self, rows: torch.Tensor) -> Window:
        """The open windows of `rows` (ascending indices on the CPU)."""
        lengths, kept = self.counts[rows], self.kept[rows]

        def take(x: torch.Tensor) -> torch.Tensor:
            return take_rows(rows, x, len(self.counts))

        states: dict[int, LayerState] = map_tensors(take, self.states)
        opening: dict[int, LayerState] = map_tensors(take, self.opening)
        # Slots are never overwritten, so the window's opening is a prefix of them.
        older = int(kept.max())
        for i, state in states.items():
            if older and state.slots:
                slots = tuple(x[:, :, :older] for x in state.slots)
                opening[i] = opening.get(i, LayerState())._replace(slots=slots)
        assert self.hidden is not None
        hidden = take(self.hidden)[:, : int(lengths.max())]
        first = self.first_position[rows]
        return Window(rows, hidden, lengths, kept, first, states, opening)

    def cross_boundary(self, window: Window, after: dict[int, LayerState]) -> int:
        """Close the windows of some rows: what `after` says survives, the rest is dropped.

        after: per layer, what the last pass left of these rows; a missing layer keeps what it has.
        Returns the bytes of slots, hidden states and tails that are dropped.
        """
        rows, held = window.rows, window.kept + window.lengths
        keep = self.options.kept(held)
        freed = self._bytes_dropped(window, int((held - keep).sum()))
        for i, old in self.states.items():
            self.states[i] = self._cross(rows, old, after.get(i))
            self._reopen(i, rows)
        self.kept = self.kept.index_copy(0, rows, keep)
        self.counts = self.counts.index_fill(0, rows, 0)
        self.sleeps = self.sleeps.index_add(0, rows, torch.ones_like(rows))
        self.supervised = self.supervised.index_fill(0, rows, False)
        self._drop_slots(rows, held - keep)
        return freed

    def _cross(
        self, rows: torch.Tensor, old: LayerState, new: LayerState | None
    ) -> LayerState:
        """A layer's state behind the boundary of `rows`."""
        total = len(self.counts)
        if self.options.is_sliding:
            return old if new is None else old.put(rows, new, total)
        S = old.S if new is None else put_rows(rows, old.S, new.S, total)
        # Slots stay for now: they are one tensor, which rows whose window stays open may need.
        return LayerState(S, tuple(put_rows(rows, x, None, total) for x in old.tails), old.slots)

    def _reopen(self, layer: int, rows: torch.Tensor) -> None:
        """Snapshot what a sleep of the new window must start this layer from."""
        start, end = self.options.loop
        state = self.states[layer]
        # Looped layers go on from the S of pass 1, the coda from that of the window's start.
        again = layer >= end or self.options.carry == "hidden_states"
        if layer < start or state.S is None or not (again or self.options.is_sliding):
            return
        now = LayerState(
            state.S if again else None, state.tails if self.options.is_sliding else ()
        )
        total = len(self.counts)
        now = map_tensors(lambda x: take_rows(rows, x, total), now)
        self.opening[layer] = self.opening.get(layer, LayerState()).put(rows, now, total)

    def _bytes_dropped(self, window: Window, slots: int) -> int:
        """Bytes of `slots` slots in all, and of the hidden states and tails of these rows."""
        dropped = int(window.lengths.sum()) * window.hidden[0, 0].nbytes
        for state in window.states.values():
            dropped += sum(slots * x[0, :, 0].nbytes for x in state.slots)
            if not self.options.is_sliding:
                dropped += sum(x.nbytes for x in state.tails if x is not None)
        return dropped

    def _drop_slots(self, rows: torch.Tensor, dropped: torch.Tensor) -> None:
        """Shift each of `rows` left by the slots it drops and free what no row uses."""
        if not int(self.counts.max()):
            self.hidden = None
        width = int((self.kept + self.counts).max())
        shift = torch.zeros_like(self.counts).index_copy(0, rows, dropped)
        for i, state in self.states.items():
            if not state.slots:
                continue
            if not width:
                self.states[i] = state._replace(slots=())
            elif self.options.is_sliding:
                index = torch.arange(width) + shift[:, None]
                index = index.clamp_(max=state.slots[0].shape[2] - 1).to(state.slots[0].device)
                slots = tuple(take_slots(x, index) for x in state.slots)
                self.states[i] = state._replace(slots=slots)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[SleepCache]:
        """On an exception inside, the cache is as it was before."""
        before = self.copy()
        try:
            yield self
        except BaseException:
            self.assign(before)
            raise

    def assign(self, other: SleepCache) -> None:
        """Hold what `other` holds from now on; tensors are shared until one is replaced."""
        vars(self).update(vars(other.copy()))

    @classmethod
    def join(cls, caches: Sequence[SleepCache]) -> SleepCache:
        """One cache with the rows of all `caches`, in order; `split` takes it apart again.

        Each row goes on as it would have alone. Reports stay with the caches that they are of.

        Raises ValueError for an empty sequence, and for caches of other options, models or weights.
        """
        from hybrid_sleep.sleep.batches import join

        return join(caches)

    def split(self, sizes: Sequence[int] | None = None) -> list[SleepCache]:
        """Caches of `sizes` rows each, in order (None: one row each), as small as their rows allow.

        Reports stay with this cache. Raises ValueError for sizes that are not its rows in all.
        """
        from hybrid_sleep.sleep.batches import split

        return split(self, sizes)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor whose first dim is the rows."""
        self.states = map_tensors(change, self.states)
        self.opening = map_tensors(change, self.opening)
        self.hidden = None if self.hidden is None else change(self.hidden)
        whole, opening, _ = self.history.folded()
        self.history = History(change(whole), change(opening))
        for name in (*ROW_COUNTERS, "supervised"):
            setattr(self, name, change(getattr(self, name)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (any order, repeats allowed)."""
        self._each(lambda x: x.index_select(0, indices.to(x.device)))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Follow a beam search: row b becomes a copy of row `beam_idx[b]`."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, keeping copies together."""
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def renew(self, rows: torch.Tensor) -> None:
        """Forget all that `rows` hold, so that each takes another text; the others go on.

        rows: indices, in ascending order, of rows whose request is done, for a server that decodes
        several texts together. Nothing of them is left in memory: what they held is zeros.

        Raises ValueError for indices that are no rows, or not in ascending order.
        """
        total, wanted = len(self.counts), rows.tolist()
        if wanted != sorted({*wanted}) or not {*wanted} <= {*range(total)}:
            raise ValueError(f"rows must be ascending indices below {total}, got {wanted}")
        rows = rows.cpu()

        def forget(x: torch.Tensor) -> torch.Tensor:
            return x.index_fill(0, rows.to(x.device), 0)

        self._each(forget)
        if self.finished is not None:
            self.finished = forget(self.finished)

    def copy(self) -> SleepCache:
        """A second cache that goes its own way; the tensors are shared until one is replaced."""
        self.settle()
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        twin.states, twin.opening = dict(self.states), dict(self.opening)
        twin.reports = list(self.reports)
        return twin

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> SleepCache:
        # torch refuses to copy what has a graph behind it; a clone stays in the graph.
        twin = self.copy()
        twin._each(torch.clone)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return vars(self.copy().detach())

    def detach(self, rows: torch.Tensor | None = None) -> SleepCache:
        """Cut the graph here, for truncated backpropagation; returns the cache itself.

        rows: indices of the rows to cut, on the CPU; None for all.
        """

        def cut(x: torch.Tensor) -> torch.Tensor:
            if rows is None or len(rows) == len(self.counts):
                return x.detach()
            index = rows.to(x.device)
            return x.index_copy(0, index, x.detach().index_select(0, index))

        self._each(cut)
        return self

    def to(self, device: torch.device | str | None) -> SleepCache:
        """Move the tensors to `device` (None: nowhere); counters stay on the CPU. Returns it."""
        if device is None or self._lies_on(torch.device(device)):
            return self
        counters = {name: getattr(self, name) for name in (*ROW_COUNTERS, "supervised")}
        self._each(lambda x: x.to(device))
        vars(self).update(counters)
        return self

    def _lies_on(self, device: torch.device) -> bool:
        """Whether all tensors do; accelerate asks at every call, which is no look at them."""
        if self.decoder is not None:
            return self.decoder.device == device
        single = self.single
        there = all(x.device == device for x in self.tensors())
        self.single = single
        return there

    def tensors(self) -> list[torch.Tensor]:
        """All tensors held on the device: fast weights and open window together."""
        return tensors_of((self.states, self.opening, self.hidden))

    def nbytes(self) -> int:
        """Bytes of all tensors held, fast weights and open window together."""
        return sum(x.nbytes for x in self.tensors())

    @property
    def fast_weights(self) -> dict[int, torch.Tensor]:
        """`{layer: S}`, `S: [B, H, K, V]`, of the layers that have fast weights."""
        return {i: state.S for i, state in sorted(self.states.items()) if state.S is not None}

    def check_finite(self, name: str = "cache", only: Set[int] | None = None) -> None:
        """Raise ValueError naming the first layer whose fast weights hold a NaN or infinity.

        only: layers to look at; None for all.
        """
        for layer, S in self.fast_weights.items():
            if only is not None and layer not in only:
                continue
            # A sum is one pass over S, and finite almost always; only then is that all it takes.
            if not bool(torch.isfinite(S.sum())) and not bool(torch.isfinite(S).all()):
                raise ValueError(
                    f"{name}: the fast weights of layer {layer} hold a NaN or an infinity; they "
                    "must be finite. Start a new cache, or load one that was saved before"
                )

    def check(self, owner: Owner, options: SleepOptions, name: str = "cache") -> None:
        """Refuse to serve other options, another model or other weights; ValueError says which."""
        if options is not self.options:
            check_same_fields(self.options.memory_fields(), options.memory_fields(), name)
        if self.owner is not None:
            self.owner.check_same(owner, name)
        self.owner = owner

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write `sleep_cache.safetensors` into `directory`, atomically; see `storage`."""
        from hybrid_sleep.sleep.storage import save_cache

        save_cache(self, directory)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, *, model: Any) -> SleepCache:
        """Read a cache back for `model`; one of other weights or another config is refused."""
        from hybrid_sleep.sleep.storage import load_cache

        return load_cache(cls, directory, model)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Input columns so far, pads included; what is held does not grow with it."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no longest sequence."""
        return -1

    is_compileable = is_croppable = False

    def __len__(self) -> int:
        return len(self.states)

    def __bool__(self) -> bool:
        # A cache of no layers yet is a cache all the same.
        return True

    def __repr__(self) -> str:
        return (
            f"SleepCache(rows={len(self.counts)}, window={self.options.window}, "
            f"in_window={self.counts.tolist()}, tokens={self.positions.tolist()}, "
            f"sleeps={self.sleeps.tolist()}, bytes={self.nbytes()})"
        )

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refused: fast weights have no inverse."""
        raise ValueError(
            "SleepCache cannot crop: fast weights cannot forget single tokens; keep a copy() of "
            "the cache from before them instead"
        )

    @property
    def is_initialized(self) -> bool:
        """Whether any token was processed."""
        return bool(len(self.counts))


def check_same_fields(held: dict[str, Any], wanted: dict[str, Any], name: str) -> None:
    """Raise ValueError naming the fields in which a cache and a model differ."""
    differing = [key for key in wanted if held.get(key) != wanted[key]]
    if differing:
        details = ", ".join(f"{k}={held.get(k)!r} (model: {wanted[k]!r})" for k in differing)
        raise ValueError(f"{name} was made under another config: {details}; use the same config")
