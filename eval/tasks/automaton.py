"""One-sided elementary automata on a line: what is a cell after t steps, asked when it has gone?

A cell is set from itself and the two in front of it, so that a causal pass over the line can do a
step, and N passes can do N. Where the rule differs from example to example, no table of t steps can
stand for t times one step, as it can for a single rule.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from hybrid_sleep.eval.tasks.base import IGNORED, Majority, RowTask, check_asked, check_levels
from hybrid_sleep.eval.tasks.sampling import U64, distinct, draw, mix
from hybrid_sleep.validation import check_count

NEIGHBOURHOODS = 8
FEWEST_CELLS = 12  # 4,096 lines, so that neither split is small
MOST_CELLS = 1024
MOST_STEPS = 9  # of which the floor can be enumerated: 2 * 9 + 1 cells reach one
FIRST_WORDS = 3  # of an example: which rule, which number of steps, one to spare


class Automaton(RowTask):
    """A line of `cells` random bits; what are `asked` cells after some of `steps` steps?

    A step sets cell i to bit `4 * x[i - 2] + 2 * x[i - 1] + x[i]` of the rule (Wolfram's number, 0
    to 255), all at once; in front of the line are endless zeros, which the rule changes as well.
    The rule is one of `rules`, equally often. With several, eight tokens in front of the line say
    what follows each neighbourhood; with one it is nowhere.

    Rule and line fill `windows` windows. Then, in a window of their own, a token for the number of
    steps, which is one of `steps`, equally often, and `asked` different cells in random order, a
    token each (None: as many as fit). The value of a cell is the label of the position behind its
    token, where `input_ids` holds the next one, so that no question sees the answer to another; a
    stop token ends the row.

    The difficulty of a question is the number of steps. Tokens: cells `2 * place + value`; with
    several rules, `2 * neighbourhood + what follows`; numbers of steps, ascending; places; stop.

    Train and test contexts (rule and line) are disjoint for any seeds: a 64-bit hash decides (one
    in 16 is test). Examples come from raw Philox words.

    Raises ValueError unless 12 <= cells <= 1024, `steps` is an integer of 0 to 9 or a list of
    different ones, `rules` one of 0 to 255 or a list of different ones, `windows` divide the tokens
    of a context, and the questions fit into a window.
    """

    name = "automaton"
    difficulty = "steps"
    question = "label"

    def __init__(
        self,
        cells: int = 16,
        steps: int | Sequence[int] = (1, 2, 3, 4),
        rules: int | Sequence[int] = 110,
        windows: int = 1,
        asked: int | None = None,
    ):
        self.cells = check_count("cells", cells, FEWEST_CELLS, MOST_CELLS)
        self.steps = check_levels("steps", steps, 0)
        if self.steps[-1] > MOST_STEPS:
            raise ValueError(f"steps must be at most {MOST_STEPS}, got {steps!r}")
        self.rules = check_levels("rules", rules, 0)
        if self.rules[-1] > 255:
            raise ValueError(f"rules must be at most 255, got {rules!r}")
        check_count("windows", windows)
        self.told = 0 if len(self.rules) == 1 else NEIGHBOURHOODS
        self.context = self.told + cells
        self.window = self.context // windows
        fit = min(cells, self.window - 2)
        if self.context % windows or fit < 1:
            raise ValueError(
                f"windows must divide the {self.context} tokens of a context and leave at least 3 "
                f"to a window, got {windows}"
            )
        self.asked = fit if asked is None else check_count("asked", asked, 1, fit)
        self.drawn = np.arange(len(self.steps))
        self.first_rule = 2 * cells
        self.first_step = self.first_rule + 2 * self.told
        self.first_place = self.first_step + len(self.steps)
        self.stop = self.first_place + cells
        self.vocab_size = self.stop + 1
        self.length = self.context + self.asked + 2
        self.tables = (np.array(self.rules)[:, None] >> np.arange(NEIGHBOURHOODS)) & 1
        self.params = {
            "cells": cells,
            "steps": list(self.steps),
            "rules": list(self.rules) if self.told else self.rules[0],
            "windows": windows,
            "asked": self.asked,
        }

    def parse(self, input_ids: Sequence[int]) -> dict[str, Any]:
        """`rule`, `line` (a string of cells), `steps`, `queries` [(place, value)] of a sequence.

        Values are worked out.
        """
        tokens = np.array([int(token) for token in input_ids])
        told, line = tokens[: self.told] - self.first_rule, tokens[self.told : self.context]
        asked = tokens[self.context + 1 : -1] - self.first_place
        which = tokens[self.context] - self.first_step if len(tokens) == self.length else -1
        if (
            not 0 <= which < len(self.steps)
            or tokens[-1] != self.stop
            or not np.array_equal(told // 2, np.arange(self.told))
            or not np.array_equal(line // 2, np.arange(self.cells))
            or not {*asked.tolist()} <= {*range(self.cells)}
            or len({*asked.tolist()}) < self.asked
            or (rule := self._rule(told % 2)) not in self.rules
        ):
            raise ValueError(
                f"input_ids must be {'a rule, ' * bool(self.told)}{self.cells} cells in order, a "
                f"number of steps, {self.asked} different places and the stop token {self.stop}: "
                f"{self.length} tokens, got {tokens.tolist()}"
            )
        cells, steps = line % 2, self.steps[which]
        after = self.rollout(cells, rule, steps)
        return {
            "rule": rule,
            "line": "".join(map(str, cells.tolist())),
            "steps": steps,
            "queries": [(place, int(after[place])) for place in asked.tolist()],
        }

    def _rule(self, follows: np.ndarray) -> int:
        return int((follows << np.arange(NEIGHBOURHOODS)).sum()) if self.told else self.rules[0]

    def rollout(self, line: Any, rule: int, steps: int) -> np.ndarray:
        """The cells `line` [cells] after `steps` steps of `rule`."""
        table = (np.array([rule])[:, None] >> np.arange(NEIGHBOURHOODS)) & 1
        return evolve(np.array(line)[None], table, steps)[0]

    def floor(self) -> dict[int, float]:
        """The best guess that knows the number of steps and the place, over all rules and lines.

        Exact, by enumeration of the cells that can reach the place, of which there are at most
        2 * steps + 1.
        """
        return {
            steps: float(np.maximum(ones, 1 - ones).mean())
            for steps, ones in ((s, self._ones(s)) for s in self._asked_steps)
        }

    def majority(self) -> Majority:
        """What always guessing the more frequent value scores.

        `exact` is that of lines all of whose asked cells have it, of 2**14 drawn test contexts.
        """
        ones = float(np.mean([self._ones(steps).mean() for steps in self._asked_steps]))
        guess = int(ones >= 0.5)
        labels = np.asarray(self.batch("test", 0, 1 << 14)["labels"])[:, -self.asked :]
        exact = float((labels == guess).all(axis=1).mean())
        return Majority(exact, per_label=max(ones, 1 - ones), guess=(guess,))

    def chance(self) -> float:
        """1/2."""
        return 0.5

    def only(self, *difficulties: int) -> Automaton:
        """The same contexts and tokens, `difficulties` steps asked for, equally often."""
        asked = check_asked(difficulties, "steps", self.steps)
        task = copy.copy(self)
        task.drawn = np.array([self.steps.index(steps) for steps in asked])
        return task

    def describe(self, example: Mapping[str, Any]) -> str:
        """Rule and line of an example, what it becomes, and the cells asked for."""
        read = self.parse(example["input_ids"])
        line = np.array([*map(int, read["line"])])
        lines = [f"rule {read['rule']} on {read['line']}"]
        for steps in range(1, read["steps"] + 1):
            after = "".join(map(str, self.rollout(line, read["rule"], steps).tolist()))
            lines.append(f"after {steps} step{'s' * (steps != 1)}: {after}")
        lines.append(", ".join(f"cell {place}: {value}" for place, value in read["queries"]))
        return "\n".join(lines)

    @property
    def _asked_steps(self) -> list[int]:
        return [self.steps[number] for number in self.drawn]

    def _ones(self, steps: int) -> np.ndarray:
        """P(cell = 1) after `steps` steps, by place [cells], over `rules` and all lines."""
        return np.mean([ones_by_place(rule, steps, self.cells) for rule in self.rules], axis=0)

    def _rows(
        self, split: str, seed: int, count: int | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Steps of each question [n, asked], `input_ids` and `labels` [n, length] of a split."""
        words = FIRST_WORDS + 2 * self.cells
        for parts in draw(split, seed, count, words, self._read):
            yield self._tokens(*parts)

    def _read(self, block: np.ndarray) -> tuple[np.ndarray, ...]:
        """Hashes [n], then which rule, which number of steps, the line, words for the places."""
        rule = block[:, 0] % U64(len(self.rules))
        line = block[:, FIRST_WORDS : FIRST_WORDS + self.cells] % U64(2)
        hashes = mix(np.array(self.rules, dtype=U64)[rule.astype(np.int64)])
        for cell in line.T:
            hashes = mix(hashes ^ cell)
        which = self.drawn[(block[:, 1] % U64(len(self.drawn))).astype(np.int64)]
        places = block[:, FIRST_WORDS + self.cells :]
        return hashes, rule.astype(np.int64), which, line.astype(np.int64), places

    def _tokens(
        self, rule: np.ndarray, which: np.ndarray, line: np.ndarray, places: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `_rows` yields."""
        tables = self.tables[rule]
        after = np.empty_like(line)
        for number, steps in enumerate(self.steps):
            here = which == number
            after[here] = evolve(line[here], tables[here], steps)
        told = self.first_rule + 2 * np.arange(NEIGHBOURHOODS) + tables
        asked = distinct(places, self.cells)[:, : self.asked]
        parts = (
            told[:, : self.told],
            2 * np.arange(self.cells) + line,
            (self.first_step + which)[:, None],
            self.first_place + asked,
            np.full((len(line), 1), self.stop),
        )
        input_ids = np.concatenate(parts, axis=1)
        labels = np.full_like(input_ids, IGNORED)
        labels[:, -self.asked :] = np.take_along_axis(after, asked, axis=1)
        levels = np.repeat(np.array(self.steps)[which][:, None], self.asked, axis=1)
        return levels, input_ids, labels


def evolve(lines: np.ndarray, tables: np.ndarray, steps: int) -> np.ndarray:
    """`steps` steps on `lines` [n, cells]; `tables` [n or 1, 8]: what follows each neighbourhood.

    A neighbourhood is `4 * x[i - 2] + 2 * x[i - 1] + x[i]`; in front of a line are endless zeros.
    """
    tables = np.broadcast_to(tables, (len(lines), NEIGHBOURHOODS))
    front = np.zeros((len(lines), 1), dtype=lines.dtype)
    for _ in range(steps):
        padded = np.concatenate([front, front, lines], axis=1)
        seen = 4 * padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
        lines = np.take_along_axis(tables, seen, axis=1).astype(lines.dtype)
        front = np.take_along_axis(tables, 7 * front.astype(np.int64), axis=1).astype(lines.dtype)
    return lines


@lru_cache(maxsize=4096)
def ones_by_place(rule: int, steps: int, cells: int) -> np.ndarray:
    """P(cell = 1) after `steps` steps of `rule`, by place [cells], over all lines; exact."""
    # Further back than 2 * steps nothing reaches a cell, nor does the front.
    width = min(cells, 2 * steps + 1)
    numbers = np.arange(1 << width)
    lines = ((numbers[:, None] >> np.arange(width)) & 1).astype(np.uint8)
    table = ((np.array([rule])[:, None] >> np.arange(NEIGHBOURHOODS)) & 1).astype(np.uint8)
    ones = evolve(lines, table, steps).mean(axis=0)
    return np.concatenate([ones, np.full(cells - width, ones[-1])])
