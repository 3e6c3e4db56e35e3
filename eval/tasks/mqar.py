"""MQAR: pairs of keys and values; which value went with this key?

Multi-query associative recall, after "Zoology: Measuring and Improving Recall in Efficient Language
Models" (arXiv 2312.04927): here the pairs have left the window by the time a key comes back, so
that a sleep has to store them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hybrid_sleep.eval.tasks.base import (
    IGNORED,
    LARGEST_SIZE,
    Majority,
    Task,
    check_asked,
    check_levels,
)
from hybrid_sleep.eval.tasks.sampling import U64, distinct, draw, mix
from hybrid_sleep.validation import check_count, check_flag, check_number

if TYPE_CHECKING:
    import torch

BLANK = 0
FEWEST_SETS = 256  # fewer sets of pairs than this might leave the test split empty


class Mqar(Task):
    """`pairs` keys, each followed by its value; then every key once more, where its value is asked.

    Keys are 1..vocab_size/2 - 1, values vocab_size/2..vocab_size - 1, those of an example all
    different. With m pairs an example of zoology has `length` tokens: k v k v..., then the keys at
    even offsets 2 * gap, each at a gap of its own out of (length - 2 * m) / 2, drawn one after
    another without replacement with p(i) ~ i**(power_a - 1), i = 1, 2...; 1.0 is uniform. Every
    other token is blank: token 0, or with `random_non_queries` any token but a key of the example
    (zoology's may be one by chance, which then looks like a question that nobody asked).

    Labels are shifted inside the model: the value stands in `labels` one position after its key,
    where zoology, which shifts beforehand, has it at the key. As there, `input_ids` never shows
    it: a blank follows the key, so that no answer helps with another.

    Layout: `windows` windows with an equal share of the pairs each, blanks (0) on their left; then
    all questions, blanks (0) on their right if other examples have fewer pairs. `window` is what
    the questions of the fewest pairs take, so each pair has left the window when it is asked for,
    and only the last one is supervised. With one number of pairs the last `length` tokens are
    zoology's example, and with length = 4 * pairs and one window nothing is added to it.

    `pairs` may be a list: each example has one of these numbers, equally often. Train and test are
    disjoint for any seeds: a 64-bit hash of the set of pairs, whatever their order, decides (one in
    16 is test). Examples come from raw Philox words.

    Raises ValueError unless length is even and at least 4 * pairs, there are enough keys and at
    least 256 sets of pairs, windows divides every number of pairs, and power_a > 0. (zoology also
    asks for vocab_size > length, which its own documented example, 12 and 16, does not keep.)
    """

    name = "mqar"
    difficulty = "pairs"
    question = "label"

    def __init__(
        self,
        vocab_size: int = 8192,
        length: int = 64,
        pairs: int | Sequence[int] = 8,
        power_a: float = 0.01,
        random_non_queries: bool = True,
        windows: int = 1,
    ):
        self.vocab_size = check_count("vocab_size", vocab_size, 2, LARGEST_SIZE)
        self.levels = self.asked = check_levels("pairs", pairs, 1)
        self.windows = check_count("windows", windows, 1, LARGEST_SIZE)
        fewest, self.most = self.levels[0], self.levels[-1]
        if check_count("length", length, 4, LARGEST_SIZE) % 2 or length < 4 * self.most:
            raise ValueError(
                f"length must be even and at least 4 * pairs = {4 * self.most}, got {length}"
            )
        if any(level % windows for level in self.levels):
            raise ValueError(f"windows must divide pairs={pairs}, got {windows}")
        check_number("power_a", power_a, above=0)
        check_flag("random_non_queries", random_non_queries)
        self.first_value = vocab_size // 2
        self.keys, self.values = self.first_value - 1, vocab_size - self.first_value
        if self.keys < self.most:
            raise ValueError(
                f"vocab_size must be at least {2 * self.most + 2}, for {self.most} different keys, "
                f"got {vocab_size}"
            )
        sets = math.comb(self.keys, fewest) * math.perm(self.values, fewest)
        if sets < FEWEST_SETS:
            raise ValueError(
                f"vocab_size and pairs must make at least {FEWEST_SETS} sets of pairs, so that "
                f"neither split is empty, got {vocab_size} and {fewest}: {sets} sets"
            )
        self.power_a, self.random_non_queries = float(power_a), random_non_queries
        self.params = {
            "vocab_size": self.vocab_size,
            "length": int(length),
            "pairs": self.most if len(self.levels) == 1 else list(self.levels),
            "power_a": self.power_a,
            "random_non_queries": random_non_queries,
            "windows": self.windows,
        }
        self.window = length - 2 * fewest
        self.length = (self.windows + 1) * self.window

    def _examples(self, split: str, seed: int, count: int | None) -> Iterator[dict[str, Any]]:
        for pairs, input_ids, labels in self._rows(split, seed, count):
            for row, number in enumerate(pairs.tolist()):
                yield {
                    "input_ids": input_ids[row].tolist(),
                    "labels": labels[row].tolist(),
                    "meta": {"task": self.name, **self.params, "difficulty": [number] * number},
                }

    def _batch(self, split: str, seed: int, count: int) -> dict[str, torch.Tensor]:
        import torch

        parts = list(zip(*self._rows(split, seed, count), strict=True))[1:]
        input_ids, labels = (torch.from_numpy(np.concatenate(part)) for part in parts)
        return {"input_ids": input_ids, "labels": labels}

    def parse(self, input_ids: Sequence[int]) -> dict[str, list[tuple[int, ...]]]:
        """`pairs` [(key, value)] as shown; `queries` [(position, key, value)] as asked."""
        tokens = [int(token) for token in input_ids]
        shown: list[int] = []
        for start in range(0, len(tokens) - self.window, self.window):
            part = tokens[start : start + self.window]
            first = next((i for i, token in enumerate(part) if token != BLANK), len(part))
            shown += part[first:]
        pairs = dict(zip(shown[::2], shown[1::2], strict=False))
        start = self.windows * self.window
        asked = [at for at in range(start, len(tokens), 2) if tokens[at] in pairs]
        if (
            len(tokens) != self.length
            or len(shown) != 2 * len(pairs)
            or len(pairs) not in self.levels
            or not all(1 <= key < self.first_value for key in pairs)
            or not all(self.first_value <= value < self.vocab_size for value in pairs.values())
            or sorted(tokens[at] for at in asked) != sorted(pairs)
        ):
            raise ValueError(
                f"input_ids must be {self.windows} windows of {self.window} tokens, blanks and "
                f"then pairs, and one in which each key is asked for once, got {tokens}"
            )
        queries: list[tuple[int, ...]] = [(at, tokens[at], pairs[tokens[at]]) for at in asked]
        return {"pairs": list(pairs.items()), "queries": queries}

    def floor(self) -> dict[int, float]:
        """`chance`: values are uniform, and neither keys, gaps nor other questions predict them."""
        return dict.fromkeys(self.asked, self.chance())

    def majority(self) -> Majority:
        """What always guessing one value scores; `exact` is 0 with several pairs: values differ."""
        exact = self.chance() * (self.asked[0] == 1) / len(self.asked)
        return Majority(exact, per_label=self.chance(), guess=(self.first_value,))

    def chance(self) -> float:
        """1 / the number of values."""
        return 1 / self.values

    def only(self, *difficulties: int) -> Mqar:
        """The same layout, `difficulties` pairs in an example, each number equally often."""
        task = copy.copy(self)
        task.asked = tuple(check_asked(difficulties, "pairs", self.levels))
        return task

    def describe(self, example: Mapping[str, Any]) -> str:
        """The pairs of an example, and the keys asked for with their values."""
        read = self.parse(example["input_ids"])
        start = self.windows * self.window
        lines = ["pairs: " + ", ".join(f"{key} has {value}" for key, value in read["pairs"])]
        for at, key, value in read["queries"]:
            lines.append(f"{key} at offset {at - start} of the questions: {value}")
        return "\n".join(lines)

    def _rows(
        self, split: str, seed: int, count: int | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Numbers of pairs [n], `input_ids` and `labels` [n, length] of a split."""
        blanks = self.window if self.random_non_queries else 0
        words = 1 + 2 * self.most + self.window // 2 + blanks
        for pairs, keys, values, rest in draw(split, seed, count, words, self._read):
            yield pairs, *self._tokens(pairs, keys, values, rest)

    def _read(self, block: np.ndarray) -> tuple[np.ndarray, ...]:
        """Hashes, numbers of pairs, keys and values [n, most], and the words left over."""
        which, keys, values, rest = np.split(
            block, [1, 1 + self.most, 1 + 2 * self.most], axis=1
        )
        pairs = np.array(self.asked)[(which[:, 0] % U64(len(self.asked))).astype(np.int64)]
        keys = 1 + distinct(keys, self.keys)
        values = self.first_value + distinct(values, self.values)
        each = mix((keys.astype(U64) << U64(32)) | values.astype(U64))
        each[np.arange(self.most) >= pairs[:, None]] = 0
        return mix(each.sum(axis=1, dtype=U64)), pairs, keys, values, rest

    def _tokens(
        self, pairs: np.ndarray, keys: np.ndarray, values: np.ndarray, words: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`input_ids` and `labels`, int64 [n, length], of what `_read` gives."""
        rows, space = len(pairs), self.window // 2
        input_ids = np.full((rows, self.length), BLANK)
        labels = np.full_like(input_ids, IGNORED)
        there = np.arange(self.most) < pairs[:, None]
        row, number = np.nonzero(there)

        share = (pairs // self.windows)[row]
        # Counted from its window's end, where each share of the pairs ends too.
        at = (number // share + 1) * self.window - 2 * (share - number % share)
        input_ids[row, at], input_ids[row, at + 1] = keys[there], values[there]

        room = self.window - 2 * (pairs - self.levels[0])
        asked = input_ids[:, self.windows * self.window :]
        if self.random_non_queries:
            blanks = (words[:, space:] % (self.vocab_size - pairs)[:, None].astype(U64)).astype(int)
            # Ascending, the keys of an example are stepped over one by one.
            for key in np.sort(np.where(there, keys, self.vocab_size), axis=1).T:
                blanks += blanks >= key[:, None]
            asked[:] = np.where(np.arange(self.window) < room[:, None], blanks, BLANK)
        # The order in which exponential clocks ring is that of draws without replacement.
        uniform = ((words[:, :space] >> U64(11)) + 0.5) * 2.0**-53
        clocks = -np.log(uniform) * np.arange(1, space + 1) ** (1 - self.power_a)
        clocks[2 * np.arange(space) >= room[:, None]] = np.inf
        offsets = 2 * np.argsort(clocks, axis=1, kind="stable")[:, : self.most][there]
        asked[row, offsets] = keys[there]
        labels[row, self.windows * self.window + offsets + 1] = values[there]
        return input_ids, labels
