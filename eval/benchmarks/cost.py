"""What a sleep costs, and how many later questions it must serve before it has paid for itself.

Three things are measured: a sleep by its depth; a token awake, before and after many windows have
been slept over, beside the same backbone that keeps all of its past in a KV cache; and, given a
model trained on Depo, many questions about one cycle, answered from saved fast weights.

What is compared is timed in turn, in rotating order, in one process.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from hybrid_sleep import SleepCache
from hybrid_sleep.eval import flops
from hybrid_sleep.eval.benchmarks.break_even import judge
from hybrid_sleep.eval.benchmarks.energy import find_meter, joules_of
from hybrid_sleep.eval.benchmarks.generation import synchronise
from hybrid_sleep.eval.benchmarks.keeping import KeepingCache, appended, keeper_of
from hybrid_sleep.eval.benchmarks.models import untrained
from hybrid_sleep.eval.benchmarks.questions import Questions
from hybrid_sleep.eval.depth import check_depths, read_run
from hybrid_sleep.eval.depth_report import run_record
from hybrid_sleep.kernels.benchmarks.timing import in_turn
from hybrid_sleep.sleep.weights import weights_digest
from hybrid_sleep.support.provenance import check_device, provenance
from hybrid_sleep.support.resume import Row, collect
from hybrid_sleep.training.weights import load_model
from hybrid_sleep.validation import check_count

# By kind of device: the untrained model that is measured unless a trained one is given.
SIZES: dict[str, Row] = {
    "cpu": {"state_space": "gated_deltanet", "hidden": 256, "layers": 4, "window": 128},
    "cuda": {
        "state_space": "gated_deltanet",
        "hidden": 1024,
        "layers": 24,
        "window": 2048,
        "head_dim": 128,
        "vocabulary": 32_768,
        "dtype": "bfloat16",
    },
}
Works = dict[str, Callable[[], Any]]

TOKENS = 64  # at most so many are timed one by one, from the middle of a window on
RATIOS = ("slept", "kept", "reserved")  # of a token to a fresh one; reserved: nothing is copied
# On a CPU one thread's processor time, which other work lengthens less than that of the wall.
CLOCK = {"cpu": "cpu_seconds", "cuda": "wall_seconds"}


def run(
    *,
    model: str | os.PathLike | None = None,
    sizes: Row | None = None,
    depo: str | os.PathLike | None = None,
    depths: Sequence[int] = (1, 2, 4, 8),
    windows: Sequence[int] = (1, 8, 64),
    question: int | None = None,
    answer: int | None = None,
    cycles: int = 50,
    repeats: int = 5,
    device: str = "cpu",
    minutes: float | None = None,
    out: Path | None = None,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure every row that `out` does not have; see `resume.collect` for `minutes` and `out`.

    model: a folder written by training; None for an untrained model of `sizes`, those of SIZES
        where they are not given. depo: such a folder of a model trained on Depo, for the questions
        about cycles; None leaves them out.
    depths: passes N of the sleeps. windows: how many lie in the past. question, answer: tokens of
        a question and of its answer, by default a quarter of the window each, together at most a
        window. cycles: at least 2. repeats: rounds in turn, at least 2.

    On a CPU one thread computes. Raises ValueError or FileNotFoundError for arguments that cannot
    be, before anything is measured.
    """
    kind = torch.device(check_device(device)).type
    depths = check_depths(depths)
    windows = sorted({check_count("windows", count) for count in windows})
    if not windows:
        raise ValueError("windows is empty; allowed: one or more integers of at least 1")
    check_count("cycles", cycles, 2)
    check_count("repeats", repeats, 2)
    if model is not None and sizes:
        raise ValueError(f"{', '.join(sizes)} given with model={os.fspath(model)!r}; allowed: one")
    sizes = {**SIZES[kind], **(sizes or {})}
    for name in ("hidden", "layers", "window"):
        check_count(name, sizes[name], 2)
    runs = {name: read_run(path) for name, path in (("model", model), ("depo", depo)) if path}
    threads = torch.get_num_threads()
    if kind == "cpu":
        torch.set_num_threads(1)
    try:
        asked = Questions(depo, runs["depo"], cycles, device, stopwatch(device)) if depo else None
        if model is None:
            subject = untrained(device=device, **sizes)
        else:
            subject = load_model(model, device).eval()
        if not subject.config.fast_weight_bytes:
            raise ValueError(f"model={model!r} has no state-space layer; allowed: one that has")
        window = subject.config.window
        question, answer = (
            max(1, window // 4) if count is None else check_count(name, count)
            for name, count in (("question", question), ("answer", answer))
        )
        if question + answer > window:
            raise ValueError(
                f"question={question} and answer={answer} are more than the window; allowed: "
                f"together at most {window}"
            )
        result = {
            "benchmark": "cost",
            "measured_on": kind,
            "clock": CLOCK[kind],
            "repeats": repeats,
            "question": question,
            "answer": answer,
            "model": {
                "name": "untrained" if model is None else run_record(model, runs["model"]),
                "dtype": str(subject.dtype).removeprefix("torch."),
                "parameters": flops.parameters(subject.config),
                "fast_weight_bytes": subject.config.fast_weight_bytes,
                "kv_bytes_per_token": flops.kv_bytes(subject.config, subject.dtype.itemsize),
                "config": subject.config.to_diff_dict(),
            },
            "depo": None if asked is None else {**run_record(depo, runs["depo"]), **asked.about()},
            "rows": [],
            "command": command,
            "provenance": provenance(device),
        }
        bench = Bench(subject, repeats, question, answer)
        result["energy"] = None if bench.meter is None else bench.meter.name
        rows = [*bench.rows(depths, windows), *(asked.rows(depths) if asked else ())]

        def measure(names: Row) -> Row:
            works = {"sleep": bench.sleep, "wake": bench.wake}
            return asked.measure(names) if names["what"] == "depo" else works[names["what"]](names)

        return collect(
            result, rows, measure, finish=judge, minutes=minutes, out=out, progress=progress
        )
    finally:
        torch.set_num_threads(threads)


def parse_windows(text: str) -> list[int]:
    """Counts of windows from text such as `1,8,64`; ValueError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"windows={text!r}; allowed: such as 1,8,64")
    return [int(part) for part in parts]


def stopwatch(device: Any) -> Callable[[], float]:
    """A clock in seconds: processor time on a CPU, the wall after all work is done elsewhere."""
    device = torch.device(device)
    if device.type == "cpu":
        return time.process_time

    def now() -> float:
        synchronise(device)
        return time.perf_counter()

    return now


def digest_of(model: Any) -> str:
    """Twelve hex digits that tell weights and config apart."""
    told = weights_digest(model) + model.config.to_json_string(use_diff=False)
    return hashlib.sha256(told.encode()).hexdigest()[:12]


class Bench:
    """Measures sleeps and tokens of one model, batch 1, on random tokens."""

    def __init__(self, model: Any, repeats: int, question: int, answer: int):
        self.model, self.repeats, self.question, self.answer = model, repeats, question, answer
        self.config, self.device = model.config, model.device
        self.now, self.meter = stopwatch(self.device), find_meter(self.device)
        self._drawn = torch.Generator().manual_seed(0)

    def rows(self, depths: Sequence[int], windows: Sequence[int]) -> list[Row]:
        """What each row is about: sleeps by depth, then tokens by windows slept over."""
        about = {"model": digest_of(self.model), "repeats": self.repeats}
        asked = {"depths": list(depths), "question": self.question, "answer": self.answer}
        return [
            *({"what": "sleep", **about, "passes": depth} for depth in depths if depth > 1),
            *({"what": "wake", **about, **asked, "windows": count} for count in windows),
        ]

    @torch.no_grad()
    def sleep(self, names: Row) -> Row:
        """A sleep over one full window, in turn with the forward that reads the window."""
        passes, tokens = names["passes"], self._tokens(self.config.window)
        before = self._past(tokens, passes)
        full = before.copy()
        self._next(self.model, full, tokens)
        works = {
            "read": lambda: self._next(self.model, before.copy(), tokens),
            "sleep": lambda: self.model.sleep(full.copy(), passes),
        }
        for work in [*works.values()] * 2:
            work()
        seconds = in_turn(works, self.repeats, 0.5, self._seconds)
        kept = int(full.kept)
        return {
            "seconds": seconds["sleep"],
            "read_seconds": seconds["read"],
            "flops": flops.sleep_flops(self.config, self.config.window, passes, past=kept),
            "read_flops": flops.pass_flops(self.config, self.config.window, past=kept)
            + flops.logit_flops(self.config),
            "joules": self._joules(works["sleep"]),
        }

    @torch.no_grad()
    def wake(self, names: Row) -> Row:
        """Tokens, questions and reading behind so many windows: slept over, or all kept."""
        window, past = self.config.window, names["windows"] * self.config.window
        depths, ids = names["depths"], self._tokens(past)
        keeper = keeper_of(self.model, past + window)
        slept, kept = self._past(ids, depths[-1]), self._keep(keeper, ids)
        reads = {str(depth): lambda depth=depth: self._past(ids, depth) for depth in depths}
        reads["kept"] = lambda: self._keep(keeper, ids)
        asked = self._tokens(self.question)
        asks = {
            "slept": lambda: self._next(self.model, slept.copy(), asked),
            "kept": lambda: self._next(keeper, kept.copy(), asked),
        }
        for work in (*reads.values(), *asks.values()):
            work()
        taken = in_turn(reads, self.repeats, 0, self._seconds)
        questions = in_turn(asks, self.repeats, 0, lambda ask: ask() or self._seconds(ask))
        starts = {
            "fresh": (self.model, SleepCache(self.config)),
            "slept": (self.model, slept),
            "kept": (keeper, kept),
        }
        rounds = [self._one_by_one(starts) for _ in range(self.repeats)]
        tokens = {name: [times[name] for times in rounds] for name in rounds[0]}
        full = slept.copy()
        self._next(self.model, full, self._tokens(window))
        return {
            "past": past,
            "seconds": {
                "token": {name: tokens[name] for name in starts},
                "copying": {"kept": tokens["copying"]},
                "read": {depth: taken[depth] for depth in map(str, depths)},
                "read_kept": taken["kept"],
                "ask": questions["slept"],
                "ask_kept": questions["kept"],
            },
            "ratio": {name: tokens[f"{name} to fresh"] for name in RATIOS},
            "flops": self._flops(past, depths, keeper.config),
            "joules": self._joules_of(reads, asks, starts),
            "bytes": {
                "saved": slept.nbytes(),
                "window": full.nbytes() - slept.nbytes(),
                "kept": kept.nbytes(),
            },
        }

    def _flops(self, past: int, depths: Sequence[int], keeping: Any) -> Row:
        config = self.config
        held = config.window - 1 if config.eviction == "sliding" else 0
        places = range(self.question, self.question + self.answer)
        return {
            "token": {
                "slept": fmean(flops.token_flops(config, held + place) for place in places),
                "kept": fmean(flops.token_flops(keeping, past + place) for place in places),
            },
            "read": {str(depth): flops.past_flops(config, past, depth) for depth in depths},
            "read_kept": flops.sequence_flops(keeping, past, 1, logits=1),
            "ask": flops.pass_flops(config, self.question, past=held) + flops.logit_flops(config),
            "ask_kept": flops.pass_flops(keeping, self.question, past=past)
            + flops.logit_flops(keeping),
        }

    def _one_by_one(self, starts: dict[str, tuple[Any, SleepCache]]) -> dict[str, float]:
        """Median seconds of a token each way, from the middle of a window on, and of the copying
        that appends to the kept cache; medians of the ratios, token by token, to a fresh one."""
        half = self.config.window // 2
        caches = {name: start.copy() for name, (_, start) in starts.items()}
        for name, (model, _) in starts.items():
            self._next(model, caches[name], self._tokens(half))
        seconds: dict[str, list[float]] = {name: [] for name in (*starts, "copying")}
        order = list(seconds)
        for token in self._tokens(min(TOKENS, self.config.window - half)).T:
            for name in order:
                # What ran before has filled the processor's caches: a first call is not timed.
                if name == "copying":
                    work = partial(appended, caches["kept"])
                    work()
                else:
                    model = starts[name][0]
                    self._next(model, caches[name].copy(), token[None])
                    work = partial(self._next, model, caches[name], token[None])
                seconds[name].append(self._seconds(work))
            order = order[1:] + order[:1]
        times = {name: median(taken) for name, taken in seconds.items()}
        pairs = zip(seconds["kept"], seconds["copying"], strict=True)
        seconds["reserved"] = [kept - copying for kept, copying in pairs]
        for name in RATIOS:
            pairs = zip(seconds[name], seconds["fresh"], strict=True)
            times[f"{name} to fresh"] = median(mine / fresh for mine, fresh in pairs)
        return times

    def _joules_of(
        self, reads: Works, asks: Works, starts: dict[str, tuple[Any, SleepCache]]
    ) -> Row | None:
        """As the seconds of a row about waking, one number each; None without a meter."""
        if self.meter is None:
            return None
        token, used = self._tokens(1), {}
        for name in ("slept", "kept"):
            model, cache = starts[name]
            used[name] = self._joules(lambda m=model, c=cache: self._next(m, c.copy(), token))
        return {
            "token": used,
            "read": {name: self._joules(work) for name, work in reads.items() if name != "kept"},
            "read_kept": self._joules(reads["kept"]),
            "ask": self._joules(asks["slept"]),
            "ask_kept": self._joules(asks["kept"]),
        }

    def _joules(self, work: Callable[[], Any]) -> float | None:
        return joules_of(self.meter, work, lambda: synchronise(self.device))

    def _seconds(self, work: Callable[[], Any]) -> float:
        began = self.now()
        work()
        return self.now() - began

    def _tokens(self, count: int) -> torch.Tensor:
        ids = torch.randint(self.config.vocab_size, (1, count), generator=self._drawn)
        return ids.to(self.device)

    def _past(self, ids: torch.Tensor, passes: int) -> SleepCache:
        """The memory of whole windows, all of them slept over."""
        cache = SleepCache(self.config)
        self.model(ids, cache=cache, sleep_passes=passes, logits_to_keep=1)
        self.model.sleep(cache, passes)
        return cache

    def _keep(self, keeper: Any, ids: torch.Tensor) -> KeepingCache:
        cache = KeepingCache(keeper.config)
        self._next(keeper, cache, ids)
        return cache

    @staticmethod
    def _next(model: Any, cache: SleepCache, ids: torch.Tensor) -> None:
        model(ids, cache=cache, logits_to_keep=1)
