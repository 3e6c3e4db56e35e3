"""Forests of assignments, `assign V012 = V345 + 1`, and the question which variables equal 7."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from hybrid_sleep.eval.tasks.base import SPLITS
from hybrid_sleep.eval.tasks.gsm_infinite.filling import fillable
from hybrid_sleep.eval.tasks.gsm_infinite.generator import TEST_SHARE
from hybrid_sleep.eval.tasks.gsm_infinite.sentences import split_tokens
from hybrid_sleep.eval.tasks.gsm_infinite.stream import Stream

LARGEST_ROOT = 10
MOST_TREES = 4  # with an answer in them
SHIFTS = (-1, 0, 1)
NEW_TREE = 25  # percent of the variables of other trees that begin one
_STATEMENT = re.compile(r"assign (V\d+) = (\d+|V\d+(?: [+-] 1)?)")
_QUESTION = re.compile(r"Which variables equal (\d+)\?")


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


class Trees(NamedTuple):
    """The trees with an answer in them, parents first, and the value that is asked for."""

    variables: tuple[Variable, ...]
    asked: int

    def tokens(self, digits: int) -> int:
        """Tokens of their statements and the question, under any names."""
        statements = sum(cost(variable, digits) for variable in self.variables)
        return statements + len(split_tokens(question(self.asked)))

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
    return found and int(found[1])


def read_assignment(sentence: str) -> tuple[str, str] | None:
    """`V012` and `V345 + 1` of a statement (without its full stop), or None if it is none."""
    found = _STATEMENT.fullmatch(sentence)
    return found and (found[1], found[2])


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
            trees = Trees(tuple(variables), stream.pick(choices))
            if fits(trees, recipe):
                return trees


def fits(trees: Trees, recipe: ForestRecipe) -> bool:
    """Whether they are as short as `recipe` allows, and other trees can fill what is left."""
    room = recipe.length - trees.tokens(recipe.digits)
    if recipe.slack is None or room <= recipe.slack:
        return room >= 0
    costs = sure_costs(recipe.digits)
    return fillable(room - costs[0], recipe.slack, costs)  # the first is a root


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
    room = recipe.length - trees.tokens(recipe.digits)

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
            drawn, room = [], recipe.length - trees.tokens(recipe.digits)


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
            if in_test(core) == (split == "test"):
                break
        while len(numbers) < len(trees.variables) + len(others):
            numbers[stream.below(10**recipe.digits)] = None
        names = _names(numbers, recipe)
        yield _written(stream, trees, core, _statements(others, names[len(core) :]), names)


def _names(numbers: Iterable[int], recipe: ForestRecipe) -> list[str]:
    return [f"V{number:0{recipe.digits}d}" for number in numbers]


def in_test(core: Iterable[str]) -> bool:
    """Whether trees belong to the test split: by a hash of what they say, whatever the order."""
    digest = hashlib.blake2b(" ".join(sorted(core)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % TEST_SHARE == 0


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
