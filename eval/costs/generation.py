"""Does the 64th window cost what the first did? Seconds per token and memory while generating.

Every forward pass of one long `generate` is timed through its streamer. A token that finds its
window full makes the model sleep first; that time (from the SleepReport) is charged to the window
that slept, so that the first window is not cheaper than the others for want of a sleep before it.

A machine is not equally fast from one moment to the next. So a fresh sequence of one window is
generated in lockstep with each window of the long run, one token of the one and then one token of
the other, and the ratio is taken token by token. (With whole windows in turn the middle half of the
ratios is six times as wide on a busy machine: .16 instead of .025.)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

import psutil
from transformers.generation.streamers import BaseStreamer

from hybrid_sleep.eval.costs.models import VOCABULARY, untrained
from hybrid_sleep.eval.costs.timing import synchronise
from hybrid_sleep.eval.results import Result
from hybrid_sleep.support.provenance import check_device, provenance
from hybrid_sleep.validation import check_count

ALLOWED = 1.05


@dataclass(kw_only=True)
class GenerationCost(Result):
    """Cost of each window of a long `generate`; medians over `repeats` runs.

    per_window: by name, a number a window. `token`: median seconds of a decoding step; `sleep`:
    seconds of the window's sleep; `total`: seconds per token with its share of the sleep; each also
    as `fresh_...`, of the first window compared with, and as `ratio_...` of the two. `cache` and
    `process`: bytes held when the window is full.
    """

    benchmark: ClassVar[str] = "generation"
    continues: ClassVar[bool] = False
    windows: int
    window: int
    passes: int
    repeats: int
    state_space: str
    config: dict[str, Any]
    per_window: dict[str, list[float]]
    allowed: float = ALLOWED

    @property
    def ratio(self) -> dict[str, float]:
        """Of the last window: times to its fresh first window's, bytes to the run's own first's."""
        last = {name: self.per_window[f"ratio_{name}"][-1] for name in ("token", "sleep", "total")}
        for name in ("cache", "process"):
            held = self.per_window[name]
            last[name] = held[-1] / held[0]
        return last

    @property
    def trend(self) -> dict[str, float]:
        """Of `token` and `total` over all windows: see `trend`."""
        return {name: trend(self.per_window[f"ratio_{name}"]) for name in ("token", "total")}


class Clock(BaseStreamer):
    """A streamer that times every forward pass, and reads the memory held when a window is full.

    `forwards[j]` are the seconds from one token's arrival to the next: the forward pass over token
    j of the sequence, with the sleep before it where there is one. `pause` is called after every
    forward pass, off the clock.
    """

    def __init__(self, cache: Any, window: int, device: Any, pause: Callable[[], None]):
        self.cache, self.window, self.device = cache, window, device
        self.pause = pause
        self.forwards: list[float] = []
        self.cache_bytes: list[int] = []
        self.process_bytes: list[int] = []
        self.resumed: float | None = None

    def put(self, value: Any) -> None:
        """Called with the prompt, then after every token."""
        synchronise(self.device)
        if self.resumed is not None:
            self.forwards.append(time.perf_counter() - self.resumed)
            if len(self.forwards) % self.window == 0:
                self.cache_bytes.append(self.cache.nbytes())
                self.process_bytes.append(process_bytes(self.device))
            self.pause()
        self.resumed = time.perf_counter()

    def end(self) -> None:
        """Nothing is buffered."""


class InSteps:
    """Runs `work(pause)` in a thread that goes on only when told to, up to its next `pause()`."""

    def __init__(self, work: Callable[[Callable[[], None]], Any]):
        self.work = work
        self.result: Any = None
        self.error: BaseException | None = None
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        # A daemon: a benchmark that is interrupted must not wait for it.
        threading.Thread(target=self._run, daemon=True).start()

    def step(self) -> None:
        """Let it run to its next pause or to its end; raises what it raised."""
        self._go.release()
        self._stopped.acquire()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        self._go.acquire()
        try:
            self.result = self.work(self._pause)
        except BaseException as error:
            self.error = error
        self._stopped.release()

    def _pause(self) -> None:
        self._stopped.release()
        self._go.acquire()


def process_bytes(device: Any) -> int:
    """Bytes this process holds: resident on a CPU, the peak since the last call on a GPU."""
    import torch

    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return psutil.Process().memory_info().rss


