"""Depo: a directed cycle printed edge by edge in random order; which node lies k steps on?

After "Physics of Language Models: Part 4.1" (arXiv 2512.17351), as "Do Language Models Need Sleep?"
(arXiv 2605.26099) has it: the cycle has left the window by the time it is asked about, so that its
k steps must be prepared in a sleep.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from hybrid_sleep.eval.tasks.base import IGNORED, LARGEST_SIZE, Majority, Task, check_asked
from hybrid_sleep.eval.tasks.depo_floor import ENUMERATED_NODES, best_guess
from hybrid_sleep.eval.tasks.sampling import U64, draw, mix
from hybrid_sleep.validation import check_choice, check_count

if TYPE_CHECKING:
    import torch

PAD = 0
CONTEXT_WINDOWS = 4
FEWEST_CYCLES = 1024  # fewer longest cycles than this might leave the test split empty
LARGEST_NUMBER = 1 << 32

VARIANTS = {
    "paper": {"nodes": 75, "hops": 16, "queries": 10, "alphabet": 50, "shortest": 1, "longest": 2},
    "depo1": {"nodes": 225, "hops": 8, "queries": 10, "alphabet": 50, "shortest": 1, "longest": 2},
    "depo2": {"nodes": 75, "hops": 16, "queries": 10, "alphabet": 3, "shortest": 5, "longest": 7},
}

# Least and most of what has other limits than 1..100,000; a name is a number of 32 bits.
LIMITS = {"nodes": (3, 10_000), "shortest": (1, 32), "longest": (1, 32)}


class Depo(Task):
    """A cycle of up to `nodes` named nodes, then up to `queries` questions of up to `hops` steps.

    A name is `shortest`..`longest` letters of `alphabet`, the last one marked as such; all names of
    a cycle differ. Cycle: each edge as its two names, in random order. Question: the token of k,
    the start's name, the answer token, the name k steps on; starts differ. Training draws n in
    3..`nodes` with p(n) ~ 1 / (n + sqrt(nodes)) and k in 1..`hops`; the test has n = `nodes` and,
    equally often, k = 1, 2, 4... up to `hops` (and 24 for `hops` = 32, and `hops` itself).

    `variant` gives the defaults. `paper`: 300 tokens of cycle, 60 of questions, names supervised.
    `depo1`, `depo2`, after the released code: a BOS before the first edge, and the answer token is
    supervised as well.

    Layout: the cycle, padded on its left, then the questions, padded on their right. `window` is
    a quarter of the longest cycle part, or all questions if they are longer; the cycle part is
    padded to whole windows. Pads are tokens that are read, with no mask: masked ones would not
    count towards windows, and only as they do count do the questions, the one supervised window,
    open a fresh one however short the cycle is. Each answer is predicted within that window.

    Tokens: 0 pad, then letters, last letters, the `hops` values of k, the answer token (and BOS).

    Train and test cycles are disjoint for any seeds: a 64-bit hash of the set of edges, whatever
    their order, decides (one in 16 is test). Examples come from raw Philox words.

    Raises ValueError for an unknown variant, nodes < 3, longest not in shortest..shortest + 2, any
    other number < 1, names fewer than the nodes or too few for 1024 cycles, or
    (alphabet + 1)**longest > 2**32.
    """

    name = "depo"
    difficulty = "hops"
    # A token of k stands between two answers, so each unbroken run of labels is one answer.
    question = "run"

    def __init__(
        self,
        variant: str = "paper",
        nodes: int | None = None,
        hops: int | None = None,
        queries: int | None = None,
        alphabet: int | None = None,
        shortest: int | None = None,
        longest: int | None = None,
    ):
        check_choice("variant", variant, tuple(VARIANTS))
        given = (nodes, hops, queries, alphabet, shortest, longest)
        chosen = {
            name: check_count(
                name, default if value is None else value, *LIMITS.get(name, (1, LARGEST_SIZE))
            )
            for (name, default), value in zip(VARIANTS[variant].items(), given, strict=True)
        }
        self.nodes, self.hops, self.queries, self.alphabet, shortest, longest = chosen.values()
        if not shortest <= longest <= shortest + 2:
            raise ValueError(
                f"longest must lie in shortest={shortest}..{shortest + 2}, got {longest}"
            )
        self.lengths = range(shortest, longest + 1)
        names = sum(self.alphabet**length for length in self.lengths)
        if names < self.nodes or (self.alphabet + 1) ** longest > LARGEST_NUMBER:
            raise ValueError(
                f"alphabet and longest must make at least nodes={self.nodes} names, and (alphabet "
                f"+ 1)**longest be at most {LARGEST_NUMBER}, got alphabet={self.alphabet}, "
                f"longest={longest}: {names} names"
            )
        cycles = math.comb(names, self.nodes) * math.factorial(self.nodes - 1)
        if cycles < FEWEST_CYCLES:
            raise ValueError(
                f"nodes must make at least {FEWEST_CYCLES} cycles, so that neither split is empty, "
                f"got {self.nodes} of {names} names: {cycles} cycles"
            )
        self.variant = variant
        self.shortest, self.longest = shortest, longest
        self.params = {"variant": variant, **chosen}
        self.original = variant != "paper"
        self.asked = 2 * self.alphabet  # the token of k is this + k
        self.answer = self.asked + self.hops + 1
        self.bos = self.answer + 1
        self.vocab_size = self.bos + self.original
        cycle = self.original + 2 * self.nodes * longest
        questions = self.queries * (2 + 2 * longest)
        self.window = max(-(-cycle // CONTEXT_WINDOWS), questions)
        self.context = -(-cycle // self.window) * self.window
        self.length = self.context + questions
        powers = {1 << power for power in range(self.hops.bit_length())}
        self.test_hops = sorted(powers | {self.hops} | ({24} if self.hops == 32 else set()))
        self.train_hops = list(range(1, self.hops + 1))

    def _examples(self, split: str, seed: int, count: int | None) -> Iterator[dict[str, Any]]:
        for input_ids, labels in self._rows(split, seed, count):
            for tokens, label in zip(input_ids.tolist(), labels.tolist(), strict=True):
                read = self.parse(tokens)
                meta = {"n": len(read["edges"]), "difficulty": [k for k, _, _ in read["queries"]]}
                meta = {"task": self.name, **self.params, **meta}
                yield {"input_ids": tokens, "labels": label, "meta": meta}

    def _batch(self, split: str, seed: int, count: int) -> dict[str, torch.Tensor]:
        import torch

        parts = zip(*self._rows(split, seed, count), strict=True)
        input_ids, labels = (torch.from_numpy(np.concatenate(part)) for part in parts)
        return {"input_ids": input_ids, "labels": labels}

    def parse(self, input_ids: Sequence[int]) -> dict[str, list[tuple[Any, ...]]]:
        """What a sequence says: `edges` [(name, name)] as printed, `queries` [(k, start, answer)].

        Names are tuples of tokens. Raises ValueError if it is no cycle part and questions.
        """
        items: list[tuple[int, ...]] = []
        for token in map(int, input_ids):
            if token == PAD or (self.original and token == self.bos):
                continue
            if items and items[-1][-1] <= self.alphabet:
                items[-1] += (token,)
            else:
                items.append((token,))
        first = next((i for i, item in enumerate(items) if item[0] > self.asked), len(items))
        printed, rest = items[:first], items[first:]
        queries = [rest[i : i + 4] for i in range(0, len(rest), 4)]
        names = printed + [item for query in queries for item in query[1::2]]
        if (
            first % 2
            or len(rest) % 4
            or not all(self.alphabet < name[-1] <= self.asked for name in names)
            or not all(self.asked < query[0][0] < self.answer for query in queries)
            or not all(query[2] == (self.answer,) for query in queries)
        ):
            raise ValueError(
                "input_ids must be pairs of names, then questions (k, name, answer token, name), "
                f"got {list(map(int, input_ids))}"
            )
        return {
            "edges": list(zip(printed[::2], printed[1::2], strict=True)),
            "queries": [(k[0] - self.asked, start, name) for k, start, _, name in queries],
        }

    def floor(self) -> dict[int, float]:
        """The best guess of a model that knows the nodes of a cycle, but not their order, by k.

        It also knows the questions and answers before. Up to 8 nodes it is enumerated over all
        cycles and, where that is short, all sequences of k (otherwise 512 drawn ones: see
        `best_guess`). With more nodes it is the best guess of first questions, a lower bound: later
        ones are hardly easier with 10 questions on 75 nodes, but much easier where most nodes are
        asked about.
        """
        if self.nodes <= ENUMERATED_NODES:
            questions = min(self.queries, self.nodes)
            return dict(best_guess(self.nodes, questions, tuple(self.test_hops))[0])
        # Once round the cycle lies the start itself.
        return {k: 1 / (self.nodes - 1) if k % self.nodes else 1.0 for k in self.test_hops}

    def majority(self) -> Majority:
        """What always guessing the most frequent token scores (of letters, all alike, the first).

        An example has only one answer, then, whose name has one letter, and all its questions meet
        in that node.
        """
        shares = _length_shares(self.nodes, self.alphabet, self.lengths)
        letters = sum(share * length for share, length in zip(shares, self.lengths, strict=True))
        # Occurrences a question, by kind of token.
        kinds = {1: (letters - 1) / self.alphabet, self.alphabet + 1: 1 / self.alphabet}
        if self.original:
            kinds[self.answer] = 1.0
        token = max(kinds, key=kinds.__getitem__)
        exact = 0.0
        if self.shortest == 1 and not self.original:
            # One node for all: k differ as the starts do, and any of `nodes` may be the one.
            residues = [k % self.nodes for k in self.test_hops]
            queries = min(self.queries, self.nodes)
            kept = [residues.count(r) / len(residues) for r in set(residues)]
            differ = sum(map(math.prod, itertools.combinations(kept, queries)))
            one_node = differ * self.nodes / math.comb(self.nodes, queries)
            exact = shares[0] / self.alphabet * one_node
        return Majority(exact, kinds[token] / (letters + self.original), (token,))

    def chance(self) -> float:
        """A uniform guess among the other nodes, which knows that once round lies the start."""
        elsewhere = sum(k % self.nodes != 0 for k in self.test_hops) / len(self.test_hops)
        return 1 - elsewhere + elsewhere / (self.nodes - 1)

    def only(self, *difficulties: int) -> Depo:
        """The same cycles and tokens, `difficulties` steps asked for."""
        task = copy.copy(self)
        task.test_hops = task.train_hops = check_asked(difficulties, "hops", self.train_hops)
        return task

    def describe(self, example: Mapping[str, Any]) -> str:
        """The cycle of an example in its order, and each question with its answer."""
        read = self.parse(example["input_ids"])
        words = {name: "-".join(map(str, name)) for edge in read["edges"] for name in edge}
        follows = dict(read["edges"])
        cycle = [read["edges"][0][0]]
        while len(cycle) < len(follows):
            cycle.append(follows[cycle[-1]])
        lines = [f"cycle of {len(cycle)}: {' > '.join(words[name] for name in cycle)}"]
        for k, start, answer in read["queries"]:
            steps = "step" if k == 1 else "steps"
            lines.append(f"{k} {steps} from {words[start]}: {words[answer]}")
        return "\n".join(lines)

    def _rows(
        self, split: str, seed: int, count: int | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """`input_ids` and `labels` [n, length] of a split, `count` in all, however sliced."""
        rises = np.cumsum(1 / (np.arange(3, self.nodes + 1) + math.sqrt(self.nodes)))
        # An example's words: its size, candidates for names, their order, what `_tokens` reads.
        order = 1 + self.nodes + self.nodes // 2 + 16
        rest = order + self.nodes

        def read(block: np.ndarray) -> tuple[np.ndarray, ...]:
            uniform = (block[:, 0] >> U64(11)) * 2.0**-53
            sizes = 3 + np.searchsorted(rises[:-1], uniform * rises[-1], side="right")
            if split == "test":
                sizes[:] = self.nodes
            names = self._names(block[:, 1:order], block[:, order:rest], sizes)
            return self._hash(names, sizes), names, sizes, block[:, rest:]

        words = rest + 2 * self.nodes + self.queries
        for names, sizes, spare in draw(split, seed, count, words, read):
            yield self._tokens(split, names, sizes, spare)

    def _names(self, words: np.ndarray, keys: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Numbers of the names of each cycle, in its order: [n, nodes], the first `size` count."""
        ids, fresh = self._number(words), words
        while True:
            order = np.argsort(ids, axis=1, kind="stable")
            ordered = np.take_along_axis(ids, order, axis=1)
            new = np.ones(ids.shape, dtype=bool)
            np.put_along_axis(new, order[:, 1:], ordered[:, 1:] != ordered[:, :-1], axis=1)
            rank = np.cumsum(new, axis=1)
            if (rank[:, -1] >= sizes).all():
                break
            # Some cycle ran out of different names: go on with words made of its own.
            fresh = mix(fresh)
            ids = np.concatenate([ids, self._number(fresh)], axis=1)
        row, column = np.nonzero(new & (rank <= sizes[:, None]))
        names = np.zeros((len(words), self.nodes), dtype=U64)
        names[row, rank[row, column] - 1] = ids[row, column]
        return np.take_along_axis(names, _shuffled(keys, sizes), axis=1)

    def _number(self, words: np.ndarray) -> np.ndarray:
        """The name each word [...] stands for, as a number: its letters are its digits."""
        lengths = U64(len(self.lengths))
        places = np.arange(self.longest, dtype=U64)
        digits = (words // lengths)[..., None] // U64(self.alphabet) ** places % U64(self.alphabet)
        there = places < (words % lengths)[..., None] + U64(self.shortest)
        return ((digits + U64(1)) * there * U64(self.alphabet + 1) ** places).sum(-1, dtype=U64)

    def _spell(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of names [...] as [..., longest], 0 after the last letter."""
        base = U64(self.alphabet + 1)
        places = np.arange(self.longest, dtype=U64)
        tokens = (numbers[..., None] // base**places % base).astype(np.int64)
        follows = np.pad(tokens, [*[(0, 0)] * numbers.ndim, (0, 1)])[..., 1:]
        return tokens + self.alphabet * ((tokens > 0) & (follows == 0))

    def _hash(self, names: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """A 64-bit hash of each cycle [n], the same from whichever node it is told."""
        slots = np.arange(self.nodes)
        after = np.take_along_axis(names, (slots + 1) % sizes[:, None], axis=1)
        edges = mix((names << U64(32)) | after)
        edges[slots >= sizes[:, None]] = 0
        return mix(edges.sum(axis=1, dtype=U64))

    def _tokens(
        self, split: str, names: np.ndarray, sizes: np.ndarray, words: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`input_ids` and `labels`, int64 [n, length], of cycles `names` [n, nodes]."""
        rows, column = len(names), sizes[:, None]
        edges, starts, hops = np.split(words, [self.nodes, 2 * self.nodes], axis=1)
        spelled = self._spell(names)
        spelled[np.arange(self.nodes) >= column] = PAD

        def take(slots: np.ndarray) -> np.ndarray:
            return np.take_along_axis(spelled, slots[:, :, None], axis=1)

        edges = _shuffled(edges, sizes)
        # A slot past the cycle's end wraps into it; its first name is blank, its second must be.
        ends = take((edges + 1) % column) * (edges < column)[:, :, None]
        printed = np.concatenate([take(edges), ends], axis=2).reshape(rows, -1)
        if self.original:
            printed = np.pad(printed, ((0, 0), (1, 0)), constant_values=self.bos)

        allowed = self.test_hops if split == "test" else self.train_hops
        starts = _shuffled(starts, sizes)[:, : self.queries]
        which = (hops[:, : starts.shape[1]] % U64(len(allowed))).astype(np.int64)
        hops = np.array(allowed)[which]
        asks = (self.asked + hops)[:, :, None]
        marks = np.full_like(asks, self.answer)
        asked = np.concatenate([asks, take(starts), marks, take((starts + hops) % column)], axis=2)
        asked[starts >= column] = PAD
        labels = np.full_like(asked, IGNORED)
        answers = slice(1 + self.longest if self.original else 2 + self.longest, None)
        labels[:, :, answers] = np.where(asked == PAD, IGNORED, asked)[:, :, answers]

        # Sorted by being a pad or not, and by nothing else, tokens close ranks on one side.
        order = np.argsort(printed != PAD, axis=1, kind="stable")
        printed = np.take_along_axis(printed, order, axis=1)
        printed = np.pad(printed, ((0, 0), (self.context - printed.shape[1], 0)))
        order = np.argsort(asked.reshape(rows, -1) == PAD, axis=1, kind="stable")
        parts = [np.take_along_axis(x.reshape(rows, -1), order, axis=1) for x in (asked, labels)]
        ending = ((0, 0), (0, self.length - self.context - order.shape[1]))
        input_ids = np.concatenate([printed, np.pad(parts[0], ending)], axis=1)
        supervised = np.full_like(input_ids, IGNORED)
        supervised[:, self.context : self.context + order.shape[1]] = parts[1]
        return input_ids, supervised


def _shuffled(keys: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """A permutation of each row's slots [n, nodes] that keeps the first `size` first."""
    beyond = np.arange(keys.shape[1]) >= sizes[:, None]
    return np.argsort(np.where(beyond, ~U64(0), keys >> U64(1)), axis=1, kind="stable")


@lru_cache(maxsize=64)
def _length_shares(nodes: int, alphabet: int, lengths: range) -> list[float]:
    """Expected share of each length among `nodes` different names, drawn one after another.

    Duplicates are rejected, which thins out lengths with few names: a Markov chain in the number
    of names of each length, summed over all its states.
    """
    kinds = len(lengths)
    counts = np.indices((nodes + 1,) * (kinds - 1))
    chain = np.zeros((nodes + 1,) * (kinds - 1))
    chain[(0,) * (kinds - 1)] = 1.0
    for drawn in range(nodes):
        taken = [*counts, drawn - counts.sum(axis=0)]
        room = [np.clip(1 - t / alphabet**n, 0, 1) for t, n in zip(taken, lengths, strict=True)]
        flow = chain / np.maximum(sum(room), np.finfo(float).tiny)
        chain = flow * room[-1]
        for axis in range(kinds - 1):
            chain = chain + np.roll(flow * room[axis], 1, axis)
    shares = [float((chain * count).sum()) / nodes for count in counts]
    return [*shares, 1 - sum(shares)]
