"""What a training step costs: tokens/s and peak memory against depth, windows, recomputing.

A step is the forward with its loss and the backward; an optimizer's step costs the same under every
option and is left out. Each option is timed in turn with a step that keeps every activation, in
alternating order, and compared with it pair by pair.

Memory is what the allocator hands out: on a CPU every allocation and release of one step, as the
profiler records them, on a CUDA device the allocator's own peak. `peak_bytes` is the most that a
step holds above what lay there before it (weights, batch); gradients count as far as they exist at
that moment. Their own bytes, needed in any case, are also given apart.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from hybrid_sleep.eval.benchmarks.generation import synchronise
from hybrid_sleep.eval.benchmarks.models import untrained
from hybrid_sleep.kernels.benchmarks.timing import spread
from hybrid_sleep.support.provenance import check_device, provenance
from hybrid_sleep.support.resume import Row, collect
from hybrid_sleep.validation import check_count

# By kind of device: a model of which it is representative, and the batch that it trains on.
SIZES: dict[str, Row] = {
    "cpu": {
        "batch": 4,
        "hidden": 256,
        "layers": 4,
        "head_dim": 32,
        "vocabulary": 256,
        "autocast": None,
    },
    "cuda": {
        "batch": 1,
        "hidden": 1024,
        "layers": 24,
        "head_dim": 128,
        "vocabulary": 32_768,
        "autocast": "bfloat16",
    },
}
# The window, how many windows, how many passes; what is varied around them.
BASE: dict[str, Row] = {
    "cpu": {"window": 128, "windows": 8, "passes": 4},
    "cuda": {"window": 2048, "windows": 8, "passes": 4},
}
VARIED: dict[str, dict[str, Sequence[int]]] = {
    "cpu": {"passes": (1, 2), "windows": (4,), "window": (64,)},
    "cuda": {"passes": (1, 2, 6, 8), "windows": (4, 6), "window": (512, 1024)},
}
# (activation checkpointing, passes that gradients flow back through), as the model takes them.
PLAIN = (None, None)
OPTIONS: dict[str, tuple[tuple[Any, int | None], ...]] = {
    "cpu": (
        PLAIN,
        ("block", None),
        (2, None),
        ("pass", None),
        ("window", None),
        (["window", "pass"], None),
        (["window", "block"], None),
        (None, 2),
        ("pass", 2),
    ),
    "cuda": (
        PLAIN,
        ("block", None),
        (2, None),
        (4, None),
        (8, None),
        ("pass", None),
        ("window", None),
        (["window", "pass"], None),
        (["window", 4], None),
        (["window", "block"], None),
        (None, 2),
        (None, 1),
        (4, 2),
    ),
}
# Those that the other settings are measured with.
ELSEWHERE = {"cpu": (PLAIN, ("pass", None)), "cuda": OPTIONS["cuda"]}
# Of a step that keeps everything, at the base setting.
TARGET = {"memory": 0.1, "time": 1.4}
ABOUT = ("checkpointing", "truncation")
# Of which clock the ratio of times is: other work on a CPU lengthens the time on the wall.
CLOCK = {"cpu": "cpu_seconds", "cuda": "wall_seconds"}


def wanted_rows(kind: str) -> list[Row]:
    """What each row is about on a "cpu" or "cuda" device, the ones with the target first."""
    base = BASE[kind]
    settings = [(base, OPTIONS[kind])]
    for name, values in VARIED[kind].items():
        settings += [({**base, name: value}, ELSEWHERE[kind]) for value in values]
    return [
        {**SIZES[kind], **setting, "checkpointing": checkpointing, "truncation": truncation}
        for setting, options in settings
        for checkpointing, truncation in options
        if truncation is None or truncation < setting["passes"]
    ]


def run(
    *,
    rows: Sequence[Row] | None = None,
    repeats: int = 5,
    device: str = "cpu",
    minutes: float | None = None,
    out: Path | None = None,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure every row that `out` does not have; see `resume.collect` for `minutes` and `out`.

    rows: as `wanted_rows` gives them, all of them by default. repeats: pairs of timed steps a row,
    at least 2. A row that does not fit a CUDA device says `out_of_memory`. On a CPU one thread
    computes, and ratios are of the processor's time.
    """
    import torch

    kind = torch.device(check_device(device)).type
    check_count("repeats", repeats, 2)
    threads = torch.get_num_threads()
    if kind == "cpu":
        torch.set_num_threads(1)
    try:
        result = {
            "benchmark": "training",
            "measured_on": kind,
            "clock": CLOCK[kind],
            "repeats": repeats,
            "rows": [],
            "command": command,
            "provenance": provenance(device),
        }
        bench = Bench(device, repeats)
        wanted = wanted_rows(kind) if rows is None else rows
        return collect(
            result, wanted, bench.measure, finish=judge,
            minutes=minutes, out=out, progress=progress,
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)


