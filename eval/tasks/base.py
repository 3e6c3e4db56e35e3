"""What every task offers: examples drawn by (split, seed), a floor, a score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np

from hybrid_sleep.validation import check_choice, check_count

if TYPE_CHECKING:
    import torch

IGNORED = -100
LARGEST_SIZE = 100_000  # of one parameter
LONGEST_EXAMPLE = 1_000_000
SPLITS = ("train", "test")


class Majority(NamedTuple):
    """What always guessing the most frequent label scores, shares in 0..1.

    exact: of examples, with every label right. per_label: of labels. guess: the labels of a
    question that are guessed, one token for all of them, or none where it is not the same guess
    everywhere.
    """

    exact: float
    per_label: float
    guess: tuple[int, ...] = ()


class Task(ABC):
    """A source of supervised sequences whose correct answers are known by construction.

    `length` is the number of tokens of an example, `window` the window a model of the task is
    usually given, `params` what `load` needs to make the same task again. Training draws `block`
    examples from one seed: fewer where drawing is slow and several processes share a batch.

    Where `together` is above 1, as many examples, one after another, ask about one context. Tokens
    of several digits have `token_fields`, as a model's config takes them.

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
    token_fields: list[int] | None = None
    together: int = 1
    block: ClassVar[int] = 128

    def examples(self, split: str, seed: int, count: int | None = None) -> Iterator[dict[str, Any]]:
        """Yield `count` examples (endlessly if None), the same ones for the same (split, seed).

        Each has `input_ids` and `labels` (lists of `length` ints; labels follow the transformers
        convention: -100 where unsupervised, shifted inside the model) and `meta` (what the
        example was made of, for slicing results; its `difficulty` is an integer, or a list of one
        for each question). No example of one split is ever in another, whatever the seeds. Raises
        ValueError for arguments out of range, before the first.
        """
        check_choice("split", split, SPLITS)
        check_count("seed", seed, 0)
        if count is not None:
            check_count("count", count, 0)
        return self._examples(split, seed, count)

    def batch(self, split: str, seed: int, count: int) -> dict[str, torch.Tensor]:
        """The first `count` examples as `input_ids`, `labels`: LongTensors [count, length]."""
        check_choice("split", split, SPLITS)
        check_count("seed", seed, 0)
        check_count("count", count)
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
    def floor(self) -> dict[int, float]:
        """What the best guess without any memory of the past scores on the test split.

        The share of questions that it gets right, by difficulty, ascending. The guess may use what
        a model sees when it answers: the question, and the questions and answers before it.
        """

    @abstractmethod
    def majority(self) -> Majority:
        """What always guessing the most frequent label scores on the test split."""

    @abstractmethod
    def chance(self) -> float:
        """The share of questions that a uniform guess among their possible answers gets right."""

    def only(self, *difficulties: int) -> Task:
        """This task limited to examples of some difficulties, in the same tokens and layout.

        Raises ValueError for a difficulty it does not have, for none, and where examples mix
        several.
        """
        raise ValueError(
            f"difficulty must not be chosen for task {self.name!r}, whose examples cannot be "
            f"limited to one, got {_named(difficulties)}"
        )

    def kinds(self, example: Mapping[str, Any]) -> Sequence[str] | None:
        """The kind of each question, where some are harder to guess; by default None."""
        return None

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
        `questions`, how many of each there were; where questions have `kinds` also `by_kind`, the
        shares by kind and difficulty. Raises ValueError if the shapes differ or if an example has
        no label.
        """
        if isinstance(examples, Mapping):
            labels = np.asarray(examples["labels"])
        else:
            labels = np.asarray([example["labels"] for example in examples])
        if labels.ndim != 2 or labels.size == 0:
            raise ValueError(f"labels must have shape [count, T], got {labels.shape}")
        predictions = np.asarray(predictions)
        if predictions.shape != labels.shape:
            raise ValueError(
                f"predictions must have the shape of the labels, {labels.shape}, "
                f"got {predictions.shape}"
            )
        supervised = labels != IGNORED
        if not supervised.any(axis=1).all():
            lacking = np.flatnonzero(~supervised.any(axis=1)).tolist()
            raise ValueError(
                f"examples must each have a label that is not {IGNORED}, got none in {lacking}"
            )
        right = predictions == labels
        solved = self._solved(right, supervised)
        scores: dict[str, Any] = {
            "exact": float((right | ~supervised).all(axis=1).mean()),
            "per_question": float(solved.mean()),
            "per_label": float(right[supervised].mean()),
        }
        if not isinstance(examples, Mapping) and all("meta" in example for example in examples):
            levels = np.concatenate([np.ravel(e["meta"]["difficulty"]) for e in examples])
            scores["by_difficulty"] = _shares(solved, levels)
            values, counts = np.unique(levels, return_counts=True)
            scores["questions"] = dict(zip(values.tolist(), counts.tolist(), strict=True))
            given = [found for e in examples if (found := self.kinds(e)) is not None]
            if given:
                kinds = np.concatenate(given)
                scores["by_kind"] = {
                    str(kind): _shares(solved[kinds == kind], levels[kinds == kind])
                    for kind in np.unique(kinds)
                }
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


def _shares(solved: np.ndarray, levels: np.ndarray) -> dict[int, float]:
    """The share of questions right by difficulty, ascending."""
    return {int(value): float(solved[levels == value].mean()) for value in np.unique(levels)}


class RowTask(Task):
    """A task that makes many rows at once, as arrays, of which each question has a difficulty."""

    @abstractmethod
    def _rows(
        self, split: str, seed: int, count: int | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Difficulty of each question [n, questions], `input_ids` and `labels` [n, length]."""

    def _examples(self, split: str, seed: int, count: int | None) -> Iterator[dict[str, Any]]:
        for levels, input_ids, labels in self._rows(split, seed, count):
            for row in range(len(levels)):
                yield {
                    "input_ids": input_ids[row].tolist(),
                    "labels": labels[row].tolist(),
                    "meta": {
                        "task": self.name,
                        **self.params,
                        "difficulty": levels[row].tolist(),
                    },
                }

    def _batch(self, split: str, seed: int, count: int) -> dict[str, torch.Tensor]:
        import torch

        parts = list(zip(*self._rows(split, seed, count), strict=True))[1:]
        input_ids, labels = (torch.from_numpy(np.concatenate(part)) for part in parts)
        return {"input_ids": input_ids, "labels": labels}


def check_asked(given: Sequence[int], name: str, known: Sequence[int]) -> list[int]:
    """The difficulties `given` to `Task.only`, ascending; `known` ones are allowed, called `name`.

    Raises ValueError for others, for none and for one given twice.
    """
    if not given or not {*given} <= {*known} or len({*given}) < len(given):
        raise ValueError(
            f"difficulty must be one or several of {name}={list(known)}, got {_named(given)}"
        )
    return sorted(given)


def _named(difficulties: Sequence[int]) -> str:
    return ", ".join(map(repr, difficulties)) or "none"


def check_levels(name: str, value: Any, minimum: int) -> tuple[int, ...]:
    """`value`, an integer of at least `minimum` or a list of different ones, as an ascending tuple.

    Raises ValueError naming it for anything else.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        return (check_count(name, value, minimum, LARGEST_SIZE),)
    levels = {check_count(name, number, minimum, LARGEST_SIZE) for number in value}
    if not levels or len(levels) < len(value):
        raise ValueError(
            f"{name} must be an integer or a list of one or more different ones, got {value!r}"
        )
    return tuple(sorted(levels))
