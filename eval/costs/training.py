"""What a training step costs: tokens/s and peak memory against depth, windows, recomputing.

A step is the forward pass with its loss and the backward pass; an optimizer's step costs the same
under every option and is left out. Each option is timed alternately with a step that keeps every
activation, and compared with it pair by pair.

Memory is what the allocator hands out: on a CPU every allocation and release of one step, as the
profiler records them, on a CUDA device the allocator's own peak. `peak_bytes` is the most that a
step holds above what was there before it (weights, batch); gradients count as far as they exist at
that moment. Their own bytes, needed in any case, are also given apart.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from typing import Any, ClassVar

import torch

from hybrid_sleep.eval.costs.call import Call
from hybrid_sleep.eval.costs.models import untrained
from hybrid_sleep.eval.costs.timing import CLOCK, Spread, synchronise
from hybrid_sleep.eval.results import Result
from hybrid_sleep.kernels.benchmarks.timing import interleaved

Row = dict[str, Any]
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
SETTING = (*SIZES["cpu"], *BASE["cpu"])


@dataclass(kw_only=True)
class TrainingRow:
    """One option at one setting.

    checkpointing, truncation: see `set_activation_checkpointing` and `set_truncation` of the model.
    peak_bytes, gradient_bytes, held_bytes: the most at any moment, of the gradients, and between
    forward and backward pass. time_ratio: to a step that keeps everything, None for that itself.
    All that was measured is None where the step was out of memory.
    """

    batch: int
    hidden: int
    layers: int
    head_dim: int
    vocabulary: int
    autocast: str | None
    window: int
    windows: int
    passes: int
    checkpointing: str | int | list[str | int] | None
    truncation: int | None
    out_of_memory: bool
    peak_bytes: int | None = None
    held_bytes: int | None = None
    gradient_bytes: int | None = None
    rounds: int | None = None
    wall_seconds: Spread | None = None
    cpu_seconds: Spread | None = None
    tokens_per_second: float | None = None
    time_ratio: Spread | None = None

    def at(self, setting: dict[str, int]) -> bool:
        """Whether the row was measured at `setting`."""
        return all(getattr(self, name) == value for name, value in setting.items())

    @property
    def keeps_everything(self) -> bool:
        """Whether no activation is recomputed and no gradient cut off."""
        return (self.checkpointing, self.truncation) == PLAIN


@dataclass(kw_only=True)
class TrainingCost(Result):
    """Training steps by option and setting, the base setting first.

    clock: of which seconds tokens/s and ratios are made, `cpu_seconds` or `wall_seconds`.
    """

    benchmark: ClassVar[str] = "training"
    measured_on: str
    clock: str
    repeats: int
    rows: list[TrainingRow]

    @property
    def base(self) -> dict[str, int]:
        """The setting that the first row has."""
        return {name: getattr(self.rows[0], name) for name in BASE["cpu"]}

    def memory_ratio(self, row: TrainingRow) -> float | None:
        """Peak of `row` to that of a step at its setting that keeps everything, if both fit."""
        setting = {name: getattr(row, name) for name in SETTING}
        plain = [x.peak_bytes for x in self.rows if x.keeps_everything and x.at(setting)]
        return row.peak_bytes / plain[0] if row.peak_bytes and plain and plain[0] else None

    @property
    def target_met_by(self) -> list[Any] | None:
        """Granularities of checkpointing that meet the target at its setting; None if unmeasured.

        Truncation changes what is learned, so that no truncated row meets it.
        """
        judged = [
            (row.checkpointing, memory, row.time_ratio.median)
            for row in self.rows
            if row.at(BASE[self.measured_on]) and row.truncation is None
            if row.time_ratio is not None and (memory := self.memory_ratio(row)) is not None
        ]
        if not judged:
            return None
        return [
            checkpointing
            for checkpointing, memory, time in judged
            if memory <= TARGET["memory"] and time <= TARGET["time"]
        ]


def planned_rows(kind: str) -> list[Row]:
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


def run(call: Call, *, rows: Sequence[Row] | None = None) -> TrainingCost:
    """Measure every row, in `call.repeats` pairs of timed steps.

    rows: as `planned_rows` gives them, all of them by default. A row that does not fit a CUDA
    device says `out_of_memory`. On a CPU one thread computes.
    """
    kind = call.kind
    threads = torch.get_num_threads()
    if kind == "cpu":
        torch.set_num_threads(1)
    try:
        bench = Bench(call.device, call.repeats)
        planned = planned_rows(kind) if rows is None else rows
        about = {"measured_on": kind, "clock": CLOCK[kind]}
        return call.measure(TrainingCost, planned, bench.measure, **about)
    finally:
        torch.set_num_threads(threads)


def _option(key: Row) -> tuple[Any, int | None]:
    return key["checkpointing"], key["truncation"]


def _setting(key: Row) -> tuple[Any, ...]:
    return tuple(key[name] for name in SETTING)


class Bench:
    """Measures rows on one device; the last model is kept for the rows that share it."""

    def __init__(self, device: Any, repeats: int):
        self.device, self.repeats = torch.device(device), repeats
        self._sizes: Any = None
        self._model: Any = None
        self._too_much: set[tuple[Any, ...]] = set()

    def measure(self, key: Row) -> Row:
        """The measurements of one row."""
        self._prepare(key)
        step = Step(self._model, key)
        memory = self._fits(lambda: step.memory(key))
        if memory is None:
            if _option(key) == PLAIN:
                self._too_much.add(_setting(key))
            return {"out_of_memory": True, "peak_bytes": None, "time_ratio": None}
        ways = {"row": key}
        if _option(key) != PLAIN and _setting(key) not in self._too_much:
            ways["plain"] = {**key, **dict(zip(ABOUT, PLAIN, strict=True))}
        seconds = self._fits(lambda: self._rounds(step, ways))
        if seconds is None and len(ways) > 1:
            self._too_much.add(_setting(key))
            seconds = self._fits(lambda: self._rounds(step, {"row": key}))
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
                name: vars(Spread.of([taken[name] for taken in seconds["row"]]))
                for name in seconds["row"][0]
            },
            "tokens_per_second": step.tokens / median(taken[clock] for taken in seconds["row"]),
            "time_ratio": vars(Spread.of(ratios)) if ratios else None,
        }

    def _prepare(self, key: Row) -> None:
        sizes = {name: key[name] for name in ("hidden", "layers", "head_dim", "vocabulary")}
        sizes["window"] = key["window"]
        if self._sizes == sizes:
            return
        self._model, self._sizes = None, sizes
        kinds = ["linear_attention"] * 3 + ["full_attention"]
        types = [kinds[i % 4] for i in range(sizes["layers"])]
        model = untrained("gated_deltanet", device=self.device, layer_types=types, **sizes)
        model.config.sleep_schedule = "every_window"
        self._model = model.train()

    def _rounds(self, step: Step, ways: dict[str, Row]) -> dict[str, list[Any]]:
        """Seconds of each way, round by round; measuring memory has warmed them up."""
        works = {name: lambda key=key: step.seconds(key) for name, key in ways.items()}
        return interleaved(works, self.repeats, 0, lambda work: work())

    def _fits(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, or None if the device has no room for it."""
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

    def __init__(self, model: Any, key: Row):
        shape = (key["batch"], key["windows"] * key["window"])
        drawn = torch.Generator().manual_seed(0)
        ids = torch.randint(key["vocabulary"], shape, generator=drawn)
        self.model, self.ids, self.tokens = model, ids.to(model.device), ids.numel()

    def _forward(self, key: Row) -> Any:
        dtype = key["autocast"]
        with torch.autocast(
            self.ids.device.type,
            None if dtype is None else getattr(torch, dtype),
            enabled=dtype is not None,
        ):
            return self.model(
                input_ids=self.ids,
                labels=self.ids,
                sleep_passes=key["passes"],
                use_cache=False,
            ).loss

    def _begin(self, key: Row) -> None:
        checkpointing = key["checkpointing"]
        self.model.set_activation_checkpointing(checkpointing)
        self.model.set_truncation(passes=key["truncation"])
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        synchronise(self.ids.device)

    def seconds(self, key: Row) -> dict[str, float]:
        """Elapsed seconds of one step, and seconds of this process's processor time."""
        self._begin(key)
        wall, processor = time.perf_counter(), time.process_time()
        self._forward(key).backward()
        synchronise(self.ids.device)
        return {
            "wall_seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - processor,
        }

    def memory(self, key: Row) -> dict[str, int]:
        """`memory_of` a step, without `left_bytes`, and the bytes of the gradients."""
        self._begin(key)
        found = memory_of(lambda: self._forward(key), self.ids.device)
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
