"""Sleeps on a GPU from CUDA graphs, compared with eager sleeps and with calls of the model.

The model has d = 1024, 24 layers (three state-space layers, then one of attention), 8 heads of 128,
bf16, windows of 2048 tokens. All times are elapsed times, launches included; what is compared runs
in rotating order in one process and is compared within each round.

Rows of kind "sleep" are about one sleep of depth N; rows of kind "decode" about one token behind an
empty past, and behind 64 windows that were consolidated, with windows filled alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import truediv
from typing import Any, ClassVar, Literal

import torch

from hybrid_sleep.eval.costs.call import Call
from hybrid_sleep.eval.costs.models import untrained
from hybrid_sleep.eval.costs.timing import Spread, elapsed
from hybrid_sleep.eval.results import Result
from hybrid_sleep.kernels.benchmarks.timing import interleaved

SIZE = {
    "hidden": 1024,
    "layers": 24,
    "window": 2048,
    "head_dim": 128,
    "vocabulary": 32_768,
    "dtype": "bfloat16",
}
PASSES = (4, 2, 8, 1)
BATCHES = (1, 16)
WINDOWS = 64
TOKENS = 64
LEAST_SECONDS = 3.0
TARGET = {"state_space": "gated_deltanet", "batch": 1, "passes": 4}
TARGET_SPEEDUP = 3.0
WAYS = ("graph", "eager", "calls")


@dataclass(kw_only=True)
class GpuRow:
    """A model and a batch."""

    state_space: str
    batch: int
    hidden: int
    layers: int
    window: int
    head_dim: int
    vocabulary: int
    dtype: str
    passes: int
    rounds: int


@dataclass(kw_only=True)
class GpuSleepRow(GpuRow):
    """One depth: `seconds` by way, `speedup` of `graph` and `eager` over the calls.

    held_bytes: memory that the graphs keep between sleeps; peak_bytes: by way, on top of it.
    """

    kind: Literal["sleep"]
    path: str
    seconds: dict[str, Spread]
    speedup: dict[str, Spread]
    capture_seconds: float
    held_bytes: int | None
    peak_bytes: dict[str, int | None]


@dataclass(kw_only=True)
class GpuDecodeRow(GpuRow):
    """One token `before` and `after` so many windows: seconds, their ratio, bytes of the cache."""

    kind: Literal["decode"]
    windows: int
    seconds: dict[str, Spread]
    ratio: Spread
    cache_bytes: dict[str, int]


@dataclass(kw_only=True)
class GpuSleepCost(Result):
    """Sleeps and decoding on a GPU."""

    benchmark: ClassVar[str] = "sleep_gpu"
    repeats: int
    rows: list[GpuSleepRow | GpuDecodeRow]

    @property
    def sleeps(self) -> list[GpuSleepRow]:
        """Rows about sleeps."""
        return [row for row in self.rows if isinstance(row, GpuSleepRow)]

    @property
    def decoding(self) -> list[GpuDecodeRow]:
        """Rows about single tokens."""
        return [row for row in self.rows if isinstance(row, GpuDecodeRow)]

    @property
    def target_met(self) -> bool | None:
        """Whether the target is met, by a sleep from graphs; None if that was not measured."""
        for row in self.sleeps:
            if all(getattr(row, name) == value for name, value in TARGET.items()):
                from_graph = row.path.startswith("cuda graph")
                return from_graph and row.speedup["graph"].median >= TARGET_SPEEDUP
        return None


def planned_rows() -> list[dict[str, Any]]:
    """What each row is about, the one with the target first."""
    rows = []
    for state_space in ("gated_deltanet", "mamba2"):
        for batch in BATCHES:
            key = {"state_space": state_space, "batch": batch, **SIZE}
            rows += [{"kind": "sleep", **key, "passes": depth} for depth in PASSES]
            rows.append({"kind": "decode", **key, "passes": 4, "windows": WINDOWS})
    return rows


def run(call: Call) -> GpuSleepCost:
    """Measure every row. Raises ValueError where the device is no GPU: nothing is estimated."""
    if call.kind != "cuda":
        raise ValueError(f"device must be a GPU, such as 'cuda', got {call.device!r}")
    bench = Bench(call.device, call.repeats)
    return call.measure(GpuSleepCost, planned_rows(), bench.measure)


class Bench:
    """Measures rows on one device; the last model is kept for the rows that share it."""

    def __init__(self, device: Any, repeats: int, least_seconds: float = LEAST_SECONDS):
        self.device, self.repeats, self.least_seconds = device, repeats, least_seconds
        self._sizes: Any = None
        self._model: Any = None

    @torch.no_grad()
    def measure(self, key: dict[str, Any]) -> dict[str, Any]:
        """The measurements of one row."""
        sizes = {k: v for k, v in key.items() if k not in ("kind", "batch", "passes", "windows")}
        if self._sizes != sizes:
            # Let go of the old model before there is a new one.
            self._model, self._sizes = None, sizes
            pattern = ["linear_attention"] * 3 + ["full_attention"]
            types = [pattern[i % 4] for i in range(sizes["layers"])]
            self._model = untrained(device=self.device, **sizes, layer_types=types)
        return self._sleep(key) if key["kind"] == "sleep" else self._decode(key)

    def _ids(self, batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
        drawn = torch.Generator().manual_seed(seed)
        ids = torch.randint(self._model.config.vocab_size, (batch, tokens), generator=drawn)
        return ids.to(self._model.device)

    def _sleep(self, key: dict[str, Any]) -> dict[str, Any]:
        model, depth = self._model, key["passes"]
        ids = self._ids(key["batch"], key["window"])
        full = model(input_ids=ids, logits_to_keep=1).cache
        engine = model.model.engine

        def graph() -> Any:
            return model.sleep(full.copy(), passes=depth)

        def eager() -> Any:
            model.model.engine = None
            try:
                return model.sleep(full.copy(), passes=depth)
            finally:
                model.model.engine = engine

        def calls() -> None:
            for _ in range(depth):
                model(input_ids=ids)

        works = dict(zip(WAYS, (graph, eager, calls), strict=True))
        engine.forget()
        before = self._reserved()
        # The first sleep runs eagerly and warms up, the second one captures.
        first = [elapsed(graph, model.device) for _ in range(2)]
        after = self._reserved()
        peaks = {name: self._peak(work) for name, work in works.items()}
        seconds = self._rounds(works, self.repeats, self.least_seconds)
        row = {
            "path": graph().path,
            "rounds": len(seconds["graph"]),
            "seconds": {name: vars(Spread.of(values)) for name, values in seconds.items()},
            "speedup": {
                name: vars(Spread.of(list(map(truediv, seconds["calls"], seconds[name]))))
                for name in ("graph", "eager")
            },
            "capture_seconds": first[1],
            "held_bytes": None if before is None or after is None else after - before,
            "peak_bytes": peaks,
        }
        engine.forget()
        return row

    def _decode(self, key: dict[str, Any]) -> dict[str, Any]:
        """Both caches get the same half window, then one token each, alternately."""
        model, batch, window = self._model, key["batch"], key["window"]
        past = None
        for number in range(key["windows"]):
            past = model(
                input_ids=self._ids(batch, window, number), cache=past, logits_to_keep=1,
                sleep_passes=key["passes"],
            ).cache  # fmt: skip
        model.sleep(past, passes=key["passes"])
        half = self._ids(batch, max(1, window // 2), key["windows"])
        caches = {
            "before": model(input_ids=half, logits_to_keep=1).cache,
            "after": model(input_ids=half, cache=past, logits_to_keep=1).cache,
        }
        sleeps = int(caches["after"].sleeps[0])
        if sleeps != key["windows"]:
            raise RuntimeError(f"{sleeps} sleeps happened where {key['windows']} should have")
        token = self._ids(batch, 1)
        works: dict[str, Callable[[], Any]] = {
            name: partial(model, input_ids=token, cache=cache) for name, cache in caches.items()
        }
        # The window has to stay open: no token may bring a sleep with it.
        room = window - caches["before"].counts.max().item()
        seconds = self._rounds(works, min(TOKENS, room - 1), 0.0)
        ratios = list(map(truediv, seconds["after"], seconds["before"]))
        model.model.engine.forget()
        return {
            "rounds": len(ratios),
            "seconds": {name: vars(Spread.of(values)) for name, values in seconds.items()},
            "ratio": vars(Spread.of(ratios)),
            "cache_bytes": {name: cache.nbytes() for name, cache in caches.items()},
        }

    def _rounds(
        self, works: dict[str, Callable[[], Any]], rounds: int, least_seconds: float
    ) -> dict[str, list[float]]:
        """Elapsed seconds of each, round by round, after one round to warm up."""
        for work in works.values():
            work()
        return interleaved(
            works, rounds, least_seconds, lambda work: elapsed(work, self._model.device)
        )

    def _peak(self, work: Callable[[], Any]) -> int | None:
        """Bytes that `work` needs on top of what is held when it starts; None on a CPU."""
        device = self._model.device
        if device.type != "cuda":
            return None
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    def _reserved(self) -> int | None:
        device = self._model.device
        if device.type != "cuda":
            return None
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(device)