def run(
    *,
    windows: int = 64,
    window: int = 64,
    passes: int = 4,
    repeats: int = 5,
    hidden: int = 128,
    layers: int = 4,
    state_space: str = "gated_deltanet",
    device: str = "cpu",
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GenerationCost:
    """Generate `windows` windows `repeats` times, in lockstep with a fresh first window for each.

    `progress` is called with (windows done, windows in all). Interrupted after the first repeat,
    the result has those that are done.
    """
    import torch

    from hybrid_sleep import SleepCache

    for name, value, least in (("windows", windows, 2), ("window", window, 2),
                               ("passes", passes, 1), ("repeats", repeats, 1)):  # fmt: skip
        check_count(name, value, least)
    check_device(device)
    model = untrained(state_space, hidden=hidden, layers=layers, window=window, device=device)
    first_token = torch.randint(VOCABULARY, (1, 1), generator=torch.Generator().manual_seed(0))
    first_token = first_token.to(device)

    def generate(count: int, pause: Callable[[], None] = lambda: None) -> Costs:
        cache = SleepCache(model.config)
        clock = Clock(cache, window, model.device, pause)
        # One token more than fills the last window, so that the last window sleeps as well.
        tokens = count * window + 1
        model.generate(
            first_token,
            cache=cache,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            # By itself generate() would compile the long run alone.
            disable_compile=True,
            sleep_passes=passes,
            streamer=clock,
        )
        return Costs.of(clock, [report.seconds for report in cache.reports])

    def generate_and_compare() -> dict[str, list[float]]:
        fresh = InSteps(lambda pause: [generate(1, pause) for _ in range(windows)])
        forwards = 0

        def step_fresh() -> None:
            nonlocal forwards
            fresh.step()
            if forwards % window == 0 and 0 < forwards < windows * window:
                # The sleep and the first token of the next window, one forward pass of the long
                # run, are the last pass of one fresh run and the first of another.
                fresh.step()
                if progress is not None:
                    done = len(samples) * windows + forwards // window
                    progress(done, repeats * windows)
            forwards += 1

        long = generate(windows, step_fresh)
        fresh.step()
        return compare(long, fresh.result)

    generate(2)
    samples: list[dict[str, list[float]]] = []
    ended = "done"
    try:
        for _ in range(repeats):
            samples.append(generate_and_compare())
            if progress is not None:
                progress(len(samples) * windows, repeats * windows)
    except KeyboardInterrupt:
        if not samples:
            raise
        ended = "interrupted"
    return GenerationCost(
        windows=windows,
        window=window,
        passes=passes,
        repeats=len(samples),
        state_space=state_space,
        config=model.config.to_diff_dict(),
        per_window={
            name: [median(sample[name][index] for sample in samples) for index in range(windows)]
            for name in samples[0]
        },
        ended=ended,
        command=command,
        provenance=provenance(device),
    )


@dataclass
class Costs:
    """What the windows of one run cost: each decoding step, each sleep, bytes when full."""

    steps: list[list[float]]
    sleeps: list[float]
    cache: list[int]
    process: list[int]

    @classmethod
    def of(cls, clock: Clock, sleeps: list[float]) -> Costs:
        """From a clock and the seconds of the sleeps it saw, one a window."""
        window, forwards = clock.window, list(clock.forwards)
        for index, seconds in enumerate(sleeps, 1):
            forwards[index * window] -= seconds
        steps = [forwards[i * window : (i + 1) * window] for i in range(len(sleeps))]
        return cls(steps, list(sleeps), clock.cache_bytes, clock.process_bytes)


def compare(long: Costs, fresh: Sequence[Costs]) -> dict[str, list[float]]:
    """Each window of `long` compared with the fresh window of its time; lists by window."""
    costs: dict[str, list[float]] = {"ratio_token": []}
    for prefix, runs in (
        ("", list(zip(long.steps, long.sleeps, strict=True))),
        ("fresh_", [(run.steps[0], run.sleeps[0]) for run in fresh]),
    ):
        costs[f"{prefix}token"] = [median(steps) for steps, _ in runs]
        costs[f"{prefix}sleep"] = [sleep for _, sleep in runs]
        costs[f"{prefix}total"] = [median(steps) + sleep / len(steps) for steps, sleep in runs]
    for steps, first in zip(long.steps, fresh, strict=True):
        pairs = zip(steps, first.steps[0], strict=True)
        costs["ratio_token"].append(median(a / b for a, b in pairs))
    for name in ("sleep", "total"):
        pairs = zip(costs[name], costs[f"fresh_{name}"], strict=True)
        costs[f"ratio_{name}"] = [a / b for a, b in pairs]
    return costs | {
        "cache": list(map(float, long.cache)),
        "process": list(map(float, long.process)),
    }


def trend(values: list[float]) -> float:
    """Last over first value on the line through all of them whose slope is the median slope."""
    count = len(values)
    slope = median(
        (values[j] - values[i]) / (j - i) for i in range(count) for j in range(i + 1, count)
    )
    start = median(value - slope * index for index, value in enumerate(values))
    return (start + slope * (count - 1)) / start
