"""Layered random circuits: what is the value of a gate, asked when the circuit has left the window?

Half of the gates are not linear, and a state that one layer writes is an affine function of the
values that it carries: one layer cannot compute an AND of two of them and hand it on. So a gate of
level l needs l layers that ran one after the other, and more passes reach what one pass cannot.
Chains of copies and circuits of XOR alone would not: a single delta rule follows them in one scan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import comb
from typing import Any

import numpy as np

from hybrid_sleep.eval.tasks.base import IGNORED, Majority, RowTask, check_asked, check_levels
from hybrid_sleep.eval.tasks.sampling import U64, distinct, draw, mix
from hybrid_sleep.validation import check_choice, check_count

GATES = ("xor", "xnor", "and", "or")
TRUTH = np.array([[0, 1, 0], [1, 0, 1], [0, 0, 1], [0, 1, 1]])  # by gate, and how many inputs are 1
ORDERS = ("topological", "reverse", "random")
LINEAR, NOT_LINEAR = "XOR and XNOR", "AND and OR"
# What a token is, its first digit: an input with a value, a gate of a kind, a question, the stop.
INPUTS, KINDS, QUESTION, STOP = (0, 1), (2, 3, 4, 5), 6, 7
MOST_WIRES = 64
MOST_LEVELS = 256


class Circuit(RowTask):
    """`levels` levels of `wires` gates over `wires` random bits; what is the value of each gate?

    A gate is XOR, XNOR, AND or OR, equally often, of two different wires of the level below it,
    drawn anew for each gate. An input or a gate is one token, which says where it is, what it is
    and what it reads; values are nowhere. Level 0, the inputs, is first where `order` is
    `topological`, last where it is `reverse`. Where it is `random`, the inputs are first and the
    gates behind them in any order, anew for each circuit: on average, half of the gates that a gate
    reads come later than it.

    The circuit fills `windows` windows. Then, in a window of their own, gates of the levels `asked`
    (default: all but the inputs) are asked for, in random order: `queries` of them (default: all),
    each a token that says which. Its value is the label of the position behind it, where
    `input_ids` holds the next question, so that no question sees the answer to another; a stop
    token ends the row.

    The difficulty of a question is the level of its gate. A token has three digits (`token_fields`,
    see `CompoundEmbedding`): what it is (an input that is 0, one that is 1, a gate of the four
    kinds, a question, the stop); which input or gate, by level and wire; and which pair of wires a
    gate reads, 0 in the others. A value as a label is the token of the first input with it.

    Train and test circuits are disjoint for any seeds: a 64-bit hash of inputs and gates, in
    whatever order they stand, decides (one in 16 is test). Examples come from raw Philox words.

    Raises ValueError unless 2 <= wires <= 64, 1 <= levels <= 256, `order` is one of the three,
    `asked` are different levels of 1 to `levels`, `queries` is at least 1 and at most the gates of
    one level, or None, and `windows` divide the `wires * (levels + 1)` tokens of a circuit and
    leave at least as many to each as the questions take.
    """

    name = "circuit"
    difficulty = "level"
    question = "label"

    def __init__(
        self,
        wires: int = 4,
        levels: int = 5,
        order: str = "topological",
        windows: int = 1,
        asked: int | Sequence[int] | None = None,
        queries: int | None = None,
    ):
        self.wires = check_count("wires", wires, 2, MOST_WIRES)
        self.levels = check_count("levels", levels, 1, MOST_LEVELS)
        check_choice("order", order, ORDERS)
        self.order = order
        check_count("windows", windows)
        chosen = range(1, levels + 1) if asked is None else check_levels("asked", asked, 1)
        if max(chosen) > levels:
            raise ValueError(f"asked must be levels of 1 to {levels}, got {asked!r}")
        self.asked = tuple(chosen)
        self.pairs = np.stack(np.triu_indices(wires, 1), axis=1)
        self.gates = wires * levels
        self.nodes = wires + self.gates
        self.token_fields = [STOP + 1, self.nodes, len(self.pairs)]
        self.vocab_size = int(np.prod(self.token_fields))
        self.stop = int(self._token(STOP))
        self.queries = wires * len(self.asked)
        if queries is not None:
            # So that a sequence is as long whatever levels are asked for.
            self.queries = check_count("queries", queries, 1, wires)
        questions = self.queries + 1
        self.window = self.nodes // windows
        if self.nodes % windows or self.window < questions:
            raise ValueError(
                f"windows must divide the {self.nodes} tokens of a circuit and leave at least "
                f"{questions}, those of the questions, to a window, got {windows}"
            )
        self.length = self.nodes + questions
        self.params = {
            "wires": wires,
            "levels": levels,
            "order": order,
            "windows": windows,
            "asked": None if asked is None else list(self.asked),
            "queries": queries,
        }

    def parse(self, input_ids: Sequence[int]) -> dict[str, Any]:
        """`inputs` (bits), `gates` and `queries` of a sequence; see `Circuit`.

        gates: by level from 1 on and wire, (kind, wire read, other wire read). queries: (level,
        wire, value) as asked, values worked out.
        """
        tokens = np.array([int(token) for token in input_ids])
        what, which, pairs = self._digits(tokens)
        circuit, asking = np.split(np.arange(len(tokens) - 1), [self.nodes])
        order = circuit[np.argsort(which[circuit], kind="stable")]
        inputs, gates_at = np.split(order, [self.wires])
        asked = which[asking] - self.wires
        if (
            len(tokens) != self.length
            or tokens[-1] != self.stop
            or not np.array_equal(which[order], np.arange(self.nodes))
            or not np.isin(what[inputs], INPUTS).all()
            or not np.isin(what[gates_at], KINDS).all()
            or (what[asking] != QUESTION).any()
            or pairs[inputs].any()
            or pairs[asking].any()
            or not np.isin(asked, self._questions()).all()
            or len(set(asked.tolist())) < self.queries
            or not self._in_order(which[circuit])
        ):
            raise ValueError(
                f"input_ids must be {self.wires} inputs and {self.gates} gates, each once, in "
                f"{self.order} order, questions for {self.queries} different gates of the levels "
                f"{list(self.asked)} and the stop token {self.stop}: {self.length} tokens, got "
                f"{tokens.tolist()}"
            )
        bits, kinds, pairs = what[inputs], what[gates_at] - KINDS[0], pairs[gates_at]
        values = self.evaluate(bits[None], kinds[None], pairs[None])[0]
        gates = [
            [
                (GATES[kinds[g]], *map(int, self.pairs[pairs[g]]))
                for g in range(level * self.wires, (level + 1) * self.wires)
            ]
            for level in range(self.levels)
        ]
        return {
            "inputs": bits.tolist(),
            "gates": gates,
            "queries": [
                (g // self.wires + 1, g % self.wires, int(values[g])) for g in asked.tolist()
            ],
        }

    def floor(self) -> dict[int, float]:
        """1/2 at every level: of a gate that is asked for, nothing is known but its name.

        Exchange AND and OR, XOR and XNOR, and 0 and 1: every circuit has another one, as likely,
        with all values the other way round. What knowing the gate itself gives: `gate_alone`.
        """
        return dict.fromkeys(self.asked, 0.5)

    def majority(self) -> Majority:
        """What always guessing the same value scores, over all circuits.

        Values of one circuit depend on each other: the share with all of them the same is that of
        circuits whose gates that are asked for are all 0, by enumeration.
        """
        return Majority(self._all_alike(), per_label=0.5, guess=(0,))

    def chance(self) -> float:
        """1/2."""
        return 0.5

    def gate_alone(self) -> dict[int, float]:
        """What the best guess scores, by level, that knows the kind of the gate and no value.

        Exact: how many wires of a level are on is a Markov chain, since given m of W, each gate of
        the next is on with probability 1/4 + m / 2W, independently.
        """
        found = {}
        chances = self._on_after_inputs()
        for level in range(1, self.levels + 1):
            ones = [self._pairs_with(m) for m in range(self.wires + 1)]
            of_kind = [
                sum(p * sum(row[TRUTH[kind] == 1]) for p, row in zip(chances, ones, strict=True))
                for kind in range(len(GATES))
            ]
            if level in self.asked:
                found[level] = float(np.mean([max(p, 1 - p) for p in of_kind]))
            chances = chances @ self._next_on()
        return found

    def only(self, *difficulties: int) -> Circuit:
        """The same circuits and tokens, gates of some levels asked for."""
        return Circuit(
            **{**self.params, "asked": check_asked(difficulties, "levels", self.asked)}
        )

    def kinds(self, example: Mapping[str, Any]) -> list[str]:
        """`LINEAR` or `NOT_LINEAR`: the gate that each question asks for.

        An AND or OR gate is on in one case or three of four, and goes with the sum of its inputs,
        which an affine state can carry. Of an XOR or XNOR gate neither says anything.
        """
        read = self.parse(example["input_ids"])
        asked = (read["gates"][level - 1][wire][0] for level, wire, _ in read["queries"])
        return [LINEAR if gate in GATES[:2] else NOT_LINEAR for gate in asked]

    def describe(self, example: Mapping[str, Any]) -> str:
        """The circuit of an example, level by level, and the gates asked for."""
        read = self.parse(example["input_ids"])
        lines = ["level 0: " + ", ".join(f"{w} = {bit}" for w, bit in enumerate(read["inputs"]))]
        for level, gates in enumerate(read["gates"], start=1):
            said = ", ".join(f"{w} = {a} {kind} {b}" for w, (kind, a, b) in enumerate(gates))
            lines.append(f"level {level}: {said}")
        asked = [f"wire {wire} of level {level}: {x}" for level, wire, x in read["queries"]]
        return "\n".join([*lines, *asked])

    def evaluate(self, inputs: np.ndarray, kinds: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        """The value of each gate, [n, gates], of `inputs: [n, wires]`, `kinds` and `pairs`: [n,
        gates], indices into `GATES` and `self.pairs`; gates are by level and wire.
        """
        below, levels = inputs, []
        for level in range(self.levels):
            these = slice(level * self.wires, (level + 1) * self.wires)
            read = self.pairs[pairs[:, these]].reshape(len(inputs), -1)
            ones = np.take_along_axis(below, read, axis=1).reshape(len(inputs), -1, 2).sum(axis=2)
            below = TRUTH[kinds[:, these], ones]
            levels.append(below)
        return np.concatenate(levels, axis=1)

    def _token(
        self, what: np.ndarray | int, which: np.ndarray | int = 0, pair: np.ndarray | int = 0
    ) -> np.ndarray:
        """The token of these digits."""
        return (np.asarray(what) * self.nodes + which) * len(self.pairs) + pair

    def _digits(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What each token is, which node, and the pair that it reads."""
        rest, pair = np.divmod(tokens, len(self.pairs))
        return *np.divmod(rest, self.nodes), pair

    def _questions(self) -> np.ndarray:
        """The gates that are asked for, ascending."""
        levels = np.array(self.asked)[:, None] - 1
        return (levels * self.wires + np.arange(self.wires)).ravel()

    def _in_order(self, nodes: np.ndarray) -> bool:
        ahead = nodes[::-1] if self.order == "reverse" else nodes
        fixed = self.wires if self.order == "random" else self.nodes
        return np.array_equal(ahead[:fixed], np.arange(fixed))

    def _rows(
        self, split: str, seed: int, count: int | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Level of each question [n, questions], `input_ids` and `labels` [n, length] of a split.

        Circuits do not depend on what is asked of them, nor on their order.
        """
        words = self.nodes + self.gates + (self.gates if self.order == "random" else 0)
        for parts in draw(split, seed, count, words, self._read):
            yield self._tokens(*parts)

    def _read(self, block: np.ndarray) -> tuple[np.ndarray, ...]:
        """Hashes [n], then inputs, kinds, pairs, words for questions and for the order."""
        drawn = block[:, : self.nodes]
        inputs = drawn[:, : self.wires] % U64(2)
        # Low bits for the kind, others for the pair.
        kinds = drawn[:, self.wires :] % U64(len(GATES))
        pairs = (drawn[:, self.wires :] >> U64(8)) % U64(len(self.pairs))
        hashes = np.zeros(len(block), dtype=U64)
        for part in (*inputs.T, *kinds.T, *pairs.T):
            hashes = mix(hashes ^ part)
        rest = block[:, self.nodes :]
        whole = (x.astype(np.int64) for x in (inputs, kinds, pairs))
        return hashes, *whole, rest[:, : self.gates], rest[:, self.gates :]

    def _tokens(
        self,
        inputs: np.ndarray,
        kinds: np.ndarray,
        pairs: np.ndarray,
        asking: np.ndarray,
        mixing: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `_rows` yields."""
        values = self.evaluate(inputs, kinds, pairs)
        wires, gates = np.split(np.arange(self.nodes), [self.wires])
        reading = self._token(KINDS[0] + kinds, gates, pairs)
        if self.order == "random":
            reading = np.take_along_axis(reading, distinct(mixing, self.gates), axis=1)
        circuit = np.concatenate([self._token(inputs, wires), reading], axis=1)
        if self.order == "reverse":
            circuit = circuit[:, ::-1]
        questions = self._questions()
        asked = questions[distinct(asking[:, : self.queries], len(questions))]
        asking_for = self._token(QUESTION, self.wires + asked)
        stop = np.full((len(inputs), 1), self.stop)
        input_ids = np.concatenate([circuit, asking_for, stop], axis=1)
        labels = np.full_like(input_ids, IGNORED)
        labels[:, self.nodes + 1 :] = self._token(np.take_along_axis(values, asked, axis=1))
        return asked // self.wires + 1, input_ids, labels

    def _pairs_with(self, on: int) -> np.ndarray:
        """The shares of pairs of wires of which 0, 1 and 2 are on, if `on` of all wires are."""
        off = self.wires - on
        found = [comb(off, 2), on * off, comb(on, 2)]
        return np.array(found) / len(self.pairs)

    def _on_after_inputs(self) -> np.ndarray:
        """The probability that 0, 1... inputs are on."""
        return np.array([comb(self.wires, m) for m in range(self.wires + 1)]) / 2**self.wires

    def _next_on(self) -> np.ndarray:
        """[m, k]: the probability that k gates are on above a level of which m are."""
        counts = np.arange(self.wires + 1)
        p = (1 / 4 + counts / (2 * self.wires))[:, None]
        ways = np.array([comb(self.wires, k) for k in counts])
        return ways * p**counts * (1 - p) ** (self.wires - counts)

    def _all_alike(self) -> float:
        """The probability that all gates that are asked for are off."""
        gates = self.wires * len(self.asked)
        # [m, o]: m gates of the level are on, and o of the levels `asked` up to it are off.
        chances = np.zeros((self.wires + 1, gates + 1))
        chances[:, 0] = self._on_after_inputs()
        for level in range(1, max(self.asked) + 1):
            chances = self._next_on().T @ chances
            if level in self.asked:
                chances = np.stack([np.roll(x, self.wires - m) for m, x in enumerate(chances)])
        ways = np.array([comb(off, self.queries) for off in range(gates + 1)], dtype=float)
        return float(chances.sum(axis=0) @ ways / comb(gates, self.queries))
