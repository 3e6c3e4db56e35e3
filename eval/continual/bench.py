"""The benchmark of continual learning: every method learns the same tasks in the same order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from hybrid_sleep.eval.continual.methods import METHODS, Training
from hybrid_sleep.eval.continual.metrics import Scores
from hybrid_sleep.eval.continual.stream import TaskStream
from hybrid_sleep.eval.results import AnswersRow, Result
from hybrid_sleep.support.provenance import provenance
from hybrid_sleep.support.resume import Row, collect
from hybrid_sleep.training.loop import StepRecord
from hybrid_sleep.validation import check_choice, check_count

# How often all tasks are measured while one is learned, in each task's training.
LOOKS = 8


@dataclass(frozen=True, kw_only=True)
class ContinualRow(AnswersRow):
    """One method on one seed.

    stream, stream_settings: what was learned, see `TaskStream`. settings: of training. matrix:
    accuracy on every task, before any was learned and after each. during: for each task that was
    learned, accuracy on all of them on the way. apart: what else was measured before any task and
    after each, see `TaskStream.apart`. tokens: trained on.
    """

    method: str
    seed: int
    stream: str
    stream_settings: dict[str, Any]
    settings: dict[str, Any]
    matrix: list[list[float]]
    during: list[list[list[float]]]
    apart: list[dict[str, float | None]]
    floors: list[float]
    tokens: int
    seconds: float

    @property
    def scores(self) -> Scores:
        """The matrix with all that follows from it."""
        return Scores.of(self.matrix)

    @property
    def later(self) -> list[list[float]]:
        """Of each task, what it scored while later ones were learned."""
        return [
            [at[j] for seen in self.during[j + 1 :] for at in seen]
            for j in range(len(self.during))
        ]


@dataclass(kw_only=True)
class ContinualResult(Result):
    """All methods on all seeds; of the stream what a table says of it, see `TaskStream`."""

    benchmark: ClassVar[str] = "continual"
    stream: str
    tasks: list[str]
    measured: str
    about: str
    rows: list[ContinualRow]

    def of(self, method: str) -> list[ContinualRow]:
        """The rows of a method."""
        return [row for row in self.rows if row.method == method]


def backbone(vocab_size: int, length: int) -> dict[str, Any]:
    """Fields of the config of the model that learns: a state-space layer and an attention."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        # Room for the examples of the method that learns nothing.
        "window": 8 * length,
    }


def new_model(stream: TaskStream, seed: int) -> Any:
    """A model of ours, randomly initialised by `seed`."""
    from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fields = backbone(stream.vocab_size, stream.length)
        return HybridSleepForCausalLM(HybridSleepConfig(**fields)).eval()


def run(
    stream: TaskStream,
    *,
    methods: Sequence[str] = tuple(METHODS),
    seeds: Sequence[int] = (0, 1, 2),
    training: Training | None = None,
    jobs: int = 1,
    minutes: float | None = None,
    out: Path | None = None,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ContinualResult:
    """Learn the tasks of `stream` in order by every one of `methods`, from models of all `seeds`.

    A later call with the same `out` goes on. Other arguments as in `resume.collect`. Raises
    ValueError for numbers or methods that cannot be, and for a stream of less than 2 tasks.
    """
    if len(stream.tasks) < 2:
        raise ValueError(f"stream must be of at least 2 tasks, got {stream.tasks}")
    for method in methods:
        check_choice("methods", method, tuple(METHODS))
    for seed in seeds:
        check_count("seeds", seed, minimum=0)
    training, settings = training or Training(), stream.settings
    planned = [
        {
            "method": method,
            "seed": seed,
            "stream": stream.name,
            "stream_settings": settings,
            "settings": asdict(training),
        }
        for seed in seeds
        for method in methods
    ]
    header = ContinualResult(
        stream=stream.name,
        tasks=stream.tasks,
        measured=stream.measured,
        about=stream.about,
        rows=[],
        command=command,
        provenance=provenance("cpu"),
    )
    content = collect(
        header.content(), planned, partial(measure_row, stream=stream), jobs=jobs,
        minutes=minutes, out=out, anywhere=True, progress=progress,
    )  # fmt: skip
    return ContinualResult.from_content(content)


def measure_row(key: Row, stream: TaskStream) -> Row:
    """What a `ContinualRow` of `stream` says beside its key."""
    began = time.perf_counter()
    training = Training(**key["settings"])
    method = METHODS[key["method"]](
        new_model(stream, key["seed"]), stream, training, key["seed"]
    )
    tasks = range(len(stream.tasks))

    def measured() -> list[float]:
        return [stream.accuracy(method.model, i, context=method.context(i)) for i in tasks]

    matrix, during = [measured()], []
    apart = [stream.apart(method.model, 0, method.context)]
    for task in tasks:
        seen: list[list[float]] = []

        def look(step: StepRecord, seen: list[list[float]] = seen) -> None:
            if (step.step + 1) % max(1, training.steps // LOOKS) == 0:
                seen.append(measured())

        method.learn(task, look)
        during.append(seen)
        matrix.append(measured())
        apart.append(stream.apart(method.model, task + 1, method.context))
    return {
        "matrix": matrix,
        "during": during,
        "apart": apart,
        "floors": [stream.floor(i) for i in tasks],
        "tokens": method.tokens,
        "seconds": time.perf_counter() - began,
    }
