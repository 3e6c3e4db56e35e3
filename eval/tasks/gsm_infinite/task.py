"""Word problems of so many operations among distractors: is the answer there when the text is gone?

After GSM-Infinite (arXiv 2502.05252), in words of our own and from a generator of our own.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval.tasks.base import IGNORED, Task, check_int
from hybrid_sleep.eval.tasks.gsm_infinite.answers import parse_answer
from hybrid_sleep.eval.tasks.gsm_infinite.generator import (
    Problem,
    Recipe,
    draw_draft,
    problems,
)
from hybrid_sleep.eval.tasks.gsm_infinite.graph import LARGEST_OP, LARGEST_VALUE
from hybrid_sleep.eval.tasks.gsm_infinite.sentences import Vocabulary
from hybrid_sleep.eval.tasks.gsm_infinite.stream import Stream
from hybrid_sleep.eval.tasks.gsm_infinite.themes import THEMES

if TYPE_CHECKING:
    import torch

MODES = ("forward", "reverse")
CUE = "Answer:"
SOLUTION_CUE = "Solution:"
ANSWER_TOKENS = 5  # 1000 and the end token
SOLUTION_TOKENS_PER_OP = 45
LONGEST = 32768
PROBED = 64
SAMPLED = 1 << 14


class GsmInfinite(Task):
    """Problems that need exactly `op` operations, of which the answer alone is asked.

    `ops`: drawn from evenly, each 1..30; an operation is a number that a needed definition reads,
    so `A equals 2` is one, `A equals 2 times B` two, a total of three kinds three. `d`: 2 (things
    at places, totals), or 3 (with averages and totals of parts). `modes`: `forward` asks for the
    last quantity, `reverse` gives it and asks for a leaf. `themes`: orchard, harbour, library.
    Question and problem take at most `length` tokens (what is longer is drawn anew), and with
    `noise` distractors fill them up to that, less at most one short sentence. `question_first`: or
    last. `solution`: supervise the written solution, not the answer alone. All values lie in
    1..1000, constants in 1..4.

    An example is fill tokens and the text, `length` tokens; then `Answer:`, the answer's digits and
    an end token, which are the labels, and fill. The text is cut into `windows` windows, so the
    answer has a window to itself: every window of text sleeps, no answer is cut by a boundary, and
    the first label is predicted by the colon. Fill is an ordinary token and no pad, because pads do
    not count towards a window, and boundaries would then depend on how long a problem happens to
    be; it fills up on the right so that no position tells how many digits come.

    Train and test are disjoint for any seeds: a hash of what the needed definitions say, names
    included, distractors and order left out, decides (one in 16 is test). A structure does recur
    under other names, and so, with one or two operations, do whole problems within a split. Every
    problem is solved once more, distractors included, before it is given out.

    Raises ValueError for a parameter out of range, for a `length` that `windows` does not divide,
    for one that more than a quarter of the problems with most operations exceed, and for windows
    that the answer (or solution) does not fit in.
    """

    name = "gsm_infinite"
    difficulty = "op"
    cell = 16
    themes = THEMES

    def __init__(
        self,
        ops: Sequence[int] = (2, 4, 6, 8),
        d: int = 2,
        length: int = 512,
        windows: int = 4,
        noise: bool = True,
        modes: Sequence[str] = MODES,
        themes: Sequence[str] = tuple(THEMES),
        question_first: bool = True,
        solution: bool = False,
    ):
        chosen = _check_choices("ops", ops, range(1, LARGEST_OP + 1), f"1..{LARGEST_OP}")
        if check_int("d", d, 2) > 3:
            raise ValueError(f"d={d!r}; allowed: 2 or 3")
        for name, value in (
            ("noise", noise), ("question_first", question_first), ("solution", solution)
        ):  # fmt: skip
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r}; allowed: true or false")
        self.recipe = Recipe(
            ops=chosen,
            d=d,
            themes=_check_choices("themes", themes, tuple(THEMES)),
            modes=_check_choices("modes", modes, MODES),
            length=check_int("length", length, 1),
            noise=noise,
        )
        self.question_first, self.solution = question_first, solution
        self.params = {
            "ops": list(self.recipe.ops),
            "d": d,
            "length": length,
            "windows": check_int("windows", windows, 1),
            "noise": noise,
            "modes": list(self.recipe.modes),
            "themes": list(self.recipe.themes),
            "question_first": question_first,
            "solution": solution,
        }
        if length > LONGEST:
            raise ValueError(f"length={length}; allowed: at most {LONGEST}")
        self.vocabulary = Vocabulary()
        self.vocab_size = len(self.vocabulary)
        self._cue = self.vocabulary.encode(SOLUTION_CUE if solution else CUE)
        tail = SOLUTION_TOKENS_PER_OP * (max(chosen) + 1) + 1 if solution else ANSWER_TOKENS
        tail += len(self._cue)
        self._text = length
        self.length = length + tail
        self.window = length // windows
        if length % windows or self.window < tail:
            what = "the solution" if solution else "the answer"
            raise ValueError(
                f"windows={windows} cuts length={length}; allowed: a divisor of length that leaves "
                f"at least {tail} tokens, which {what} takes, to a window"
            )
        shortest = _fitting_length(max(chosen), d, self.recipe.modes)
        if length < shortest:
            raise ValueError(
                f"length={length} is too short for op={max(chosen)}; allowed: at least {shortest}"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text in the task's words; ValueError for any other word."""
        return self.vocabulary.encode(text)

    def decode(self, ids: Any) -> str:
        """The text of token ids, fill and end left out."""
        return self.vocabulary.decode(ids)

    def _examples(self, split: str, seed: int, count: int | None) -> Iterator[dict[str, Any]]:
        for problem in itertools.islice(problems(self.recipe, split, seed), count):
            input_ids, labels = self._tokens(problem)
            meta = {"task": self.name, "difficulty": problem.op, **asdict(problem)}
            yield {"input_ids": input_ids, "labels": labels, "meta": meta}

    def _batch(self, split: str, seed: int, count: int) -> dict[str, torch.Tensor]:
        import torch

        drawn = itertools.islice(problems(self.recipe, split, seed), count)
        rows = torch.tensor([self._tokens(problem) for problem in drawn])
        return {"input_ids": rows[:, 0].contiguous(), "labels": rows[:, 1].contiguous()}

    def floor(self) -> dict[str, Any]:
        """What guessing by frequency alone scores, measured on `of` = 16,384 drawn problems.

        `exact`: always the most frequent answer, `majority`, drawn without distractors, which do
        not change it; `standard_error` is that of `exact`. `per_label`: at each label the one most
        frequent after the label before it, at that place. `slices`: `exact` among problems of one
        op, mode or theme, by its own most frequent answer (a problem's wording gives away its mode
        and theme, and its length something of its op). With `solution`, `exact` and `per_label` are
        those of solution and answer together, `slices` of the answer alone.
        """
        floor = copy.deepcopy(_floor(self.recipe, self.solution))
        by_op = {int(op): share for op, share in floor["slices"]["op"].items()}
        return {**floor, "chance": 1 / LARGEST_VALUE, "by_difficulty": dict(sorted(by_op.items()))}

    def parse(self, input_ids: Sequence[int]) -> dict[str, Any]:
        """`text` (question and problem), the `reply` after the cue, and its `answer`."""
        ids = [int(token) for token in input_ids]
        text, reply = self.decode(ids[: self._text]), self.decode(ids[self._text :])
        if len(ids) != self.length:
            raise ValueError(f"input_ids has {len(ids)} tokens; allowed: {self.length}")
        return {"text": text, "reply": reply, "answer": parse_answer(reply)}

    def describe(self, example: Mapping[str, Any]) -> str:
        """An example's question and problem, how it is solved, and its answer."""
        ids = [int(token) for token in example["input_ids"]]
        text, tail = ids[: self._text], ids[self._text :]
        lines = [self.decode(text), self.decode(tail)]
        if "meta" in example and not self.solution:
            lines.insert(1, example["meta"]["solution"])
        return "\n".join(lines)

    def _tokens(self, problem: Problem) -> tuple[list[int], list[int]]:
        """`input_ids` and `labels` of a problem, `length` of each."""
        parts = [problem.question, problem.problem]
        text = self.encode(" ".join(parts if self.question_first else parts[::-1]))
        answer = _labels(self.vocabulary, problem, self.solution)
        fill = [self.vocabulary.fill]
        before = fill * (self._text - len(text)) + text + self._cue
        after = fill * (self.length - len(before) - len(answer))
        return (
            before + answer + after,
            [IGNORED] * len(before) + answer + [IGNORED] * len(after),
        )


