"""Depo with one question at a time: the model prefills a cycle and sleeps once, its fast weights
are saved, and each question is answered from a copy of them.

Each question is also answered without anything saved, by one forward pass over cycle and question,
at the same depth (which must give the same answers) and at N = 1; and with the whole KV cache of
the cycle (whose answers are not scored: the weights were not trained for it).
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal, NamedTuple

import torch

from hybrid_sleep import SleepCache
from hybrid_sleep.eval.costs.break_even import Verdict, break_even, together
from hybrid_sleep.eval.costs.keeping import consolidated, keeper_of, kept_cache
from hybrid_sleep.eval.costs.timing import Spread, stopwatch
from hybrid_sleep.eval.measure import flops
from hybrid_sleep.eval.measure.depth import run_record
from hybrid_sleep.eval.measure.statistics import over_seeds
from hybrid_sleep.eval.tasks.depo import Depo
from hybrid_sleep.sleep.weights import weights_digest
from hybrid_sleep.training.weights import load_model

Row = dict[str, Any]
WAYS = ("saved", "kept", "recomputed", "recomputed_n1")
SEED = 0  # of the test cycles
FILES = 5  # rounds of saving and loading a cache


@dataclass(kw_only=True)
class DepoModel:
    """The model that was trained on Depo, its task, and the floor: nodes known, order unknown."""

    run: dict[str, Any]
    task: dict[str, Any]
    cycle_tokens: int
    floor: float
    cycles: int
    parameters: int
    fast_weight_bytes: int
    kv_bytes_per_token: int


@dataclass(kw_only=True)
class DepoFlops:
    """FLOPs that are paid `once` (`saved`, `kept`), and the mean of a question, by way."""

    once: dict[str, float]
    each: dict[str, float]

    def break_even(self, way: str) -> Verdict:
        """When answers from saved fast weights cost less than those of another way."""
        return break_evens([self.once], [self.each])[way]


@dataclass(kw_only=True)
class File:
    """A cache on disk: its size, and elapsed seconds to write and to load it."""

    bytes: int
    save_seconds: float
    load_seconds: float


@dataclass(kw_only=True)
class DepoRow:
    """All questions about every cycle at one depth, answered from saved fast weights.

    interval: of the accuracy, 95 %. identical: answers that are those of one forward pass;
    logit_difference: the most that logits of the two differ by. once_seconds: prefill and sleeps;
    seconds: a question; each by way, over the cycles. break_even: all cycles together, by way.
    """

    what: Literal["depo"]
    depo: str
    cycles: int
    passes: int
    questions: int
    accuracy: float
    interval: list[float]
    by_hops: dict[int, float]
    identical: int
    logit_difference: float
    once_seconds: dict[str, Spread]
    seconds: dict[str, Spread]
    break_even: dict[str, Verdict]
    flops: DepoFlops
    bytes: dict[str, int]
    file: File


class Question(NamedTuple):
    """`hops` steps from a node: tokens up to the answer, and tokens of the answer."""

    hops: int
    tokens: list[int]
    answer: list[int]


def questions_of(task: Depo, edges: Sequence[tuple[Any, Any]]) -> list[Question]:
    """Every start and every number of steps that the test split asks about one cycle."""
    follows, found = dict(edges), []
    for start in follows:
        for hops in task.test_hops:
            node = start
            for _ in range(hops):
                node = follows[node]
            tokens = [task.asked + hops, *start, task.answer]
            found.append(Question(hops, tokens, list(node)))
    return found


class Questions:
    """Questions for one model; raises ValueError if it was trained on another task."""

    def __init__(self, checkpoint: str | os.PathLike, run: Any, cycles: int, device: Any):
        self.task = run.load_task()
        if not isinstance(self.task, Depo):
            raise ValueError(
                f"depo must be a model trained on depo, got {os.fspath(checkpoint)!r}, which was "
                f"trained on {self.task.name}"
            )
        self.run, self.cycles, self.now = run_record(checkpoint, run), cycles, stopwatch(device)
        self.model = load_model(checkpoint, device).eval()
        self.keeper: Any = keeper_of(self.model, self.task.length)

    def about(self) -> Row:
        """The fields of `DepoModel`."""
        config = self.model.config
        return {
            "run": self.run,
            "task": {"name": self.task.name, **self.task.params},
            "cycle_tokens": self.task.context,
            "floor": self.task.chance(),
            "cycles": self.cycles,
            "parameters": flops.parameters(config),
            "fast_weight_bytes": config.fast_weight_bytes,
            "kv_bytes_per_token": flops.kv_bytes(config),
        }

    def rows(self, depths: Sequence[int]) -> list[Row]:
        """One row a depth."""
        about = {"depo": weights_digest(self.model)[:12], "cycles": self.cycles}
        return [{"what": "depo", **about, "passes": depth} for depth in depths]

    @torch.no_grad()
    def measure(self, key: Row) -> Row:
        """All questions about every cycle at one depth."""
        passes = key["passes"]
        ids = self.task.batch("test", SEED, self.cycles)["input_ids"]
        self._cycle(ids[0], passes)
        found = [self._cycle(row, passes) for row in ids]
        questions = [question for cycle in found for question in cycle["questions"]]
        right = [answer for cycle in found for answer in cycle["right"]]
        shares = [fmean(cycle["right"]) for cycle in found]
        return {
            "questions": len(right),
            "accuracy": fmean(shares),
            # Questions about one cycle are not independent; cycles are.
            "interval": over_seeds(shares),
            "by_hops": {
                str(hops): fmean(r for r, q in zip(right, questions, strict=True) if q.hops == hops)
                for hops in self.task.test_hops
            },
            "identical": sum(sum(cycle["identical"]) for cycle in found),
            "logit_difference": max(cycle["difference"] for cycle in found),
            "once_seconds": _over(found, "once"),
            "seconds": _over(found, "each"),
            "break_even": {
                way: asdict(verdict)
                for way, verdict in break_evens(
                    [cycle["once"] for cycle in found], [cycle["each"] for cycle in found]
                ).items()
            },
            "flops": self._flops(passes, questions),
            "bytes": found[0]["bytes"],
            "file": self._file(ids[0], passes),
        }

    def _cycle(self, row: torch.Tensor, passes: int) -> dict[str, Any]:
        """One cycle: what its prefill cost, and each of its questions in every way."""
        context = row[None, : self.task.context].to(self.model.device)
        questions = questions_of(self.task, self.task.parse(row.tolist())["edges"])
        once, saved = self._timed(lambda: consolidated(self.model, context, passes))
        once_kept, kept = self._timed(lambda: kept_cache(self.keeper, context))
        right, identical, difference = [], [], 0.0
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        for number, question in enumerate(questions):
            # Later letters of an answer are predicted with the earlier ones given.
            tokens = torch.tensor([question.tokens + question.answer[:-1]], device=context.device)
            whole = torch.cat((context, tokens), dim=1)
            count = len(question.answer)
            ways = {
                "saved": partial(_ask, self.model, tokens, count, saved),
                "kept": partial(_ask, self.keeper, tokens, count, kept),
                "recomputed": partial(_ask, self.model, whole, count, passes=passes),
                "recomputed_n1": partial(_ask, self.model, whole, count, passes=1),
            }
            logits, turn = {}, number % len(WAYS)
            for name in WAYS[turn:] + WAYS[:turn]:
                taken, logits[name] = self._timed(ways[name])
                seconds[name].append(taken)
            given, again = logits["saved"], logits["recomputed"]
            right.append(given.argmax(-1).tolist() == question.answer)
            identical.append(torch.equal(given.argmax(-1), again.argmax(-1)))
            difference = max(difference, (given - again).abs().max().item())
        return {
            "questions": questions,
            "right": right,
            "identical": identical,
            "difference": difference,
            "once": {"saved": once, "kept": once_kept},
            "each": {name: median(taken) for name, taken in seconds.items()},
            "bytes": {"saved": saved.nbytes(), "kept": kept.nbytes()},
        }

    def _flops(self, passes: int, questions: Sequence[Question]) -> Row:
        """The fields of `DepoFlops`, the mean over all questions."""
        config, keeping, context = self.model.config, self.keeper.config, self.task.context
        held = config.window - 1 if config.eviction == "sliding" else 0
        each: dict[str, list[int]] = {name: [] for name in WAYS}
        for question in questions:
            count = len(question.answer)
            tokens = len(question.tokens) + count - 1
            logits = flops.logit_flops(config, count)
            each["saved"].append(flops.pass_flops(config, tokens, past=held) + logits)
            each["kept"].append(flops.pass_flops(keeping, tokens, past=context) + logits)
            for name, depth in (("recomputed", passes), ("recomputed_n1", 1)):
                whole = context + tokens
                each[name].append(flops.sequence_flops(config, whole, depth, logits=count))
        once = {
            "saved": flops.past_flops(config, context, passes),
            "kept": flops.sequence_flops(keeping, context, 1, logits=1),
        }
        means = {name: fmean(counts) for name, counts in each.items()}
        return {"once": once, "each": means}

    def _file(self, row: torch.Tensor, passes: int) -> Row:
        """The fields of `File`."""
        context = row[None, : self.task.context].to(self.model.device)
        cache = consolidated(self.model, context, passes)
        writing, loading = [], []
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(FILES):
                began = time.perf_counter()
                cache.save_pretrained(folder)
                between = time.perf_counter()
                SleepCache.from_pretrained(folder, model=self.model)
                writing.append(between - began)
                loading.append(time.perf_counter() - between)
            size = sum(path.stat().st_size for path in Path(folder).iterdir())
        return {"bytes": size, "save_seconds": median(writing), "load_seconds": median(loading)}

    def _timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        began = self.now()
        made = work()
        return self.now() - began, made


def _ask(
    model: Any,
    ids: torch.Tensor,
    count: int,
    cache: SleepCache | None = None,
    passes: int | None = None,
) -> torch.Tensor:
    """The last `count` logits behind `ids`, from a copy of `cache`, which stays as it is."""
    cache = None if cache is None else cache.copy()
    how = {"cache": cache, "sleep_passes": passes, "logits_to_keep": count}
    return model(ids, **how).logits[0]


def break_evens(
    once: Sequence[dict[str, float]], each: Sequence[dict[str, float]]
) -> dict[str, Verdict]:
    """When answers from saved fast weights cost less than those of every other way.

    once: what the prefill of each cycle cost, `saved` and `kept`; each: what a question about it
    cost. The verdicts of all cycles `together`.
    """
    verdicts: dict[str, list[Verdict]] = {way: [] for way in WAYS[1:]}
    for first, later in zip(once, each, strict=True):
        for way, found in verdicts.items():
            invested = first["saved"] - (first["kept"] if way == "kept" else 0)
            found.append(break_even(invested, later[way] - later["saved"]))
    return {way: together(found) for way, found in verdicts.items()}


def _over(found: Sequence[dict[str, Any]], what: str) -> dict[str, Any]:
    """Median and quartiles over the cycles, by way."""
    return {
        way: vars(Spread.of([cycle[what][way] for cycle in found])) for way in found[0][what]
    }
