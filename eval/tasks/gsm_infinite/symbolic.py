"""Assignments among which all variables of one value are asked for: the symbolic subset.

After GSM-Infinite (arXiv 2502.05252), in words of our own and from a generator of our own. The
assignments are forests, `assign V012 = V345 + 1`; the question, which variables equal 7.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from hybrid_sleep.eval.tasks.base import SPLITS, Majority
from hybrid_sleep.eval.tasks.gsm_infinite.language import Vocabulary, fillable, slack, split_tokens
from hybrid_sleep.eval.tasks.gsm_infinite.layout import (
    LONGEST,
    SAMPLED,
    WordTask,
    best_per_label,
    check_choices,
    check_fit,
)
from hybrid_sleep.eval.tasks.sampling import Stream, in_test
from hybrid_sleep.validation import check_count, check_flag

CUE = "Answer:"
LARGEST_OP = 50
MOST_DIGITS = 6
PROBED = 64
WORDS = (*".,?:=+-", "V", "Answer", "Which", "assign", "equal", "variables")
LARGEST_ROOT = 10
MOST_TREES = 4  # with an answer in them
SHIFTS = (-1, 0, 1)
NEW_TREE = 25  # percent of the variables of other trees that begin one
_STATEMENT = re.compile(r"assign (V\d+) = (\d+|V\d+(?: [+-] 1)?)")
_QUESTION = re.compile(r"Which variables equal (\d+)\?")


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
        check_fit(
            self.recipe, lambda op: [_probes(op, answers, digits)], shortest, "other trees"
        )

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


class Variable(NamedTuple):
    """`parent` (index; None: a root) plus `shift`; a root is `shift`. `value` is what it equals."""

    parent: int | None
    shift: int
    value: int


@dataclass(frozen=True)
class ForestRecipe:
    """What to draw: each of `ops` as often as the others, at most `answers` names to an answer.

    Names have `digits` digits. The rest as in a `Recipe` of the realistic problems.
    """

    ops: tuple[int, ...]
    answers: int
    digits: int
    length: int
    slack: int | None
    noise: bool


@dataclass(frozen=True)
class ForestProblem:
    """A problem in words, with the published fields; `length` is in tokens, `n` counts variables.

    `answer_list` holds the names of all variables that equal `answer_q`, in ascending order.
    """

    problem: str
    question: str
    solution: str
    op: int
    n: int
    length: int
    d: int
    answer_q: int
    answer_list: list[str]


@dataclass(frozen=True)
class Trees:
    """The trees with an answer in them, parents first, and the value that is asked for.

    Names have `digits` digits.
    """

    variables: tuple[Variable, ...]
    asked: int
    digits: int

    @cached_property
    def tokens(self) -> int:
        """Tokens of their statements and the question, under any names."""
        statements = sum(cost(variable, self.digits) for variable in self.variables)
        return statements + len(split_tokens(question(self.asked)))

    def fits(self, recipe: ForestRecipe) -> bool:
        """Whether they are as short as `recipe` allows, and other trees can fill what is left."""
        room = recipe.length - self.tokens
        if recipe.slack is None or room <= recipe.slack:
            return room >= 0
        costs = sure_costs(self.digits)
        return fillable(room - costs[0], recipe.slack, costs)  # the first is a root

    def answers(self) -> list[int]:
        """Which of them equal the value."""
        return [i for i, variable in enumerate(self.variables) if variable.value == self.asked]


def cost(variable: Variable, digits: int) -> int:
    """Tokens of a variable's statement, its names `digits` digits long."""
    names = ["V" + "0" * digits] * 2
    return len(split_tokens(statement(variable, *names)))


def sure_costs(digits: int) -> tuple[int, ...]:
    """Tokens of a root of one digit, of a copy, and of a step up or down."""
    return tuple(cost(variable, digits) for variable in (
        Variable(None, 0, 0), Variable(0, 0, 0), Variable(0, 1, 1)
    ))  # fmt: skip


def statement(variable: Variable, name: str, parent: str) -> str:
    """`assign V012 = V345 + 1.`"""
    if variable.parent is None:
        return f"assign {name} = {variable.value}."
    step = {-1: " - 1", 0: "", 1: " + 1"}[variable.shift]
    return f"assign {name} = {parent}{step}."


def question(asked: int) -> str:
    """`Which variables equal 7?`"""
    return f"Which variables equal {asked}?"


def read_question(text: str) -> int | None:
    """The value that a question asks for, or None if it is none."""
    found = _QUESTION.fullmatch(text)
    return int(found[1]) if found else None


def read_assignment(sentence: str) -> tuple[str, str] | None:
    """`V012` and `V345 + 1` of a statement (without its full stop), or None if it is none."""
    found = _STATEMENT.fullmatch(sentence)
    return (found[1], found[2]) if found else None


def evaluate(statements: Iterable[tuple[str, str]]) -> dict[str, int] | None:
    """Every variable's value, from pairs (name, what it equals) in any order.

    None if a name is assigned twice, or if one has no value: a circle, or a name never assigned.
    """
    waiting: dict[str, list[tuple[str, int]]] = {}
    values: dict[str, int] = {}
    ready, named = [], set()
    for name, right in statements:
        if name in named:
            return None
        named.add(name)
        if right.isdigit():
            ready.append((name, int(right)))
        else:
            parent, *step = right.split(" ")
            waiting.setdefault(parent, []).append((name, int("".join(step) or 0)))
    while ready:
        name, value = ready.pop()
        values[name] = value
        ready += [(child, value + shift) for child, shift in waiting.pop(name, ())]
    return values if len(values) == len(named) else None


