"""What a sleep of depth N costs on a CPU, compared with N calls of the model on the same window.

A sleep reuses pass 1 and computes no logits, so it should take at most (N-1)/N of the N calls. Both
run alternately in one process and are compared pair by pair. `sleep_gpu` is the benchmark of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, ClassVar

from hybrid_sleep.eval.costs.call import Call
from hybrid_sleep.eval.costs.models import VOCABULARY, untrained
from hybrid_sleep.eval.costs.timing import Spread, elapsed
from hybrid_sleep.eval.results import Result
from hybrid_sleep.kernels.benchmarks.timing import interleaved
from hybrid_sleep.validation import check_count

LEAST_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and a batch of full windows."""

    state_space: str
    batch: int
    window: int
    hidden: int
    layers: int
    eviction: str = "hard"
    loop: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class SleepRow(Shape):
    """One shape and depth: median seconds of a sleep and of `passes` calls, ratios of the pairs."""

    passes: int
    pairs: int
    sleep_seconds: float
    calls_seconds: float
    ratio: float
    quartiles: list[float]

    @property
    def bound(self) -> float:
        """What the ratio should not exceed."""
        return (self.passes - 1) / self.passes

    @property
    def within(self) -> bool:
        """Whether the ratio is at most its bound."""
        return self.ratio <= self.bound


@dataclass(kw_only=True)
class SleepCost(Result):
    """Sleeps on a CPU, by shape and depth: at least `repeats` pairs of each."""

    benchmark: ClassVar[str] = "sleep"
    repeats: int
    rows: list[SleepRow]


def _shapes() -> tuple[Shape, ...]:
    shapes = []
    for state_space in ("gated_deltanet", "mamba2"):
        middle = Shape(state_space=state_space, batch=8, window=75, hidden=128, layers=4)
        shapes += [
            replace(middle, batch=1, window=24, hidden=64, layers=2),
            replace(middle, batch=128, window=24, hidden=64, layers=2),
            middle,
            replace(middle, batch=1, window=256, hidden=256),
            replace(middle, batch=1, window=1024, hidden=256),
            replace(middle, eviction="sliding"),
            replace(middle, loop=(1, 3)),
        ]
    return tuple(shapes)


SHAPES = _shapes()


def run(
    call: Call,
    *,
    shapes: Sequence[Shape] = SHAPES,
    passes: Sequence[int] = (2, 4, 8),
    least_seconds: float = LEAST_SECONDS,
) -> SleepCost:
    """Time both sides on every shape and depth.

    At least `call.repeats` pairs of each, more where these take less than `least_seconds`. Raises
    ValueError for a depth below 2, or a device that is no CPU.
    """
    for depth in passes:
        check_count("passes", depth, 2)
    if call.kind != "cpu":
        raise ValueError(f"device must be a CPU, got {call.device!r}")
    models: dict[Shape, Any] = {}

    def measure(key: dict[str, Any]) -> dict[str, Any]:
        options = {name: value for name, value in key.items() if name != "passes"}
        options["loop"] = None if options["loop"] is None else tuple(options["loop"])
        shape, depth = Shape(**options), key["passes"]
        if shape not in models:
            models.clear()
            del options["batch"]
            models[shape] = untrained(device=call.device, **options)
        pairs = time_pairs(models[shape], shape.batch, depth, call.repeats, least_seconds)
        ratios = Spread.of([slept / called for slept, called in pairs])
        return {
            "pairs": len(pairs),
            "sleep_seconds": median(slept for slept, _ in pairs),
            "calls_seconds": median(called for _, called in pairs),
            "ratio": ratios.median,
            "quartiles": ratios.quartiles,
        }

    planned = [{**asdict(shape), "passes": depth} for shape in shapes for depth in passes]
    return call.measure(SleepCost, planned, measure)


def time_pairs(
    model: Any, batch: int, depth: int, repeats: int, least_seconds: float
) -> list[tuple[float, float]]:
    """(seconds of one sleep, seconds of `depth` calls) of at least `repeats` pairs of runs."""
    import torch

    device = next(model.parameters()).device
    drawn = torch.Generator().manual_seed(0)
    shape = (batch, model.config.window)
    input_ids = torch.randint(VOCABULARY, shape, generator=drawn).to(device)

    def sleep() -> float:
        cache = model(input_ids=input_ids, use_cache=True).cache
        seconds = elapsed(lambda: model.sleep(cache, passes=depth), device)
        done = cache.reports[-1].passes
        if done != depth:
            raise RuntimeError(f"the sleep did {done} passes where {depth} were asked for")
        return seconds

    def calls() -> float:
        return elapsed(lambda: [model(input_ids=input_ids) for _ in range(depth)], device)

    works: dict[str, Callable[[], float]] = {"sleep": sleep, "calls": calls}
    with torch.no_grad():
        sleep()
        calls()
        # Each clocks itself: filling the window is no part of the sleep.
        seconds = interleaved(works, repeats, least_seconds, lambda work: work())
    return list(zip(seconds["sleep"], seconds["calls"], strict=True))
