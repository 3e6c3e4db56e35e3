"""Accuracy of a model on batches of a task, by sleep depth: the one way it is measured.

A model is evaluated the way a user would use it. The whole past and the separator go in without
labels, so every full window sleeps, at the depth given; the token at position t is predicted by the
logits at t-1, from pass 1. Later labels are predicted with the earlier ones given, in the same
forward. For `exact` that is the same as generating the answers: an example counts only if every
label is right, and up to the first mistake the two see the same tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from hybrid_sleep.eval.tasks.base import Task
from hybrid_sleep.support.lists import parse_counts
from hybrid_sleep.validation import check_count

if TYPE_CHECKING:
    import torch

Batch = Mapping[str, Any] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Auto:
    """A depth that each row chooses: `passes="auto"` of `model.sleep`.

    A row's sleep ends with the pass that changes its fast weights by less than `tolerance`
    (relative), at the latest after `max_passes` passes.
    """

    tolerance: float
    max_passes: int


Depth = TypeVar("Depth", int, Auto)


@dataclass(kw_only=True)
class Accuracy:
    """What `Task.score` says of a model at one depth, each a share in 0..1, and what it took.

    exact: examples with every label right; per_question: questions; per_label: labels.
    by_difficulty, questions: questions right by their difficulty, and how many there were; empty
    where batches do not say how hard their questions are. by_kind: by kind and difficulty, where a
    task tells kinds apart. seconds: of all forwards. passes: mean sleep depth of a row at a
    boundary.
    """

    exact: float
    per_question: float
    per_label: float
    by_difficulty: dict[int, float] = field(default_factory=dict)
    questions: dict[int, int] = field(default_factory=dict)
    by_kind: dict[str, dict[int, float]] = field(default_factory=dict)
    seconds: float
    passes: float

    @property
    def kinds(self) -> list[str]:
        """The kinds of which there are questions of every difficulty."""
        return [kind for kind, shares in self.by_kind.items() if set(shares) == set(self.questions)]

    def share(self, level: int | None = None, kind: str | None = None) -> float:
        """Questions right of one difficulty (None: of all); kind: of these, of one kind."""
        if level is None:
            return self.per_question
        return (self.by_difficulty if kind is None else self.by_kind[kind])[level]


def measure_accuracy(
    model: Any,
    task: Task,
    batches: Iterable[Batch],
    depths: Iterable[Depth],
    *,
    progress: Callable[[int], None] | None = None,
) -> dict[Depth, Accuracy]:
    """Accuracy of `model` on all of `batches` at each of `depths`, one batch after the other.

    A batch is a list of examples of `task`, or what `task.batch` makes, which does not say how hard
    a question is. `progress(passes)` is called after every forward with its passes over an example.
    The model is put in eval mode and left as it was found. Raises ValueError for no batch, and what
    `model.sleep` raises of `Auto` where no looped layer has fast weights.
    """
    import torch

    depths = list(depths)
    device = next(model.parameters()).device
    chosen: dict[Depth, list[torch.Tensor]] = {depth: [] for depth in depths}
    passes: dict[Depth, list[int]] = {depth: [] for depth in depths}
    seconds: dict[Depth, float] = dict.fromkeys(depths, 0.0)
    examples: list[Any] = []
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                examples.append(batch)
                input_ids = _tokens(batch).to(device)
                # Depths take turns, so that what slows the machine down falls on all of them.
                for depth in depths:
                    began = time.perf_counter()
                    predicted, slept = _predict(model, input_ids, depth)
                    chosen[depth].append(predicted.cpu())
                    seconds[depth] += time.perf_counter() - began
                    passes[depth] += slept
                    if progress is not None:
                        most = depth.max_passes if isinstance(depth, Auto) else depth
                        progress(len(input_ids) * most)
    finally:
        model.train(training)
    if not examples:
        raise ValueError("batches must hold one or more batches of examples, got none")
    answers = _together(examples)
    return {
        depth: Accuracy(
            **task.score(torch.cat(chosen[depth]), answers),
            seconds=seconds[depth],
            passes=sum(passes[depth]) / len(passes[depth]) if passes[depth] else 1.0,
        )
        for depth in depths
    }


def check_depths(depths: Iterable[int]) -> list[int]:
    """`depths` in ascending order; ValueError unless distinct integers of at least 1."""
    checked = [check_count("depths", depth) for depth in depths]
    if not checked or len(set(checked)) < len(checked):
        raise ValueError(f"depths must be one or more distinct integers, got {checked}")
    return sorted(checked)


def parse_depths(text: str) -> list[int]:
    """Depths from text such as `1-8` or `1,2,4-6`; ValueError for anything else."""
    return sorted(parse_counts("depths", text))


def predict(model: Any, input_ids: torch.Tensor, depth: int) -> torch.Tensor:
    """The model's choice for every token of `input_ids` [B, T], given those before it.

    The first token, which nothing precedes, gets -1.
    """
    return _predict(model, input_ids, depth)[0]


def _predict(
    model: Any, input_ids: torch.Tensor, depth: int | Auto
) -> tuple[torch.Tensor, list[int]]:
    """The choices, and how deep rows slept."""
    import torch

    # The last token predicts nothing that is scored, and might begin with a sleep.
    before = input_ids[:, :-1]
    if isinstance(depth, Auto):
        logits, passes = _forward_auto(model, before, depth)
    else:
        logits = model(input_ids=before, sleep_passes=depth, use_cache=False).logits
        passes = [depth]
    return torch.nn.functional.pad(logits.argmax(-1), (1, 0), value=-1), passes


def _forward_auto(
    model: Any, input_ids: torch.Tensor, depth: Auto
) -> tuple[torch.Tensor, list[int]]:
    """Logits window by window, and the passes of every row at every boundary: only
    `model.sleep` reports them."""
    import torch

    from hybrid_sleep import SleepCache

    logits: list[torch.Tensor] = []
    passes: list[int] = []
    cache = SleepCache(model.config)
    for window in input_ids.split(model.config.window, dim=1):
        if logits:
            report = model.sleep(
                cache, passes="auto", tol=depth.tolerance, max_passes=depth.max_passes
            )
            passes += report.passes_by_row
        logits.append(model(window, cache=cache).logits)
    return torch.cat(logits, dim=1), passes


def _tokens(batch: Batch) -> torch.Tensor:
    import torch

    if isinstance(batch, Mapping):
        return batch["input_ids"]
    return torch.tensor([example["input_ids"] for example in batch])


def _together(batches: list[Any]) -> Any:
    """All batches as one that `Task.score` takes."""
    import torch

    if all(isinstance(batch, Mapping) for batch in batches):
        return {"labels": torch.cat([batch["labels"] for batch in batches])}
    return [example for batch in batches for example in batch]
