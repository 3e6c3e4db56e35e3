"""What word problems of groups have in common: a word of elements, and products of its prefixes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from hybrid_sleep.eval.tasks.base import IGNORED, Majority, RowTask
from hybrid_sleep.eval.tasks.groups import Group
from hybrid_sleep.eval.tasks.sampling import U64, distinct, draw, mix
from hybrid_sleep.validation import check_choice, check_count

LAYOUTS = ("recall", "tagging")
FEWEST_WORDS = 4096  # so that neither split is empty, and the test split hardly lopsided

MOST_ELEMENTS = 10_000


class PrefixProducts(RowTask):
    """A word of random group elements; what is the product of its first t?

    Elements are drawn evenly and independently, so that the product of each prefix is uniform over
    the group and independent of those of other prefixes. A question is one product, its difficulty
    the number of elements multiplied.

    `layout="recall"`: `elements` fill `windows` windows. Then, in a window of their own, the token
    of t and the product of the first t, which is the label, for each t of `prefixes` (by default 1,
    2, 4... and `elements`) in random order: what comes next is known only when the word has gone.

    `layout="tagging"`, the literature's: each element is tagged with the product up to it. Labels
    are shifted inside the model, so the tag of an element stands in `labels` one position after it
    (where `input_ids` holds the next element, never a product), and a stop token ends the row to
    make room for the last. Up to `windows` windows cut the row. Each is supervised, so that a model
    sleeps in training with `sleep_schedule: every_window` only. Difficulties are rounded up to
    powers of two (at most `elements`).

    Tokens: elements 0..order - 1, then those of `prefixes`, ascending, or the stop token.

    Train and test words are disjoint for any seeds: a 64-bit hash of the word decides (one in 16
    is test). Examples come from raw Philox words.
    """

    difficulty = "elements"
    question = "label"
    product: ClassVar[str] = "product"

    def __init__(
        self,
        group: Group,
        elements: int,
        layout: str,
        windows: int,
        prefixes: Sequence[int] | None,
    ):
        self.group, self.order = group, len(group)
        self.elements = check_count("elements", elements, 2, MOST_ELEMENTS)
        check_count("windows", windows)
        if self.order**self.elements < FEWEST_WORDS:
            raise ValueError(
                f"elements must make at least {FEWEST_WORDS} words, so that neither split is "
                f"small, got {elements}, which make {self.order**self.elements}"
            )
        check_choice("layout", layout, LAYOUTS)
        self.layout = layout
        self.params = {"elements": self.elements, "layout": layout, "windows": windows}
        if layout == "tagging":
            if prefixes is not None:
                raise ValueError(
                    "prefixes must be None with layout='tagging', where every element is tagged, "
                    f"got {prefixes!r}"
                )
            if windows > self.elements:
                raise ValueError(f"windows must be at most elements={elements}, got {windows}")
            self.prefixes = list(range(1, self.elements + 1))
            self.length = self.elements + 1
            self.window = -(-self.length // windows)
            self.vocab_size = self.order + 1
            return
        self.prefixes = self.params["prefixes"] = self._check_prefixes(prefixes)
        asked = 2 * len(self.prefixes)
        self.window = self.elements // windows
        if self.elements % windows or asked > self.window:
            raise ValueError(
                f"windows must divide elements={elements} and leave at least {asked} elements, the "
                f"tokens of {len(self.prefixes)} questions, to a window, got {windows}"
            )
        self.length = self.elements + asked
        self.vocab_size = self.order + len(self.prefixes)

    def _check_prefixes(self, prefixes: Any) -> list[int]:
        """`prefixes` ascending; ValueError unless None or different ones of 1..elements."""
        if prefixes is None:
            powers = {1 << power for power in range(self.elements.bit_length())}
            return sorted(powers | {self.elements})
        given = prefixes if isinstance(prefixes, Sequence) and not isinstance(prefixes, str) else []
        chosen = {check_count("prefixes", t) for t in given}
        if not chosen or len(chosen) < len(given) or max(chosen) > self.elements:
            raise ValueError(
                "prefixes must be a list of one or more different integers of "
                f"1..{self.elements}, got {prefixes!r}"
            )
        return sorted(chosen)

    def parse(self, input_ids: Sequence[int]) -> dict[str, list]:
        """The `word`, and `queries` [(t, product of its first t)] as asked; all of it in tokens.

        A product is what the sequence says in the layout `recall`, worked out in `tagging`.
        """
        tokens = [int(token) for token in input_ids]
        word, rest = tokens[: self.elements], tokens[self.elements :]
        if self.layout == "tagging":
            asked, answers = list(range(1, self.elements + 1)), []
            right = rest == [self.order]
        else:
            asked, answers = [token - self.order for token in rest[::2]], rest[1::2]
            right = sorted(asked) == list(range(len(self.prefixes)))
            asked = [self.prefixes[number] for number in asked] if right else []
        if len(tokens) != self.length or not right or {*word, *answers} - {*range(self.order)}:
            ends = "the stop token" if self.layout == "tagging" else "questions (t, product)"
            raise ValueError(
                f"input_ids must be {self.elements} elements below {self.order}, then {ends}: "
                f"{self.length} tokens, got {tokens}"
            )
        if self.layout == "tagging":
            answers = self.group.prefix_products(np.array(word)).tolist()
        return {"word": word, "queries": list(zip(asked, answers, strict=True))}

    def floor(self) -> dict[int, float]:
        """`chance`, but that in the layout `tagging` the first element is its own product.

        Products of different prefixes are uniform and independent, so that the answers before help
        nobody.
        """
        levels = np.unique(self._difficulty(np.array(self.prefixes)))
        floor = dict.fromkeys(levels.tolist(), self.chance())
        return {**floor, 1: 1.0} if self.layout == "tagging" else floor

    def majority(self) -> Majority:
        """What always guessing one element scores, over all words."""
        return Majority(self.chance() ** len(self.prefixes), per_label=self.chance(), guess=(0,))

    def chance(self) -> float:
        """1 / the order of the group."""
        return 1 / self.order

    def describe(self, example: Mapping[str, Any]) -> str:
        """The word of an example, and the products asked for."""
        read, words = self.parse(example["input_ids"]), self.group.words
        lines = ["word: " + " ".join(words[element] for element in read["word"])]
        if self.layout == "tagging":
            tags = " ".join(words[answer] for _, answer in read["queries"])
            return "\n".join([*lines, f"tags: {tags}"])
        for t, answer in read["queries"]:
            lines.append(f"{self.product} of the first {t}: {words[answer]}")
        return "\n".join(lines)

    def _rows(
        self, split: str, seed: int, count: int | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """See `RowTask`."""
        words = self.elements + len(self.prefixes) * (self.layout == "recall")
        for word, rest in draw(split, seed, count, words, self._read):
            yield self._tokens(word, rest)

    def _read(self, block: np.ndarray) -> tuple[np.ndarray, ...]:
        """Hashes [n], words of the group [n, elements], and the raw words left over."""
        word = block[:, : self.elements] % U64(self.order)
        hashes = np.zeros(len(block), dtype=U64)
        for element in word.T:
            hashes = mix(hashes ^ element)
        return hashes, word.astype(np.int64), block[:, self.elements :]

    def _tokens(
        self, word: np.ndarray, rest: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `_rows` yields, of words [n, elements]."""
        rows = len(word)
        products = self.group.prefix_products(word)
        if self.layout == "tagging":
            counts = np.tile(self.prefixes, (rows, 1))
            input_ids = np.pad(word, ((0, 0), (0, 1)), constant_values=self.order)
            labels = np.pad(products, ((0, 0), (1, 0)), constant_values=IGNORED)
            return self._difficulty(counts), input_ids, labels
        which = distinct(rest, len(self.prefixes))
        counts = np.array(self.prefixes)[which]
        answers = np.take_along_axis(products, counts - 1, axis=1)
        asked = np.stack([self.order + which, answers], axis=2).reshape(rows, -1)
        input_ids = np.concatenate([word, asked], axis=1)
        labels = np.full_like(input_ids, IGNORED)
        labels[:, self.elements + 1 :: 2] = answers
        return self._difficulty(counts), input_ids, labels

    def _difficulty(self, counts: np.ndarray) -> np.ndarray:
        """`counts`, in `tagging` rounded up to powers of two, at most `elements`."""
        if self.layout == "recall":
            return counts
        powers = 1 << np.arange(self.elements.bit_length() + 1)
        return np.minimum(powers[np.searchsorted(powers, counts)], self.elements)
