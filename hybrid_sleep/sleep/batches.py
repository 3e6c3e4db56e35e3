"""Several caches as one batch of rows, and one cache as several."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybrid_sleep.sleep.cache import ROW_COUNTERS, SleepCache
from hybrid_sleep.sleep.history import History
from hybrid_sleep.sleep.state import LayerState, join_rows, join_states


def join(caches: Sequence[SleepCache]) -> SleepCache:
    """See `SleepCache.join`."""
    if not caches:
        raise ValueError("caches must be a sequence of at least one SleepCache, got none")
    first = caches[0]
    for i, cache in enumerate(caches):
        if cache.options.memory_fields() != first.options.memory_fields():
            raise ValueError(f"caches[{i}] must be of the same options as caches[0]")
        if cache.owner != first.owner:
            raise ValueError(
                f"caches[{i}] must be of the same model and weights as caches[0], and at the "
                "same version of them"
            )
    sizes = [len(cache.counts) for cache in caches]
    joined = type(first)(first.options)
    joined.owner, joined.columns = first.owner, max(cache.columns for cache in caches)
    for name in (*ROW_COUNTERS, "supervised"):
        setattr(joined, name, torch.cat([getattr(cache, name) for cache in caches]))
    for name in ("states", "opening"):
        held = [getattr(cache, name) for cache in caches]
        layers = sorted({i for states in held for i in states})
        setattr(joined, name, {
            i: join_states([states.get(i, LayerState()) for states in held], sizes)
            for i in layers
        })  # fmt: skip
    width = max((x.shape[1] for c in caches if (x := c.hidden) is not None), default=0)
    hidden = [
        x if x is None else torch.nn.functional.pad(x, (0, 0, 0, width - x.shape[1]))
        for x in (cache.hidden for cache in caches)
    ]
    joined.hidden = join_rows(hidden, sizes)
    histories = [cache.history.folded() for cache in caches]
    device = histories[0].whole.device
    joined.history = History(
        torch.cat([history.whole.to(device) for history in histories]),
        torch.cat([history.opening.to(device) for history in histories]),
    )
    return joined


def split(cache: SleepCache, sizes: Sequence[int] | None) -> list[SleepCache]:
    """See `SleepCache.split`."""
    rows = len(cache.counts)
    sizes = [1] * rows if sizes is None else list(sizes)
    if any(size < 1 for size in sizes) or sum(sizes) != rows:
        raise ValueError(f"sizes must be at least 1 each and {rows} in all, got {sizes}")
    parts, first = [], 0
    for size in sizes:
        part = cache.copy()
        part.batch_select_indices(torch.arange(first, first + size))
        _trim(part)
        part.reports, part.finished = [], None
        parts.append(part)
        first += size
    return parts


def _trim(cache: SleepCache) -> None:
    """Drop what lies behind the longest row of slots and hidden states."""
    tokens, width = int(cache.counts.max()), int((cache.kept + cache.counts).max())
    if cache.hidden is not None:
        cache.hidden = cache.hidden[:, :tokens].clone() if tokens else None
    for i, state in cache.states.items():
        slots = tuple(x[:, :, :width].clone() for x in state.slots) if width else ()
        cache.states[i] = state._replace(slots=slots)