def judge(result: dict[str, Any]) -> None:
    """Set each row's `memory_ratio` to its setting's plain row, and `target` where it applies.

    `memory_ratio` is None where the plain row is missing or did not fit. Truncation changes what is
    learned, so that no truncated row meets the target.
    """
    plain = {_setting(row): row for row in result["rows"] if _option(row) == PLAIN}
    for row in result["rows"]:
        whole = plain.get(_setting(row), {}).get("peak_bytes")
        row["memory_ratio"] = row["peak_bytes"] / whole if whole and row["peak_bytes"] else None
    result.pop("target", None)
    base = BASE[result["measured_on"]]
    judged = [
        row
        for row in result["rows"]
        if all(row[name] == value for name, value in base.items())
        and row["truncation"] is None
        and row["memory_ratio"] is not None
        and row["time_ratio"] is not None
    ]
    if judged:
        met = [
            row["checkpointing"]
            for row in judged
            if row["memory_ratio"] <= TARGET["memory"]
            and row["time_ratio"]["median"] <= TARGET["time"]
        ]
        result["target"] = {**base, **TARGET, "met_by": met}


def _option(row: Row) -> tuple[Any, int | None]:
    return row["checkpointing"], row["truncation"]


def _setting(row: Row) -> tuple[Any, ...]:
    names = (*SIZES["cpu"], *BASE["cpu"])
    return tuple(row[name] for name in names)