def _labels(vocabulary: Vocabulary, problem: Problem, solution: bool) -> list[int]:
    text = problem.solution if solution else str(problem.answer)
    return [*vocabulary.encode(text), vocabulary.end]


def _check_choices(
    name: str, given: Any, options: Sequence[Any], allowed: str | None = None
) -> tuple[Any, ...]:
    """`given` as a tuple of different `options`, at least one; ValueError otherwise."""
    chosen = None if isinstance(given, (str, Mapping)) else given
    try:
        chosen = tuple(chosen)
        wrong = not chosen or len(set(chosen)) < len(chosen)
        wrong = wrong or any(isinstance(x, (bool, float)) or x not in options for x in chosen)
    except TypeError:
        wrong = True
    if wrong:
        raise ValueError(
            f"{name}={given!r}; allowed: a list of one or more of {allowed or ', '.join(options)}"
        )
    return chosen


@lru_cache(maxsize=64)
def _fitting_length(op: int, d: int, modes: tuple[str, ...]) -> int:
    """The length that three of four problems of `op` operations keep to, in a small sample."""
    recipe = Recipe((op,), d, tuple(THEMES), modes, LONGEST, noise=False)
    stream = Stream(op, d)
    return sorted(draw_draft(stream, recipe).tokens for _ in range(PROBED))[PROBED * 3 // 4]


@lru_cache(maxsize=16)
def _floor(recipe: Recipe, solution: bool) -> dict[str, Any]:
    vocabulary = Vocabulary()
    bare = replace(recipe, noise=False)
    drawn = list(itertools.islice(problems(bare, "train", 0), SAMPLED))
    answers = Counter(problem.answer for problem in drawn)
    sequences: Counter[tuple[int, ...]] = Counter()
    followed: dict[tuple[int, int], Counter[int]] = {}
    for problem in drawn:
        labels = _labels(vocabulary, problem, solution)
        sequences[tuple(labels)] += 1
        for place, (before, label) in enumerate(itertools.pairwise([IGNORED, *labels])):
            followed.setdefault((place, before), Counter())[label] += 1
    exact = sequences.most_common(1)[0][1] / len(drawn)
    hits = sum(max(counts.values()) for counts in followed.values())
    slices: dict[str, dict[str, float]] = {}
    for name in ("op", "mode", "theme"):
        by_value: dict[str, Counter[int]] = {}
        for problem in drawn:
            by_value.setdefault(str(getattr(problem, name)), Counter())[problem.answer] += 1
        slices[name] = {
            value: max(counts.values()) / counts.total() for value, counts in by_value.items()
        }
    return {
        "exact": exact,
        "per_label": hits / sum(counts.total() for counts in followed.values()),
        "majority": answers.most_common(1)[0][0],
        "of": len(drawn),
        "standard_error": (exact * (1 - exact) / len(drawn)) ** 0.5,
        "slices": slices,
    }
