"""What every task offers: examples drawn by (split, seed), a floor, a score."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

IGNORED = -100
LARGEST_SIZE = 100_000  # of one parameter
LONGEST_EXAMPLE = 1_000_000
SPLITS = ("train", "test")


class Task(ABC):
    """A source of supervised sequences whose correct answers are known by construction.

    `length` is the number of tokens of an example, `window` the window a model of the task is
    usually given, `params` what `load` needs to make the same task again. Training draws `cell`
    examples from one seed: fewer where drawing is slow and several processes share a batch.

    `difficulty` names what makes a question harder. A question is right if all its labels are; its
    labels are all of the `example`, one unbroken `run` of them, or a single `label` (`question`).
    """

    name: ClassVar[str]
    difficulty: ClassVar[str]
    question: ClassVar[Literal["example", "run", "label"]] = "example"
    vocab_size: int
    length: int
    window: int
    params: dict[str, Any]
    cell: ClassVar[int] = 128

    def examples(self, split: str, seed: int, count: int | None = None) -> Iterator[dict[str, Any]]:
        """Yield `count` examples (endlessly if None), the same ones for the same (split, seed).

        Each has `input_ids` and `labels` (lists of `length` ints; labels follow the transformers
        convention: -100 where unsupervised, shifted inside the model) and `meta` (what the
        example was made of, for slicing results; its `difficulty` is an integer, or a list of one
        for each question). No example of one split is ever in another, whatever the seeds. Raises
        ValueError for arguments out of range, before the first.
        """
        check_split(split)
        check_int("seed", seed, 0)
        if count is not None:
            check_int("count", count, 0)
        return self._examples(split, seed, count)

    def batch(self, split: str, seed: int, count: int) -> dict[str, torch.Tensor]:
        """The first `count` examples as `input_ids`, `labels`: LongTensors [count, length]."""
        check_split(split)
        check_int("seed", seed, 0)
        check_int("count", count, 1)
        return self._batch(split, seed, count)

    @abstractmethod
    def _examples(self, split: str, seed: int, count: int | None) -> Iterator[dict[str, Any]]:
        """`examples`, arguments checked."""

    @abstractmethod
    def _batch(self, split: str, seed: int, count: int) -> dict[str, torch.Tensor]:
        """`batch`, arguments checked."""

    @abstractmethod
    def parse(self, input_ids: Sequence[int]) -> dict[str, Any]:
        """What a sequence says, read back from its tokens alone.

        Raises ValueError if it is no sequence of this task.
        """

    @abstractmethod
    def floor(self) -> dict[str, Any]:
        """What is right without any memory of the past, on the test split.

        `exact`, `per_label`: always guessing the most frequent label. `chance`: the share of
        questions that a uniform guess among their possible answers gets right. `by_difficulty`:
        the share of questions of each difficulty that the best guess gets right.
        """

    def only(self, difficulty: int) -> Task:
        """This task limited to examples of one difficulty, in the same tokens and layout.

        Raises ValueError for a difficulty it does not have, and where examples mix several.
        """
        raise ValueError(
            f"difficulty={difficulty!r}; allowed: a task whose examples can be limited to one "
            f"difficulty, which those of {self.name!r} cannot"
        )

    def describe(self, example: Mapping[str, Any]) -> str:
        """One example in words; by default its tokens."""
        return " ".join(str(token) for token in example["input_ids"])

    def score(
        self,
        predictions: Any,
        examples: Sequence[Mapping[str, Any]] | Mapping[str, Any],
    ) -> dict[str, Any]:
        """Accuracy of `predictions` [count, T] on a list of examples or on a `batch`.

        `predictions[i, t]` is the token predicted for `labels[i, t]`: a causal model's logits
        at t-1. Unsupervised positions are ignored. `exact` counts the examples with every label
        right, `per_question` the questions, `per_label` the labels. Examples that have `meta` also
        give `by_difficulty`: the share of questions right by their difficulty, ascending, and
        `questions`, how many of each there were. Raises ValueError if the shapes differ or if an
        example has no label.
        """
        if isinstance(examples, Mapping):
            labels = np.asarray(examples["labels"])
        else:
            labels = np.asarray([example["labels"] for example in examples])
        if labels.ndim != 2 or labels.size == 0:
            raise ValueError(f"examples hold labels of shape {labels.shape}; allowed: [count, T]")
        predictions = np.asarray(predictions)
        if predictions.shape != labels.shape:
            raise ValueError(
                f"predictions have shape {predictions.shape}; allowed: that of the labels, "
                f"{labels.shape}"
            )
        supervised = labels != IGNORED
        if not supervised.any(axis=1).all():
            raise ValueError("examples: every example needs at least one label that is not -100")
        right = predictions == labels
        solved = self._solved(right, supervised)
        scores: dict[str, Any] = {
            "exact": float((right | ~supervised).all(axis=1).mean()),
            "per_question": float(solved.mean()),
            "per_label": float(right[supervised].mean()),
        }
        if not isinstance(examples, Mapping) and all("meta" in example for example in examples):
            levels = np.concatenate([np.ravel(e["meta"]["difficulty"]) for e in examples])
            values, counts = np.unique(levels, return_counts=True)
            shares = [float(solved[levels == value].mean()) for value in values]
            scores["by_difficulty"] = dict(zip(values.tolist(), shares, strict=True))
            scores["questions"] = dict(zip(values.tolist(), counts.tolist(), strict=True))
        return scores

    def _solved(self, right: np.ndarray, supervised: np.ndarray) -> np.ndarray:
        """Whether each question is right, in reading order; both arguments are bool [count, T]."""
        if self.question == "label":
            return right[supervised]
        if self.question == "example":
            return (right | ~supervised).all(axis=1)
        opens = supervised & ~np.pad(supervised, ((0, 0), (1, 0)))[:, :-1]
        question = np.cumsum(opens).reshape(opens.shape)[supervised] - 1
        return np.bincount(question, ~right[supervised]) == 0


def check_int(name: str, value: Any, least: int) -> int:
    """`value` as an int of at least `least`; ValueError naming the argument otherwise."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least:
        raise ValueError(f"{name}={value!r}; allowed: an integer of at least {least}")
    return number


def check_size(name: str, value: Any, least: int, most: int = LARGEST_SIZE) -> int:
    """`value` as an int of `least`..`most`; ValueError naming the parameter otherwise."""
    if check_int(name, value, least) > most:
        raise ValueError(f"{name}={value!r}; allowed: at most {most:,}")
    return operator.index(value)


def check_levels(name: str, value: Any, least: int) -> tuple[int, ...]:
    """`value` ascending; ValueError unless a size from `least` on, or a list of different ones."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return (check_size(name, value, least),)
    chosen = {check_size(name, number, least) for number in value}
    if not chosen or len(chosen) < len(value):
        raise ValueError(f"{name}={value!r}; allowed: an integer, or a list of different ones")
    return tuple(sorted(chosen))


def check_split(split: str) -> int:
    """The index of `split`; ValueError listing the splits if there is no such split."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}; allowed: {', '.join(SPLITS)}")
    return SPLITS.index(split)
