"""What a sleep costs, and from how many later questions on it costs less than its alternatives.

Three things are measured: a sleep, by depth; one decoding step behind a past that was consolidated,
compared with the same backbone that keeps all of its past in a KV cache; and, given a model trained
on Depo, many questions about one cycle, answered from saved fast weights.

What is compared runs alternately, in rotating order, in one process.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median
from typing import Any, ClassVar, Literal

import torch

from hybrid_sleep import SleepCache
from hybrid_sleep.eval.costs.break_even import Price, Verdict, together
from hybrid_sleep.eval.costs.call import Call
from hybrid_sleep.eval.costs.keeping import appended, consolidated, keeper_of, kept_cache
from hybrid_sleep.eval.costs.models import untrained
from hybrid_sleep.eval.costs.questions import DepoModel, DepoRow, Questions
from hybrid_sleep.eval.costs.timing import CLOCK, stopwatch
from hybrid_sleep.eval.measure import flops
from hybrid_sleep.eval.measure.checkpoints import read_run
from hybrid_sleep.eval.measure.depth import run_record
from hybrid_sleep.eval.results import Result
from hybrid_sleep.eval.tasks.accuracy import check_depths
from hybrid_sleep.kernels.benchmarks.timing import interleaved
from hybrid_sleep.sleep.weights import weights_digest
from hybrid_sleep.training.weights import load_model
from hybrid_sleep.validation import check_count

Row = dict[str, Any]
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

TOKENS = 64  # at most so many are timed one by one, from the middle of a window on
RATIOS = ("slept", "kept", "reserved")  # of a token to a fresh one; reserved: nothing is copied


@dataclass(kw_only=True)
class Model:
    """The model that is measured; `run`: see `run_record`, None of an untrained one."""

    run: dict[str, Any] | None
    dtype: str
    parameters: int
    fast_weight_bytes: int
    kv_bytes_per_token: int
    config: dict[str, Any]


@dataclass(kw_only=True)
class SleepRow:
    """A sleep over one full window, and the forward pass over that window; seconds by round."""

    what: Literal["sleep"]
    model: str
    repeats: int
    passes: int
    seconds: list[float]
    read_seconds: list[float]
    flops: int
    read_flops: int


@dataclass(kw_only=True)
class Seconds:
    """Seconds by round. token: one decoding step, `fresh` with no past, `slept` behind fast
    weights, `kept` behind a whole KV cache; copying: of the last, what appending to it takes.

    read: prefill and sleeps of the past, by depth; ask: the forward pass over a question.
    """

    token: dict[str, list[float]]
    copying: list[float]
    read: dict[int, list[float]]
    read_kept: list[float]
    ask: list[float]
    ask_kept: list[float]


@dataclass(kw_only=True)
class Flops:
    """As `Seconds`, counted."""

    token: dict[str, float]
    read: dict[int, int]
    read_kept: int
    ask: int
    ask_kept: int


@dataclass(kw_only=True)
class DecodeRow:
    """Decoding, questions and prefill with so many windows in the past.

    ratio: by round, of a decoding step to one with no past. bytes: `saved` fast weights, what an
    open `window` adds to them, and the `kept` KV cache.
    """

    what: Literal["decode"]
    model: str
    repeats: int
    depths: list[int]
    question: int
    answer: int
    windows: int
    past: int
    seconds: Seconds
    ratio: dict[str, list[float]]
    flops: Flops
    bytes: dict[str, int]

    def prices(self, unit: str, depth: int) -> list[Price]:
        """What is paid in `flops`, or in `seconds` a round, with sleeps of `depth`.

        A question is one forward pass, and each token of its answer another. The time that goes
        into copying a kept cache to append to it is left out: a server need not copy.
        """
        answer = self.answer
        if unit == "flops":
            cost = self.flops
            ask = cost.ask + answer * cost.token["slept"]
            ask_kept = cost.ask_kept + answer * cost.token["kept"]
            return [Price(cost.read[depth], ask, cost.read_kept, ask_kept)]
        taken = self.seconds
        return [
            Price(
                once,
                ask + answer * slept,
                once_kept,
                ask_kept + answer * kept - (1 + answer) * copying,
            )
            for once, ask, slept, once_kept, ask_kept, kept, copying in zip(
                taken.read[depth],
                taken.ask,
                taken.token["slept"],
                taken.read_kept,
                taken.ask_kept,
                taken.token["kept"],
                taken.copying,
                strict=True,
            )
        ]

    def break_even(self, unit: str, depth: int, alternative: str) -> Verdict:
        """When sleeping costs less than an alternative, the verdicts of all rounds together."""
        return together([price.against(alternative) for price in self.prices(unit, depth)])


@dataclass(kw_only=True)
class Cost(Result):
    """Sleeps, decoding and, with `depo`, questions about its cycles."""

    benchmark: ClassVar[str] = "cost"
    measured_on: str
    clock: str
    repeats: int
    question: int
    answer: int
    model: Model
    depo: DepoModel | None
    rows: list[SleepRow | DecodeRow | DepoRow]

    def rows_of(self, kind: type) -> list[Any]:
        """Rows of one type."""
        return [row for row in self.rows if isinstance(row, kind)]


def run(
    call: Call,
    *,
    model: str | os.PathLike | None = None,
    sizes: Row | None = None,
    depo: str | os.PathLike | None = None,
    depths: Sequence[int] = (1, 2, 4, 8),
    windows: Sequence[int] = (1, 8, 64),
    question: int | None = None,
    answer: int | None = None,
    cycles: int = 50,
) -> Cost:
    """Measure every row.

    model: a folder written by training; None for an untrained model of `sizes`, those of SIZES
        where they are not given. depo: such a folder of a model trained on Depo, for the questions
        about cycles; None leaves them out.
    depths: passes N of the sleeps. windows: how many lie in the past. question, answer: tokens of
        a question and of its answer, by default a quarter of the window each, together at most a
        window. cycles: at least 2.

    On a CPU one thread computes. Raises ValueError or FileNotFoundError for arguments that cannot
    be, before anything is measured.
    """
    depths = check_depths(depths)
    windows = sorted({check_count("windows", count) for count in windows})
    if not windows:
        raise ValueError("windows must be one or more integers of at least 1, got none")
    check_count("cycles", cycles, 2)
    if model is not None and sizes:
        raise ValueError(
            f"{', '.join(sizes)} must be left out where a model is given, got {sizes!r}"
        )
    device, kind = call.device, call.kind
    sizes = {**SIZES[kind], **(sizes or {})}
    for name in ("hidden", "layers", "window"):
        check_count(name, sizes[name], 2)
    runs = {name: read_run(path) for name, path in (("model", model), ("depo", depo)) if path}
    threads = torch.get_num_threads()
    if kind == "cpu":
        torch.set_num_threads(1)
    try:
        questions = Questions(depo, runs["depo"], cycles, device) if depo else None
        if model is None:
            subject = untrained(device=device, **sizes)
        else:
            subject = load_model(model, device).eval()
        if not subject.config.fast_weight_bytes:
            raise ValueError(f"model must have a state-space layer, got {model!r}")
        window = subject.config.window
        question, answer = (
            max(1, window // 4) if count is None else check_count(name, count)
            for name, count in (("question", question), ("answer", answer))
        )
        if question + answer > window:
            raise ValueError(
                f"question and answer must be at most {window} tokens together, which is the "
                f"window, got {question} and {answer}"
            )
        bench = Bench(subject, call.repeats, question, answer)
        rows = [*bench.rows(depths, windows), *(questions.rows(depths) if questions else ())]
        works = {"sleep": bench.sleep, "decode": bench.decode}
        if questions:
            works["depo"] = questions.measure
        return call.measure(
            Cost,
            rows,
            lambda key: works[key["what"]](key),
            measured_on=kind,
            clock=CLOCK[kind],
            question=question,
            answer=answer,
            model={
                "run": None if model is None else run_record(model, runs["model"]),
                "dtype": str(subject.dtype).removeprefix("torch."),
                "parameters": flops.parameters(subject.config),
                "fast_weight_bytes": subject.config.fast_weight_bytes,
                "kv_bytes_per_token": flops.kv_bytes(subject.config, subject.dtype.itemsize),
                "config": subject.config.to_diff_dict(),
            },
            depo=questions and questions.about(),
        )
    finally:
        torch.set_num_threads(threads)


def digest_of(model: Any) -> str:
    """Twelve hex digits that tell weights and config apart."""
    told = weights_digest(model) + model.config.to_json_string(use_diff=False)
    return hashlib.sha256(told.encode()).hexdigest()[:12]


class Bench:
    """Measures sleeps and tokens of one model, batch 1, on random tokens."""

    def __init__(self, model: Any, repeats: int, question: int, answer: int):
        self.model, self.repeats, self.question, self.answer = model, repeats, question, answer
        self.config, self.device = model.config, model.device
        self.now = stopwatch(self.device)
        self._drawn = torch.Generator().manual_seed(0)

    def rows(self, depths: Sequence[int], windows: Sequence[int]) -> list[Row]:
        """What each row is about: sleeps by depth, then decoding by windows in the past."""
        about = {"model": digest_of(self.model), "repeats": self.repeats}
        tokens = {"depths": list(depths), "question": self.question, "answer": self.answer}
        return [
            *({"what": "sleep", **about, "passes": depth} for depth in depths if depth > 1),
            *({"what": "decode", **about, **tokens, "windows": count} for count in windows),
        ]

    @torch.no_grad()
    def sleep(self, key: Row) -> Row:
        """A sleep over one full window, alternating with the forward pass over that window."""
        passes, tokens = key["passes"], self._tokens(self.config.window)
        before = consolidated(self.model, tokens, passes)
        full = before.copy()
        self._next(self.model, full, tokens)
        works = {
            "read": lambda: self._next(self.model, before.copy(), tokens),
            "sleep": lambda: self.model.sleep(full.copy(), passes),
        }
        for work in [*works.values()] * 2:
            work()
        seconds = interleaved(works, self.repeats, 0.5, self._seconds)
        kept = int(full.kept)
        return {
            "seconds": seconds["sleep"],
            "read_seconds": seconds["read"],
            "flops": flops.sleep_flops(self.config, self.config.window, passes, past=kept),
            "read_flops": flops.pass_flops(self.config, self.config.window, past=kept)
            + flops.logit_flops(self.config),
        }

    @torch.no_grad()
    def decode(self, key: Row) -> Row:
        """Tokens, questions and prefill of so many windows: consolidated, or all kept."""
        window, past = self.config.window, key["windows"] * self.config.window
        depths, ids = key["depths"], self._tokens(past)
        keeper = keeper_of(self.model, past + window)
        slept, kept = consolidated(self.model, ids, depths[-1]), kept_cache(keeper, ids)
        reads: dict[str, Callable[[], Any]] = {
            str(depth): partial(consolidated, self.model, ids, depth) for depth in depths
        }
        reads["kept"] = lambda: kept_cache(keeper, ids)
        question = self._tokens(self.question)
        asks: dict[str, Callable[[], Any]] = {
            "slept": lambda: self._next(self.model, slept.copy(), question),
            "kept": lambda: self._next(keeper, kept.copy(), question),
        }
        for work in (*reads.values(), *asks.values()):
            work()
        taken = interleaved(reads, self.repeats, 0, self._seconds)
        questions = interleaved(asks, self.repeats, 0, lambda ask: ask() or self._seconds(ask))
        starts: dict[str, tuple[Any, SleepCache]] = {
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
                "copying": tokens["copying"],
                "read": {depth: taken[depth] for depth in map(str, depths)},
                "read_kept": taken["kept"],
                "ask": questions["slept"],
                "ask_kept": questions["kept"],
            },
            "ratio": {name: tokens[f"{name} to fresh"] for name in RATIOS},
            "flops": self._flops(past, depths, keeper.config),
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
        # What ran before has filled the processor's caches, so a first call is not timed: that of a
        # second cache, as copying this one would take it out of the buffers that it decodes over.
        twins = {name: cache.copy() for name, cache in caches.items()}
        seconds: dict[str, list[float]] = {name: [] for name in (*starts, "copying")}
        order = list(seconds)
        for token in self._tokens(min(TOKENS, self.config.window - half)).T:
            for name in order:
                work: Callable[[], Any]
                if name == "copying":
                    work = partial(appended, caches["kept"])
                    work()
                else:
                    model = starts[name][0]
                    self._next(model, twins[name], token[None])
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

    def _seconds(self, work: Callable[[], Any]) -> float:
        began = self.now()
        work()
        return self.now() - began

    def _tokens(self, count: int) -> torch.Tensor:
        ids = torch.randint(self.config.vocab_size, (1, count), generator=self._drawn)
        return ids.to(self.device)

    @staticmethod
    def _next(model: Any, cache: SleepCache, ids: torch.Tensor) -> None:
        model(ids, cache=cache, logits_to_keep=1)