class Bench:
    """Measures rows on one device; the last model is kept for the rows that share it."""

    def __init__(self, device: Any, repeats: int):
        import torch

        self.device, self.repeats = torch.device(device), repeats
        self._key: Any = None
        self._model: Any = None
        self._too_much: set[tuple[Any, ...]] = set()

    def measure(self, names: Row) -> Row:
        """The measurements of one row."""
        self._prepare(names)
        step = Step(self._model, names)
        memory = self._fits(lambda: step.memory(names))
        if memory is None:
            if _option(names) == PLAIN:
                self._too_much.add(_setting(names))
            return {"out_of_memory": True, "peak_bytes": None, "time_ratio": None}
        ways = {"row": names}
        if _option(names) != PLAIN and _setting(names) not in self._too_much:
            ways["plain"] = {**names, **dict(zip(ABOUT, PLAIN, strict=True))}
        seconds = self._fits(lambda: self._rounds(step, ways))
        if seconds is None and len(ways) > 1:
            self._too_much.add(_setting(names))
            seconds = self._fits(lambda: self._rounds(step, {"row": names}))
        if seconds is None:
            return {"out_of_memory": True, "peak_bytes": None, "time_ratio": None}
        clock = CLOCK[self.device.type]
        ratios = [
            mine[clock] / plain[clock]
            for mine, plain in zip(seconds["row"], seconds.get("plain", ()), strict=False)
        ]
        return {
            "out_of_memory": False,
            **memory,
            "rounds": len(seconds["row"]),
            **{
                name: _spread([taken[name] for taken in seconds["row"]])
                for name in seconds["row"][0]
            },
            "tokens_per_second": step.tokens / median(taken[clock] for taken in seconds["row"]),
            "time_ratio": _spread(ratios) if ratios else None,
        }

    def _prepare(self, names: Row) -> None:
        sizes = {name: names[name] for name in ("hidden", "layers", "head_dim", "vocabulary")}
        sizes["window"] = names["window"]
        if self._key == sizes:
            return
        self._model, self._key = None, sizes
        kinds = ["linear_attention"] * 3 + ["full_attention"]
        types = [kinds[i % 4] for i in range(sizes["layers"])]
        model = untrained("gated_deltanet", device=self.device, layer_types=types, **sizes)
        model.config.sleep_schedule = "every_window"
        self._model = model.train()

    def _rounds(self, step: Step, ways: dict[str, Row]) -> dict[str, list[dict[str, float]]]:
        """Seconds of each way, round by round; measuring memory has warmed them up."""
        order = list(ways)
        seconds: dict[str, list[dict[str, float]]] = {name: [] for name in order}
        for number in range(self.repeats):
            for name in reversed(order) if number % 2 else order:
                seconds[name].append(step.seconds(ways[name]))
        return seconds

    def _fits(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, or None if the device has no room for it."""
        import torch

        try:
            return work()
        except torch.OutOfMemoryError:
            pass
        # Only here has the error let go of the frames that hold what there is no room for.
        self._model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        return None


class Step:
    """One training step of `model` on a fixed batch: forward, loss, backward."""

    def __init__(self, model: Any, names: Row):
        import torch

        shape = (names["batch"], names["windows"] * names["window"])
        drawn = torch.Generator().manual_seed(0)
        ids = torch.randint(names["vocabulary"], shape, generator=drawn)
        self.model, self.ids, self.tokens = model, ids.to(model.device), ids.numel()

    def _forward(self, names: Row) -> Any:
        import torch

        dtype = names["autocast"]
        with torch.autocast(
            self.ids.device.type,
            None if dtype is None else getattr(torch, dtype),
            enabled=dtype is not None,
        ):
            return self.model(
                input_ids=self.ids,
                labels=self.ids,
                sleep_passes=names["passes"],
                use_cache=False,
            ).loss

    def _begin(self, names: Row) -> None:
        checkpointing = names["checkpointing"]
        self.model.set_activation_checkpointing(checkpointing)
        self.model.set_truncation(passes=names["truncation"])
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        synchronise(self.ids.device)

    def seconds(self, names: Row) -> dict[str, float]:
        """Seconds of one step, on the wall and of this process's processor time."""
        self._begin(names)
        wall, processor = time.perf_counter(), time.process_time()
        self._forward(names).backward()
        synchronise(self.ids.device)
        return {
            "wall_seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - processor,
        }

    def memory(self, names: Row) -> dict[str, int]:
        """`memory_of` a step, without `left_bytes`, and the bytes of the gradients."""
        self._begin(names)
        found = memory_of(lambda: self._forward(names), self.ids.device)
        del found["left_bytes"]
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.model.zero_grad(set_to_none=True)
        return {**found, "gradient_bytes": sum(x.nbytes for x in gradients)}


def memory_of(forward: Callable[[], Any], device: Any) -> dict[str, int]:
    """Bytes above what was there before, for `forward()`, which returns a loss, and its backward.

    peak_bytes: the most at any moment; held_bytes: between forward and backward;
    left_bytes: after both, when the loss is gone.
    """
    if device.type == "cuda":
        return _memory_on_cuda(forward, device)
    # Kineto announces every start and stop on stderr otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.autograd.profiler import profile, record_function

    between = "hybrid_sleep: between forward and backward"
    with profile(profile_memory=True) as trace:
        loss = forward()
        with record_function(between):
            pass
        loss.backward()
        del loss
    events = [e for e in trace.kineto_results.events() if e.name() in ("[memory]", between)]
    events.sort(key=lambda event: event.start_ns())
    names = [event.name() for event in events]
    held = list(accumulate(event.nbytes() for event in events))
    return {
        "peak_bytes": max(held),
        "held_bytes": held[names.index(between)],
        "left_bytes": held[-1],
    }


def _memory_on_cuda(forward: Callable[[], Any], device: Any) -> dict[str, int]:
    import torch

    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    loss = forward()
    held = torch.cuda.memory_allocated(device)
    loss.backward()
    del loss
    torch.cuda.synchronize(device)
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device) - before,
        "held_bytes": held - before,
        "left_bytes": torch.cuda.memory_allocated(device) - before,
    }


def _spread(values: list[float]) -> dict[str, Any]:
    middle, quartiles = spread(values)
    return {"median": middle, "quartiles": quartiles}
