"""Assignments among which all variables of one value are asked for: the symbolic subset.

After GSM-Infinite (arXiv 2502.05252), in words of our own and from a generator of our own.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any, NamedTuple

from hybrid_sleep.eval.tasks.base import Majority
from hybrid_sleep.eval.tasks.gsm_infinite.filling import slack
from hybrid_sleep.eval.tasks.gsm_infinite.forest import (
    ForestProblem,
    ForestRecipe,
    Trees,
    draw_trees,
    evaluate,
    fits,
    forest_problems,
    read_assignment,
    read_question,
    sure_costs,
)
from hybrid_sleep.eval.tasks.gsm_infinite.layout import (
    LONGEST,
    SAMPLED,
    WordTask,
    best_per_label,
    check_choices,
)
from hybrid_sleep.eval.tasks.gsm_infinite.sentences import Vocabulary
from hybrid_sleep.eval.tasks.gsm_infinite.stream import Stream
from hybrid_sleep.validation import check_count, check_flag

CUE = "Answer:"
LARGEST_OP = 50
MOST_DIGITS = 6
PROBED = 64
WORDS = (*".,?:=+-", "V", "Answer", "Which", "assign", "equal", "variables")


class GsmSymbolic(WordTask):
    """Which variables equal 7? Assignments `V012 = V345 + 1`, `- 1`, a copy, or a root of 0..10.

    `ops`: drawn from evenly, each 1..50: assignments from another variable in the trees that hold
    an answer, roots not counted. There are 1 to 4 such trees, each with an answer in it, and at
    least one answer is no root; the value is drawn among those that 1 to `answers` variables have.
    No value is negative. With `noise`, trees without an answer fill question and problem up to
    `length` tokens: they lack 5 % of it at most, and never as much as the shortest statement.
    Names are `V` and `digits` digits, drawn anew for each problem. `question_first`: or last.

    An example is fill tokens and the text, `length` tokens; then `Answer:`, the names in ascending
    order with commas between and an end token, which are the labels, and fill. One set is written
    in one way only, so `exact` counts the sets that are right as a whole. A free-text reply is
    scored by `parse_set(reply) == set(meta["answer_list"])`, whatever its order. Windows and fill
    are those of `GsmInfinite`.

    Train and test are disjoint for any seeds: a hash of the trees with an answer, names included,
    decides (one in 16 is test). Every problem is evaluated once more, as written, before it is
    given out. `meta` has the fields of the published problems; `n` counts the variables.

    Raises ValueError for a parameter out of range, for a `length` that `windows` does not divide,
    for one that more than a quarter of the problems with most operations exceed or that other
    trees cannot reach, for `digits` that name too few variables, and for windows that the answer
    does not fit in.
    """

    name = "gsm_symbolic"

    def __init__(
        self,
        ops: Sequence[int] = (2, 4, 6, 8),
        length: int = 512,
        windows: int = 4,
        noise: bool = True,
        answers: int = 6,
        digits: int = 3,
        question_first: bool = True,
    ):
        check_flag("noise", noise)
        check_flag("question_first", question_first)
        check_count("digits", digits, 2, MOST_DIGITS)
        check_count("length", length, 1, LONGEST)
        chosen = check_choices("ops", ops, range(1, LARGEST_OP + 1), f"1..{LARGEST_OP}")
        shortest = sure_costs(digits)[0]
        self.recipe = ForestRecipe(
            ops=chosen,
            answers=check_count("answers", answers),
            digits=digits,
            length=length,
            slack=slack(length, shortest) if noise else None,
            noise=noise,
        )
        self.question_first = question_first
        self.params = {
            "ops": list(chosen),
            "length": length,
            "windows": check_count("windows", windows),
            "noise": noise,
            "answers": self.recipe.answers,
            "digits": self.recipe.digits,
            "question_first": question_first,
        }
        self.vocabulary = Vocabulary(WORDS)
        # A name and the comma or end token after it.
        self._lay_out(length, windows, CUE, answers * (digits + 2), "the answer")
        if length // shortest > 10**digits:
            enough = len(str(length // shortest - 1))
            raise ValueError(
                f"digits must be at least {enough} to name all variables that length={length} may "
                f"need, got {digits}"
            )
        _check_fit(self.recipe)

    def _problems(self, split: str, seed: int) -> Iterator[ForestProblem]:
        return forest_problems(self.recipe, split, seed)

    def _reply(self, problem: ForestProblem) -> str:
        return ", ".join(problem.answer_list)

    def _fields(self, problem: ForestProblem) -> dict[str, Any]:
        return asdict(problem)

    def _read(self, question: str, statements: list[str], reply: str) -> dict[str, Any]:
        asked, read = read_question(question), [read_assignment(text) for text in statements]
        if asked is None:
            raise self._foreign(f"the question {question!r}")
        if None in read:
            raise self._foreign(f"the sentence {statements[read.index(None)]!r}")
        values, names = evaluate(read), reply.split(", ")
        if values is None:
            raise self._foreign("variables that are assigned twice or have no value")
        if names != sorted(set(names) & values.keys()):
            raise self._foreign(f"the reply {reply!r}")
        return {"statements": read, "answer": names, "answer_q": asked}

    def floor(self) -> dict[int, float]:
        """The likeliest set of names of problems of each op; names are uniform, so hardly anything.

        Always the same set, of the size that makes it most likely: the share of answers of k names,
        measured on 16,384 drawn problems, over the number of such sets.
        """
        names = 10**self.recipe.digits
        sizes = _statistics(self.recipe).sizes
        return {op: _likeliest(counts, names) for op, counts in sizes.items()}

    def majority(self) -> Majority:
        """What always guessing the same set scores, as in `floor`, of whatever op.

        `per_label`: at each label, the one most frequent after the label before it, at that place.
        """
        found = _statistics(self.recipe)
        whole = sum(found.sizes.values(), Counter())
        return Majority(_likeliest(whole, 10**self.recipe.digits), found.per_label)

    def chance(self) -> float:
        """A uniform guess among all sets of 1 to `answers` names."""
        names = 10**self.recipe.digits
        return 1 / sum(math.comb(names, k) for k in range(1, self.recipe.answers + 1))


def _check_fit(recipe: ForestRecipe) -> None:
    """ValueError for a length that too many problems exceed, or cannot be filled up to."""
    most, length = max(recipe.ops), recipe.length
    shortest = sure_costs(recipe.digits)[0]
    drawn = {op: _probes(op, recipe.answers, recipe.digits) for op in recipe.ops}
    needed = sorted(trees.tokens(recipe.digits) for trees in drawn[most])[PROBED * 3 // 4]
    if length < needed:
        raise ValueError(f"length must be at least {needed} for op={most}, got {length}")
    if recipe.slack is None or recipe.slack == shortest - 1:
        return

    def fitting(tried: int) -> bool:
        other = replace(recipe, length=tried, slack=slack(tried, shortest))
        return all(sum(fits(t, other) for t in probes) * 4 >= PROBED for probes in drawn.values())

    if not fitting(length):
        longer = next(tried for tried in itertools.count(length) if fitting(tried))
        raise ValueError(
            "length must be one that other trees can fill problems of these ops up to (unless "
            f"noise=False), such as {longer}, got {length}"
        )


@lru_cache(maxsize=256)
def _probes(op: int, answers: int, digits: int) -> list[Trees]:
    """A small sample of what is drawn, of any length."""
    recipe = ForestRecipe((op,), answers, digits, LONGEST, slack=None, noise=False)
    stream = Stream(op, answers, digits)
    return [draw_trees(stream, recipe) for _ in range(PROBED)]


def _likeliest(sizes: Counter[int], names: int) -> float:
    """How often the likeliest set of some of `names` is the answer; `sizes` counts answers by k."""
    return max(n / sizes.total() / math.comb(names, size) for size, n in sizes.items())


class _Statistics(NamedTuple):
    """What drawn problems say of guesses: how many answers have k names, by op and k."""

    sizes: dict[int, Counter[int]]
    per_label: float


@lru_cache(maxsize=16)
def _statistics(recipe: ForestRecipe) -> _Statistics:
    vocabulary = Vocabulary(WORDS)
    sizes: dict[int, Counter[int]] = {op: Counter() for op in sorted(recipe.ops)}
    sequences = []
    bare = replace(recipe, noise=False)
    for problem in itertools.islice(forest_problems(bare, "train", 0), SAMPLED):
        sizes[problem.op][len(problem.answer_list)] += 1
        sequences.append((*vocabulary.encode(", ".join(problem.answer_list)), vocabulary.end))
    return _Statistics(sizes, best_per_label(sequences))