def draw_trees(stream: Stream, recipe: ForestRecipe) -> Trees:
    """Trees with an answer in each of them, `op` of their variables assigned from another one.

    At least one of those is an answer, so that no question is answered by reading constants.
    """
    op = stream.pick(recipe.ops)
    while True:
        roots = 1 + stream.below(min(op, MOST_TREES))
        variables, tree = [], []
        for index in range(roots + op):
            if index < roots:
                value = stream.below(LARGEST_ROOT + 1)
                variables.append(Variable(None, value, value))
                tree.append(index)
            else:
                variables.append(_child(stream, variables))
                tree.append(tree[variables[-1].parent])
        held = Counter(variable.value for variable in variables)
        choices = [
            value
            for value in sorted({v.value for v in variables[roots:]})
            if held[value] <= recipe.answers
            and len({t for t, v in zip(tree, variables, strict=True) if v.value == value}) == roots
        ]
        if choices:
            trees = Trees(tuple(variables), stream.pick(choices), recipe.digits)
            if trees.fits(recipe):
                return trees


def _child(stream: Stream, variables: list[Variable], never: int = -1) -> Variable:
    """A variable assigned from one of `variables`; not negative, and not `never`."""
    while True:
        parent = stream.below(len(variables))
        shift = stream.pick(SHIFTS)
        value = variables[parent].value + shift
        if value >= 0 and value != never:
            return Variable(parent, shift, value)


def _other_trees(stream: Stream, recipe: ForestRecipe, trees: Trees) -> list[Variable]:
    """Trees without an answer, which fill the room that is left."""
    costs, never = sure_costs(recipe.digits), trees.asked
    drawn: list[Variable] = []
    room = recipe.length - trees.tokens

    def root(most: int) -> Variable:
        value = stream.below(most + 1)
        value = value if value != never else (value + 1) % (most + 1)
        return Variable(None, value, value)

    def ends(variable: Variable) -> bool:
        return fillable(room - cost(variable, recipe.digits), recipe.slack, costs)

    while True:
        new = not drawn or stream.chance(NEW_TREE)
        variable = root(LARGEST_ROOT) if new else _child(stream, drawn, never)
        if not ends(variable):
            options = [root(9)]
            for shift in SHIFTS if drawn else ():
                parent = stream.below(len(drawn))
                value = drawn[parent].value + shift
                options += [Variable(parent, shift, value)] * (value not in (-1, never))
            variable = next(filter(ends, options), None)
        if variable is not None:
            room -= cost(variable, recipe.digits)
            drawn.append(variable)
        elif room <= recipe.slack:
            return drawn
        else:  # no step was allowed where one was needed
            drawn, room = [], recipe.length - trees.tokens


def forest_problems(recipe: ForestRecipe, split: str, seed: int) -> Iterator[ForestProblem]:
    """Problems of a split without end, the same ones for the same (split, seed)."""
    stream = Stream(SPLITS.index(split), seed)
    while True:
        trees = draw_trees(stream, recipe)
        others = _other_trees(stream, recipe, trees) if recipe.noise else []
        # Names decide the split, so that both splits have the same mix of everything else.
        while True:
            numbers = dict.fromkeys(stream.distinct(10**recipe.digits, len(trees.variables)))
            core = _statements(trees.variables, _names(numbers, recipe))
            if in_test(" ".join(sorted(core))) == (split == "test"):  # whatever the order
                break
        while len(numbers) < len(trees.variables) + len(others):
            numbers[stream.below(10**recipe.digits)] = None
        names = _names(numbers, recipe)
        yield _written(stream, trees, core, _statements(others, names[len(core) :]), names)


def _names(numbers: Iterable[int], recipe: ForestRecipe) -> list[str]:
    return [f"V{number:0{recipe.digits}d}" for number in numbers]


def _statements(variables: Iterable[Variable], names: list[str]) -> list[str]:
    return [
        statement(variable, name, names[variable.parent or 0])
        for variable, name in zip(variables, names, strict=False)
    ]


def _written(
    stream: Stream, trees: Trees, core: list[str], others: list[str], names: list[str]
) -> ForestProblem:
    """The problem of trees and others, verified by evaluating what is written."""
    said = stream.shuffle([*core, *others])
    answers = sorted(names[i] for i in trees.answers())
    values = evaluate(filter(None, (read_assignment(text.removesuffix(".")) for text in said)))
    if values is None or not _holds(values, len(said), trees.asked, answers):
        raise RuntimeError(f"{answers} are not what equals {trees.asked} in: {' '.join(said)}")
    asked = question(trees.asked)
    return ForestProblem(
        problem=" ".join(said),
        question=asked,
        solution=_solution(core, values, answers),
        op=sum(variable.parent is not None for variable in trees.variables),
        n=len(said),
        length=len(split_tokens(" ".join([*said, asked]))),
        d=1,
        answer_q=trees.asked,
        answer_list=answers,
    )


def _holds(values: Mapping[str, int], count: int, asked: int, answers: list[str]) -> bool:
    """Whether all `count` variables have values, and `answers` alone the one `asked` for."""
    equal = sorted(name for name, value in values.items() if value == asked)
    return len(values) == count and equal == answers


def _solution(core: Iterable[str], values: Mapping[str, int], answers: list[str]) -> str:
    """`V345 = 3. V012 = V345 + 1 = 4. Answer: V012.`, parents first."""
    lines = []
    for text in core:
        name, right = read_assignment(text.removesuffix("."))
        value = "" if right.isdigit() else f" = {values[name]}"
        lines.append(f"{name} = {right}{value}.")
    return " ".join([*lines, f"Answer: {', '.join(answers)}."])
