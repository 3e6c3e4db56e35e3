"""Word problems of so many operations among distractors: is the answer there when the text is gone?

After GSM-Infinite (arXiv 2502.05252), in words of our own and from a generator of our own.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any, NamedTuple

from hybrid_sleep.eval.tasks.base import Majority
from hybrid_sleep.eval.tasks.gsm_infinite.answers import parse_answer
from hybrid_sleep.eval.tasks.gsm_infinite.graph import LARGEST_OP, LARGEST_VALUE
from hybrid_sleep.eval.tasks.gsm_infinite.language import (
    THEMES,
    Vocabulary,
    all_words,
    read_statement,
    slack,
    theme_of,
)
from hybrid_sleep.eval.tasks.gsm_infinite.layout import (
    LONGEST,
    SAMPLED,
    WordTask,
    best_per_label,
    check_choices,
    check_fit,
)
from hybrid_sleep.eval.tasks.gsm_infinite.problems import (
    Draft,
    Problem,
    Recipe,
    draw_draft,
    problems,
)
from hybrid_sleep.eval.tasks.sampling import Stream
from hybrid_sleep.validation import check_count, check_flag

MODES = ("forward", "reverse")
CUE = "Answer:"
SOLUTION_CUE = "Solution:"
ANSWER_TOKENS = 5  # 1000 and the end token
SOLUTION_TOKENS_PER_OP = 45
SHORTEST = 11  # tokens of `The number of pear trees in Amber Hill equals 2.`
PROBED = 64


class GsmInfinite(WordTask):
    """Problems that need exactly `op` operations, of which the answer alone is asked.

    `ops`: drawn from evenly, each 1..30; an operation is a number that a needed definition reads,
    so `A equals 2` is one, `A equals 2 times B` two, a total of three kinds three. `d`: 2 (things
    at places, totals), or 3 (with averages and totals of parts). `modes`: `forward` asks for the
    last quantity, `reverse` gives it and asks for a leaf. `themes`: of those in `task.themes`,
    which maps each name (orchard, harbour, library) to its words: `phrases` are those for counts,
    averages and the two totals.
    Question and problem take at most `length` tokens (what is longer is drawn anew), and with
    `noise` distractors fill them up to that: they lack 5 % of it at most, and never 11 tokens, a
    short sentence. `question_first`: or last. `solution`: supervise the written solution, not the
    answer alone. All values lie in 1..1000, constants in 1..4.

    An example is fill tokens and the text, `length` tokens; then `Answer:`, the answer's digits and
    an end token, which are the labels, and fill. The text is cut into `windows` windows, so the
    answer has a window to itself: every window of text sleeps, no answer is cut by a boundary, and
    the first label is predicted by the colon. Fill is an ordinary token and no pad, because pads do
    not count towards a window, and boundaries would then depend on how long a problem happens to
    be; it fills up on the right so that no position tells how many digits come.

    Train and test are disjoint for any seeds: a hash of what the needed definitions say, names
    included, distractors and order left out, decides (one in 16 is test). A structure does recur
    under other names, and so, with one or two operations, do whole problems within a split. Every
    problem is solved once more, distractors included, before it is given out. `meta` has the
    fields of the published problems (`template` is the theme) and `answer`, an integer.

    Raises ValueError for a parameter out of range, for a `length` that `windows` does not divide,
    for one that more than a quarter of the problems with most operations exceed or that
    distractors cannot reach, and for windows that the answer (or solution) does not fit in.
    """

    name = "gsm_infinite"
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
        chosen = check_choices("ops", ops, range(1, LARGEST_OP + 1), f"1..{LARGEST_OP}")
        check_flag("noise", noise)
        check_flag("question_first", question_first)
        check_flag("solution", solution)
        check_count("length", length, 1, LONGEST)
        self.recipe = Recipe(
            ops=chosen,
            d=check_count("d", d, 2, 3),
            themes=check_choices("themes", themes, tuple(THEMES)),
            modes=check_choices("modes", modes, MODES),
            length=length,
            slack=slack(length, SHORTEST) if noise else None,
            noise=noise,
        )
        self.question_first, self.solution = question_first, solution
        self.params = {
            "ops": list(chosen),
            "d": self.recipe.d,
            "length": length,
            "windows": check_count("windows", windows),
            "noise": noise,
            "modes": list(self.recipe.modes),
            "themes": list(self.recipe.themes),
            "question_first": question_first,
            "solution": solution,
        }
        self.vocabulary = Vocabulary(all_words())
        if solution:
            tail = SOLUTION_TOKENS_PER_OP * (max(chosen) + 1) + 1
            self._lay_out(length, windows, SOLUTION_CUE, tail, "the solution")
        else:
            self._lay_out(length, windows, CUE, ANSWER_TOKENS, "the answer")
        check_fit(
            self.recipe,
            lambda op: [_probes(op, d, mode) for mode in self.recipe.modes],
            SHORTEST,
            "distractors",
        )

    def _problems(self, split: str, seed: int) -> Iterator[Problem]:
        return problems(self.recipe, split, seed)

    def _reply(self, problem: Problem) -> str:
        return problem.solution if self.solution else str(problem.answer)

    def _fields(self, problem: Problem) -> dict[str, Any]:
        return {**asdict(problem), "template": problem.theme}

    def _read(self, question: str, statements: list[str], reply: str) -> dict[str, Any]:
        theme, answer = theme_of(question), parse_answer(reply)
        if theme is None:
            raise self._foreign(f"the question {question!r}")
        read = [read_statement(theme, sentence) for sentence in statements]
        if None in read:
            raise self._foreign(f"the sentence {statements[read.index(None)]!r}")
        if not (reply.endswith(f"Answer: {answer}.") if self.solution else reply == str(answer)):
            raise self._foreign(f"the reply {reply!r}")
        return {"statements": read, "answer": answer}

    def floor(self) -> dict[int, float]:
        """The most frequent answer to problems of each op, measured on 16,384 drawn ones.

        They are drawn without distractors, which do not change answers.
        """
        return dict(_statistics(self.recipe, self.solution).by_op)

    def majority(self) -> Majority:
        """What always guessing the most frequent answer scores, measured on 16,384 problems.

        With `solution`, the most frequent solution with its answer. `per_label`: at each label, the
        one most frequent after the label before it, at that place.
        """
        return _statistics(self.recipe, self.solution).majority

    def chance(self) -> float:
        """A uniform guess among 1..1000."""
        return 1 / LARGEST_VALUE


@lru_cache(maxsize=256)
def _probes(op: int, d: int, mode: str) -> list[Draft]:
    """A small sample of what is drawn, of any length."""
    recipe = Recipe((op,), d, tuple(THEMES), (mode,), LONGEST, slack=None, noise=False)
    stream = Stream(op, d)
    return [draw_draft(stream, recipe) for _ in range(PROBED)]


class _Statistics(NamedTuple):
    """What drawn problems say of guesses: the share of the most frequent answer, by op."""

    by_op: dict[int, float]
    majority: Majority


@lru_cache(maxsize=16)
def _statistics(recipe: Recipe, solution: bool) -> _Statistics:
    vocabulary = Vocabulary(all_words())
    bare = replace(recipe, noise=False)
    answers: dict[int, Counter[int]] = {op: Counter() for op in sorted(recipe.ops)}
    sequences: list[tuple[int, ...]] = []
    for problem in itertools.islice(problems(bare, "train", 0), SAMPLED):
        answers[problem.op][problem.answer] += 1
        said = problem.solution if solution else str(problem.answer)
        sequences.append((*vocabulary.encode(said), vocabulary.end))
    [(guess, times)] = Counter(sequences).most_common(1)
    return _Statistics(
        {op: max(counts.values()) / counts.total() for op, counts in answers.items()},
        Majority(times / len(sequences), best_per_label(sequences), guess),
    )
