"""Assignments among which all variables of one value are asked for: the symbolic subset.

After GSM-Infinite (arXiv 2502.05252), in words of our own and from a generator of our own.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

from hybrid_sleep.eval.tasks.base import IGNORED
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

    def floor(self) -> dict[str, Any]:
        """What guessing without the text scores; names are drawn evenly, so hardly anything.

        `exact`: always the same set, of the size that makes it most likely: the share of answers
        of k names, over the number of such sets. The shares are measured on `of` = 16,384 drawn
        problems, `standard_error` is what that leaves open. `per_label`: at each label the one most
        frequent after the label before it, at that place. `chance`: a uniform guess among all sets
        of 1 to `answers` names. `sizes`: the share of answers of k names.
        """
        return copy.deepcopy(_floor(self.recipe))


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


@lru_cache(maxsize=16)
def _floor(recipe: ForestRecipe) -> dict[str, Any]:
    vocabulary = Vocabulary(WORDS)
    names = 10**recipe.digits
    sizes: dict[int, Counter[int]] = {op: Counter() for op in sorted(recipe.ops)}
    followed: dict[tuple[int, int], Counter[int]] = {}
    bare = replace(recipe, noise=False)
    for problem in itertools.islice(forest_problems(bare, "train", 0), SAMPLED):
        sizes[problem.op][len(problem.answer_list)] += 1
        labels = [*vocabulary.encode(", ".join(problem.answer_list)), vocabulary.end]
        for place, (before, label) in enumerate(itertools.pairwise([IGNORED, *labels])):
            followed.setdefault((place, before), Counter())[label] += 1

    def likeliest(counts: Counter[int]) -> tuple[float, int]:
        of = counts.total()
        return max((count / of / math.comb(names, size), size) for size, count in counts.items())

    whole = sum(sizes.values(), Counter())
    exact, size = likeliest(whole)
    share, sets = whole[size] / SAMPLED, math.comb(names, size)
    hits = sum(max(counts.values()) for counts in followed.values())
    everything = range(1, recipe.answers + 1)
    return {
        "exact": exact,
        "per_label": hits / sum(counts.total() for counts in followed.values()),
        "chance": 1 / sum(math.comb(names, k) for k in everything),
        "by_difficulty": {op: likeliest(counts)[0] for op, counts in sizes.items()},
        "of": SAMPLED,
        "standard_error": (share * (1 - share) / SAMPLED) ** 0.5 / sets,
        "sizes": {k: whole[k] / SAMPLED for k in sorted(whole)},
    }
