"""Does the 64th window cost what the first did? Seconds per token and memory while generating.

Every forward of one long `generate` is timed through its streamer. A token that finds its window
full makes the model sleep first; that time (from the SleepReport) is charged to the window that
slept, so that the first window is not cheaper than the others for want of a sleep before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from transformers.generation.streamers import BaseStreamer

from hybrid_sleep.eval.benchmarks.models import VOCABULARY, untrained
from hybrid_sleep.eval.provenance import describe, provenance
from hybrid_sleep.eval.tasks.base import check_int

ALLOWED = 1.05


class Clock(BaseStreamer):
    """A streamer that notes when each token comes, and what the cache holds at that moment."""

    def __init__(self, cache: Any, window: int, device: Any):
        self.cache, self.window, self.device = cache, window, device
        self.times: list[float] = []
        self.cache_bytes: list[int] = []
        self.process_bytes: list[int] = []

    def put(self, value: Any) -> None:
        """Called with the prompt, then after every token: entry j is the end of forward j-1."""
        synchronise(self.device)
        self.times.append(time.perf_counter())
        read = len(self.times) - 1
        if read and read % self.window == 0:
            self.cache_bytes.append(self.cache.nbytes())
            self.process_bytes.append(process_bytes(self.device))

    def end(self) -> None:
        """Nothing is buffered."""


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
    """Generate `windows` windows `repeats` times; medians per window, and last against first.

    `ratio` compares the last window with the first: `token` is the median forward of one token,
    `total` everything the window cost, its sleep included, `cache` and `process` the bytes held
    when it is full. `trend` is the same for `token` by a robust line (Theil and Sen) through all
    windows, which one disturbed window cannot move.
    """
    import torch

    from hybrid_sleep import SleepCache

    for name, value, least in (("windows", windows, 2), ("window", window, 2),
                               ("passes", passes, 1), ("repeats", repeats, 1)):  # fmt: skip
        check_int(name, value, least)
    model = untrained(state_space, hidden=hidden, layers=layers, window=window, device=device)
    first_token = torch.randint(
        VOCABULARY, (1, 1), generator=torch.Generator().manual_seed(0)
    ).to(device)  # fmt: skip

    def generate(count: int) -> tuple[Clock, Any]:
        cache = SleepCache(model.config)
        clock = Clock(cache, window, model.device)
        model.generate(
            first_token,
            past_key_values=cache,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            sleep_passes=passes,
            streamer=clock,
        )
        return clock, cache

    generate(2 * window + 1)
    samples = []
    for repeat in range(repeats):
        # One token more than fills the last window, so that the last window sleeps as well.
        clock, cache = generate(windows * window + 1)
        samples.append(by_window(clock, [report.seconds for report in cache.reports], windows))
        if progress is not None:
            progress(repeat + 1, repeats)
    per_window = {
        name: [median(sample[name][index] for sample in samples) for index in range(windows)]
        for name in samples[0]
    }
    return {
        "benchmark": "generation",
        "windows": windows,
        "window": window,
        "passes": passes,
        "repeats": repeats,
        "config": model.config.to_diff_dict(),
        "allowed": ALLOWED,
        "ratio": {name: values[-1] / values[0] for name, values in per_window.items() if values[0]},
        "trend": trend(per_window["token"]),
        "per_window": per_window,
        "command": command,
        "provenance": provenance(device),
    }


def by_window(clock: Clock, sleeps: list[float], windows: int) -> dict[str, list[float]]:
    """Seconds per token (awake, and with the window's sleep) and bytes, for each window."""
    window = clock.window
    forwards = [end - start for start, end in zip(clock.times, clock.times[1:], strict=False)]
    for index in range(windows):
        forwards[(index + 1) * window] -= sleeps[index]
    awake = [forwards[index * window : (index + 1) * window] for index in range(windows)]
    return {
        "token": [median(seconds) for seconds in awake],
        "total": [sum(s) / window + sleeps[i] / window for i, s in enumerate(awake)],
        "sleep": sleeps[:windows],
        "cache": [float(size) for size in clock.cache_bytes[:windows]],
        "process": [float(size) for size in clock.process_bytes[:windows]],
    }


def trend(values: list[float]) -> float:
    """Last over first value on the robust line through all of them (median of all slopes)."""
    count = len(values)
    slope = median(
        (values[j] - values[i]) / (j - i) for i in range(count) for j in range(i + 1, count)
    )
    start = median(value - slope * index for index, value in enumerate(values))
    return (start + slope * (count - 1)) / start


NAMES = {
    "token": "seconds per token, awake (median)",
    "total": "seconds per token, sleep included",
    "sleep": "seconds per sleep",
    "cache": "cache, bytes",
    "process": "process, bytes resident",
}


def markdown(result: dict[str, Any]) -> str:
    """First against last window."""
    last = result["windows"]
    lines = [f"| | window 1 | window {last} | ratio |", "|---|---:|---:|---:|"]
    for name, ratio in result["ratio"].items():
        first_value, last_value = (result["per_window"][name][i] for i in (0, -1))
        bytes_ = name in ("cache", "process")
        shown = [f"{v:,.0f}" if bytes_ else f"{v:.6f}" for v in (first_value, last_value)]
        lines.append(f"| {NAMES[name]} | {shown[0]} | {shown[1]} | {ratio:.3f} |")
    config = result["config"]
    lines += [
        f"| trend of seconds per token over all windows | | | {result['trend']:.3f} |",
        "",
        f"Allowed: {result['allowed']:.2f}. {last} windows of {result['window']} tokens, "
        f"{result['passes']} passes a sleep, medians of {result['repeats']} runs; batch 1, "
        f"{config['num_hidden_layers']} layers of {config['hidden_size']}, "
        f"{config.get('state_space', 'gated_deltanet')}, random weights.",
        "",
        describe(result["provenance"]),
    ]
    if result["command"]:
        lines += ["", f"`{result['command']}`"]
    return "\n".join(lines) + "\n"


def figure(result: dict[str, Any]) -> Any:
    """Cost of each window relative to the first, with the allowed band."""
    from hybrid_sleep.eval.plots import BLUE, GREEN, GREY, ORANGE, new_figure

    picture, axes = new_figure(f"Generating {result['windows']} windows: cost of each")
    numbers = range(1, result["windows"] + 1)
    styles = {
        "token": ("seconds per token, awake", BLUE, "o"),
        "total": ("seconds per token with its sleep", ORANGE, "^"),
        "cache": ("cache bytes", GREEN, "s"),
    }
    axes.axhspan(0, 100 * result["allowed"], color=GREY, alpha=0.12, linewidth=0)
    for name, (label, colour, marker) in styles.items():
        values = result["per_window"][name]
        axes.plot(
            numbers, [100 * value / values[0] for value in values], color=colour, marker=marker,
            markersize=4, linewidth=1.4, label=label,
        )  # fmt: skip
    axes.set_ylim(0, None)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
    axes.set_xlabel("window", fontsize=13)
    axes.set_ylabel("of the first window", fontsize=13)
    picture.legend(fontsize=11, frameon=False, loc="outside lower center", ncols=2)
    return picture
