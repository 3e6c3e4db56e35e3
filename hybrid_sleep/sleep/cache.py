"""SleepCache: the short-term memory of an open window and the fast weights that outlive it."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers import Cache

from hybrid_sleep.configuration import HybridSleepConfig
from hybrid_sleep.layers.attention import take_slots
from hybrid_sleep.sleep.history import History
from hybrid_sleep.sleep.state import AttentionMemory, FastWeights, Memory, packing
from hybrid_sleep.sleep.weights import FormerOwner, Owner, same_architecture

if TYPE_CHECKING:
    from hybrid_sleep.sleep.report import SleepReport

ROW_COUNTERS = ("counts", "kept", "positions", "sleeps")


@dataclass
class Window:
    """The open windows of some rows, as a sleep reads them.

    hidden: `[R, C, D]`, outputs of the last looped block in pass 1.
    lengths, kept, first_position: `[R]` on the CPU; tokens in the window, older slots that stay
        visible, position of the window's first token.
    memory: per layer, what pass 1 left.
    opening: per layer, what the window started from, where a later pass needs it.
    older: per attention layer, the slots from before the window.
    """

    hidden: torch.Tensor
    lengths: torch.Tensor
    kept: torch.Tensor
    first_position: torch.Tensor
    memory: dict[int, Memory]
    opening: dict[int, FastWeights]
    older: dict[int, AttentionMemory] = field(default_factory=dict)


class SleepCache(Cache):
    """Everything a sleeping model remembers of the rows it reads; constant in size.

    Per row: keys and values of the open window (and, under sliding eviction, of the L - 1 tokens
    before it), the window's pass-1 hidden states, short-convolution tails, fast weights, and how
    many tokens came, lie in the window, and how often the row slept. `history` has a hash of all
    that was read, by which generate() knows a text again. Tensors are replaced, never
    written in place, so gradients flow through them and a copy is cheap.

    `reports` lists a `SleepReport` for each sleep that happened outside of training. `finished` is
    set by generate(): rows that read no more tokens in this call.
    """

    def __init__(self, config: HybridSleepConfig):
        if not isinstance(config, HybridSleepConfig):
            raise ValueError(
                f"config must be a HybridSleepConfig, got {type(config).__name__}; use model.config"
            )
        super().__init__(layers=[])
        self.config = config
        self.reports: list[SleepReport] = []
        self.owner: Owner | FormerOwner | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything; the cache is as new and takes any batch size."""
        self.memory: list[Memory | None] = [None] * self.config.num_hidden_layers
        self.opening: dict[int, FastWeights] = {}
        self.hidden: torch.Tensor | None = None
        for name in ROW_COUNTERS:
            setattr(self, name, torch.zeros(0, dtype=torch.long))
        self.supervised = torch.zeros(0, dtype=torch.bool)
        self.history = History.empty(0)
        self.columns = 0
        self.finished: torch.Tensor | None = None
        self.reports.clear()
        self.owner = None

    @property
    def is_sliding_eviction(self) -> bool:
        """Whether keys, values and tails cross a boundary."""
        return self.config.eviction == "sliding"

    @property
    def batch_size(self) -> int:
        """Rows held, or -1 before the first token (transformers' convention)."""
        return len(self.counts) or -1

    def open(self, batch: int) -> None:
        """Make room for `batch` rows; a cache that holds another number of rows is refused."""
        if not len(self.counts):
            for name in ROW_COUNTERS:
                setattr(self, name, torch.zeros(batch, dtype=torch.long))
            self.supervised = torch.zeros(batch, dtype=torch.bool)
            self.history = History.empty(batch)
        elif len(self.counts) != batch:
            raise ValueError(
                f"cache holds {len(self.counts)} rows, but the input has {batch}; pass "
                "as many rows, or use batch_select_indices() / batch_repeat_interleave() first"
            )

    @property
    def first_position(self) -> torch.Tensor:
        """`[B]`: position of each window's first token (0 under hard eviction)."""
        if self.is_sliding_eviction:
            return self.positions - self.counts
        return torch.zeros_like(self.positions)

    @property
    def slots(self) -> int:
        """Slots of keys and values that each attention layer holds per row at present."""
        return next((m.k.shape[2] for m in self.memory if isinstance(m, AttentionMemory)), 0)

    def append(self, memory: dict[int, Memory], hidden: torch.Tensor, new: torch.Tensor) -> None:
        """Take in `new: [B]` tokens a row: the memory after them and their pass-1 hidden states."""
        for i, value in memory.items():
            self.memory[i] = value
        width = 0
        if self.hidden is not None:
            width = self.hidden.shape[1]
            hidden = torch.cat((self.hidden, hidden), dim=1)
        index = packing(self.counts, new, width)
        if index is not None:
            index = index.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[2])
            hidden = hidden.gather(1, index)
        self.hidden = hidden
        self.counts = self.counts + new
        self.positions = self.positions + new

    def window(self, rows: torch.Tensor) -> Window:
        """The open windows of `rows` (ascending indices on the CPU), for a sleep to read."""
        lengths, kept = self.counts[rows], self.kept[rows]

        def take(x: torch.Tensor | None) -> torch.Tensor | None:
            return self._take(rows, x)

        memory = {i: type(m)(*map(take, m)) for i, m in enumerate(self.memory) if m is not None}
        older = {}
        if self.is_sliding_eviction and int(kept.max()):
            older = {
                i: AttentionMemory(*(x[:, :, : int(kept.max())] for x in m))
                for i, m in memory.items()
                if isinstance(m, AttentionMemory)
            }
        return Window(
            hidden=take(self.hidden)[:, : int(lengths.max())],
            lengths=lengths,
            kept=kept,
            first_position=self.first_position[rows],
            memory=memory,
            opening={i: FastWeights(*map(take, m)) for i, m in self.opening.items()},
            older=older,
        )

    def cross(self, rows: torch.Tensor, memory: dict[int, Memory]) -> None:
        """Close the windows of `rows`: what `memory` says survives, the rest is dropped.

        memory: per layer, what the last pass left of these rows; a missing layer keeps what it has.
        """
        held = (self.kept + self.counts)[rows]
        keep = held.clamp(max=self.config.window - 1) if self.is_sliding_eviction else held * 0
        for i in range(self.config.num_hidden_layers):
            old, new = self.memory[i], memory.get(i)
            if isinstance(old, FastWeights):
                self.memory[i] = self._cross_fast_weights(rows, old, new)
                self._reopen(i, rows)
            elif isinstance(old, AttentionMemory) and new is not None:
                self.memory[i] = AttentionMemory(
                    *(self._put(rows, a, b) for a, b in zip(old, new, strict=True))
                )
        self.kept = self.kept.index_copy(0, rows, keep)
        self.counts = self.counts.index_fill(0, rows, 0)
        self.sleeps = self.sleeps.index_add(0, rows, torch.ones_like(rows))
        self.supervised = self.supervised.index_fill(0, rows, False)
        self._drop_slots(rows, held - keep)

    def _cross_fast_weights(
        self, rows: torch.Tensor, old: FastWeights, new: FastWeights | None
    ) -> FastWeights:
        S = old.S if new is None else self._put(rows, old.S, new.S)
        if not self.is_sliding_eviction:
            return FastWeights(S, *(self._put(rows, tail, None) for tail in old[1:]))
        if new is None:
            return FastWeights(S, *old[1:])
        tails = zip(old[1:], new[1:], strict=True)
        return FastWeights(S, *(self._put(rows, a, b) for a, b in tails))

    def _reopen(self, layer: int, rows: torch.Tensor) -> None:
        """Remember what a later sleep must start this layer from."""
        start, end = self.config.loop_range
        in_coda = layer >= end
        if layer < start or not (in_coda or self.is_sliding_eviction):
            return
        S, *tails = self.memory[layer]
        before = self.opening.get(layer, FastWeights(None))
        now = FastWeights(S if in_coda else None, *(tails if self.is_sliding_eviction else ()))
        self.opening[layer] = FastWeights(
            *(
                self._put(rows, a, self._take(rows, b))
                for a, b in zip(before, now, strict=True)
            )
        )

    def _take(self, rows: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor | None:
        """The given ascending rows of `x`."""
        if x is None or len(rows) == len(self.counts):
            return x
        return x.index_select(0, rows.to(x.device))

    def _put(
        self,
        rows: torch.Tensor,
        old: torch.Tensor | None,
        new: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """`old` with `rows` replaced by `new` (None: zeros), out of place.

        Keys and values that are shorter than the slots held are padded to them.
        """
        if len(rows) == len(self.counts):
            return new
        if old is None:
            if new is None:
                return None
            old = new.new_zeros(len(self.counts), *new.shape[1:])
        index = rows.to(old.device)
        if new is None:
            return old.index_fill(0, index, 0)
        if new.ndim == 4 and new.shape[2] < old.shape[2]:
            new = torch.nn.functional.pad(new, (0, 0, 0, old.shape[2] - new.shape[2]))
        return old.index_copy(0, index, new)

    def _drop_slots(self, rows: torch.Tensor, dropped: torch.Tensor) -> None:
        """Shift each of `rows` left by the slots it drops and free what no row uses."""
        if not int(self.counts.max()):
            self.hidden = None
        width = int((self.kept + self.counts).max())
        attention = [i for i, m in enumerate(self.memory) if isinstance(m, AttentionMemory)]
        if not width:
            for i in attention:
                self.memory[i] = None
            return
        if not self.is_sliding_eviction:
            return
        shift = torch.zeros_like(self.counts).index_copy(0, rows, dropped)
        for i in attention:
            old = self.memory[i]
            index = (torch.arange(width) + shift[:, None]).clamp_(max=old.k.shape[2] - 1)
            index = index.to(old.k.device)
            self.memory[i] = AttentionMemory(*(take_slots(x, index) for x in old))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor whose first dim is the rows."""

        def apply(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else change(x)

        self.memory = [None if m is None else type(m)(*map(apply, m)) for m in self.memory]
        self.opening = {i: FastWeights(*map(apply, m)) for i, m in self.opening.items()}
        self.hidden = apply(self.hidden)
        self.history = History(*map(change, self.history.folded()[:2]))
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

    def copy(self) -> SleepCache:
        """A second cache that goes its own way; the tensors are shared until one is replaced."""
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        twin.memory, twin.opening = list(self.memory), dict(self.opening)
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

    def to(self, device: torch.device | str) -> SleepCache:
        """Move the tensors to `device`; counters stay on the CPU. Returns the cache itself."""
        counters = {name: getattr(self, name) for name in (*ROW_COUNTERS, "supervised")}
        self._each(lambda x: x.to(device))
        vars(self).update(counters)
        return self

    def nbytes(self) -> int:
        """Bytes of all tensors held, fast weights and open window together."""
        tensors = [x for m in (*self.memory, *self.opening.values()) if m is not None for x in m]
        return sum(x.nbytes for x in (*tensors, self.hidden) if x is not None)

    @property
    def fast_weights(self) -> dict[int, torch.Tensor]:
        """`{layer: S}`, `S: [B, H, K, V]`, of the state-space layers that have read anything."""
        return {
            i: m.S
            for i, m in enumerate(self.memory)
            if isinstance(m, FastWeights) and m.S is not None
        }

    def check_finite(self, name: str = "cache", only: Set[int] | None = None) -> None:
        """Raise ValueError naming the first layer whose fast weights hold a NaN or infinity.

        only: layers to look at; None for all.
        """
        for layer, S in self.fast_weights.items():
            if only is not None and layer not in only:
                continue
            if not bool(torch.isfinite(S.sum())) and not bool(torch.isfinite(S).all()):
                raise ValueError(
                    f"{name}: the fast weights of layer {layer} hold a NaN or an infinity; they "
                    "must be finite. Start a new cache, or load one that was saved before"
                )

    def check(self, owner: Owner, name: str = "cache") -> None:
        """Refuse to serve another architecture, model or weights version; ValueError says which."""
        same_architecture(self.config, owner.config, name)
        if self.owner is not None:
            self.owner.check_same(owner, name)
        self.owner = owner

    def save_pretrained(self, directory: str) -> None:
        """Write `sleep_cache.safetensors` into `directory`, atomically; see `storage`."""
        from hybrid_sleep.sleep.storage import save_cache

        save_cache(self, directory)

    @classmethod
    def from_pretrained(cls, directory: str, *, model: Any) -> SleepCache:
        """Read a cache back for `model`; one of other weights or another config is refused."""
        from hybrid_sleep.sleep.storage import load_cache

        return load_cache(cls, directory, model)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Input columns read so far, pads included; what is held does not grow with it."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no longest sequence."""
        return -1

    is_compileable = is_croppable = False

    def __len__(self) -> int:
        return self.config.num_hidden_layers

    def __repr__(self) -> str:
        return (
            f"SleepCache(rows={len(self.counts)}, window={self.config.window}, "
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
        """Whether any token was read."""
        return bool(len(self.counts))
