"""Does the 64th window cost what the first did? Seconds per token and memory while generating.

Every forward of one long `generate` is timed through its streamer. A token that finds its window
full makes the model sleep first; that time (from the SleepReport) is charged to the window that
slept, so that the first window is not cheaper than the others for want of a sleep before it.

A machine is not equally fast from one moment to the next. So each window is compared with a first
window of its own: beside the long run a fresh sequence is generated in step with it, one token of
the one and then one token of the other, and the ratio is taken token by token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from transformers.generation.streamers import BaseStreamer

from hybrid_sleep.eval.benchmarks.models import VOCABULARY, untrained
from hybrid_sleep.support.provenance import check_device, describe, provenance
from hybrid_sleep.validation import check_count

ALLOWED = 1.05


class Clock(BaseStreamer):
    """A streamer that times every forward, and reads the memory held when a window is full.

    `forwards[j]` are the seconds from one token's arrival to the next: the forward that reads
    token j of the sequence, with the sleep before it where there is one. `pause` is called after
    every forward, off the clock.
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
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

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


def synchronise(device: Any) -> None:
    """Wait until `device` has done what it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def process_bytes(device: Any) -> int:
    """Bytes this process holds: resident on a CPU, the peak since the last call on a GPU.

    0 on a CPU whose system does not say (no /proc).
    """
    import torch

    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return 1024 * int(line.split()[1])
    return 0


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
) -> dict[str, Any]:
    """Generate `windows` windows `repeats` times, in step with a fresh first window each.

    `per_window` holds medians over the repeats. `token`: median seconds of a forward awake;
    `sleep`: seconds of the window's sleep; `total`: seconds per token with the sleep's share;
    each also as `fresh_...`, of the first window beside it, and as `ratio_...` of the two.
    `cache`, `process`: bytes held when the window is full. `ratio` is the last window's: against
    its fresh first window for times, against the run's own first window for bytes. Interrupted
    after the first repeat, it uses those it has, with `complete` False.
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

    def generate(count: int, pause: Callable[[], None]) -> Costs:
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
            sleep_passes=passes,
            streamer=clock,
        )
        return Costs.of(clock, [report.seconds for report in cache.reports])

    def beside_fresh_ones() -> dict[str, list[float]]:
        long = InSteps(lambda pause: generate(windows, pause))
        fresh = InSteps(lambda pause: [generate(1, pause) for _ in range(windows)])
        last = windows * window
        for read in range(last + 1):
            # Neither is always the one whose data the other has just pushed out of the caches.
            for run in (long, fresh) if read % 2 == 0 else (fresh, long):
                run.step()
            if read % window == 0 and 0 < read < last:
                # That forward let a window sleep, and read the first token of the next one.
                fresh.step()
                if progress is not None:
                    progress(len(samples) * windows + read // window, repeats * windows)
        long.step()
        fresh.step()
        return compare(long.result, fresh.result)

    generate(2, lambda: None)
    samples: list[dict[str, list[float]]] = []
    complete = True
    try:
        for _ in range(repeats):
            samples.append(beside_fresh_ones())
            if progress is not None:
                progress(len(samples) * windows, repeats * windows)
    except KeyboardInterrupt:
        if not samples:
            raise
        complete = False
    per_window = {
        name: [median(sample[name][index] for sample in samples) for index in range(windows)]
        for name in samples[0]
    }
    return {
        "benchmark": "generation",
        "windows": windows,
        "window": window,
        "passes": passes,
        "repeats": len(samples),
        "config": model.config.to_diff_dict(),
        "state_space": state_space,
        "allowed": ALLOWED,
        "ratio": {
            **{name: per_window[f"ratio_{name}"][-1] for name in ("token", "sleep", "total")},
            **{
                name: per_window[name][-1] / per_window[name][0]
                for name in ("cache", "process")
                if per_window[name][0]
            },
        },
        "trend": {name: trend(per_window[f"ratio_{name}"]) for name in ("token", "total")},
        "per_window": per_window,
        "complete": complete,
        "command": command,
        "provenance": provenance(device),
    }


@dataclass
class Costs:
    """What the windows of one run cost: each awake forward, each sleep, bytes when full."""

    awake: list[list[float]]
    sleeps: list[float]
    cache: list[int]
    process: list[int]

    @classmethod
    def of(cls, clock: Clock, sleeps: list[float]) -> Costs:
        """From a clock and the seconds of the sleeps it saw, one a window."""
        window, forwards = clock.window, list(clock.forwards)
        for index, seconds in enumerate(sleeps, 1):
            forwards[index * window] -= seconds
        awake = [forwards[i * window : (i + 1) * window] for i in range(len(sleeps))]
        return cls(awake, list(sleeps), clock.cache_bytes, clock.process_bytes)


def compare(long: Costs, fresh: Sequence[Costs]) -> dict[str, list[float]]:
    """Each window of `long` against the first window of the run beside it; lists by window."""
    costs: dict[str, list[float]] = {"ratio_token": []}
    for prefix, runs in (
        ("", [(awake, sleep) for awake, sleep in zip(long.awake, long.sleeps, strict=True)]),
        ("fresh_", [(run.awake[0], run.sleeps[0]) for run in fresh]),
    ):
        costs[f"{prefix}token"] = [median(awake) for awake, _ in runs]
        costs[f"{prefix}sleep"] = [sleep for _, sleep in runs]
        costs[f"{prefix}total"] = [median(awake) + sleep / len(awake) for awake, sleep in runs]
    for awake, beside in zip(long.awake, fresh, strict=True):
        pairs = zip(awake, beside.awake[0], strict=True)
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


TIMES = {
    "token": "ms per token awake (median)",
    "sleep": "ms per sleep",
    "total": "ms per token with its share of the sleep",
}
BYTES = {"cache": "cache, bytes", "process": "process, bytes"}


def markdown(result: dict[str, Any]) -> str:
    """The last window against a first window."""
    last, per_window = result["windows"], result["per_window"]
    lines = [f"| | first window | window {last} | ratio |", "|---|---:|---:|---:|"]
    for name, label in TIMES.items():
        first_value, last_value = (1000 * per_window[key][-1] for key in (f"fresh_{name}", name))
        ratio = result["ratio"][name]
        lines.append(f"| {label} | {first_value:.3f} | {last_value:.3f} | **{ratio:.3f}** |")
    for name, label in BYTES.items():
        if name in result["ratio"]:
            first_value, last_value = (per_window[name][index] for index in (0, -1))
            ratio = result["ratio"][name]
            lines.append(f"| {label} | {first_value:,.0f} | {last_value:,.0f} | **{ratio:.3f}** |")
    for name in result["trend"]:
        ratio = result["trend"][name]
        lines.append(f"| {TIMES[name]}: trend over all windows | | | {ratio:.3f} |")
    config = result["config"]
    lines += [
        "",
        f"Allowed: {result['allowed']:.2f}. {last} windows of {result['window']} tokens, "
        f"{result['passes']} passes a sleep, medians of {result['repeats']} runs. For times, the "
        "first window is that of a fresh sequence, generated token by token in turn with the "
        f"window it is compared with. Batch 1, {config['num_hidden_layers']} layers of "
        f"{config['hidden_size']}, {result['state_space']}, random weights.",
        "",
        describe(result["provenance"]),
    ]
    if result["command"]:
        lines += ["", f"`{result['command']}`"]
    return "\n".join(lines) + "\n"


def figure(result: dict[str, Any]) -> Any:
    """Cost of each window relative to a first window, and what is allowed."""
    from hybrid_sleep.eval.plots import BLUE, GREEN, GREY, ORANGE, new_figure

    picture, axes = new_figure(f"Generating {result['windows']} windows: cost of each")
    numbers = range(1, result["windows"] + 1)
    per_window = result["per_window"]
    cache = [size / per_window["cache"][0] for size in per_window["cache"]]
    limit = 100 * result["allowed"]
    axes.axhline(limit, color=GREY, linestyle=(0, (4, 3)), linewidth=1.6)
    lowest, highest = 80.0, 120.0
    for values, label, colour, marker in (
        (per_window["ratio_token"], "seconds per token, awake", BLUE, "o"),
        (per_window["ratio_total"], "seconds per token with its sleep", ORANGE, "^"),
        (cache, "cache bytes", GREEN, "s"),
    ):
        axes.plot(
            numbers, [100 * value for value in values], color=colour, marker=marker,
            markersize=4, linewidth=1.4, label=label,
        )  # fmt: skip
        lowest, highest = min(lowest, 98 * min(values)), max(highest, 102 * max(values))
    axes.set_ylim(lowest, highest)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
    axes.set_xlabel(f"window (dashed: the {limit:.0f} % allowed)", fontsize=13)
    axes.set_ylabel("of a first window", fontsize=13)
    picture.legend(fontsize=11, frameon=False, loc="outside lower center", ncols=2)
    return picture
