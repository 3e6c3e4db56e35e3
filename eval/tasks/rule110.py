"""Rule 110 on a ring: what is the leftmost cell of each of several states after `steps` steps?

The answer needs `steps` rounds of computation on text that has left the window, which is what a
sleep is for. The ring is periodic: with a zero boundary the leftmost cell can only ever turn on,
so that a constant guess would be right nearly always.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from hybrid_sleep.eval.tasks.base import (
    IGNORED,
    LARGEST_SIZE,
    SPLITS,
    Majority,
    Task,
    check_asked,
    check_levels,
)
from hybrid_sleep.eval.tasks.sampling import TEST_SHARE, THRESHOLD, U64, draw
from hybrid_sleep.validation import check_count

if TYPE_CHECKING:
    import torch

SEP = 2
RANKED_BITS = 16  # up to this many context bits, the split is by rank so that no split is empty
ENUMERATED_CELLS = 28  # up to this many cells the floor is exact
SAMPLED_STATES = 1 << 24
MOST_WORK = 1 << 18  # steps times width
SLICE_CELLS = 1 << 27  # of all rings of a slice
MOST_WORDS = 1 << 29  # of 64 rings, over all steps of a sample
MOST_ENUMERATED = 1 << 32  # and of an enumeration
SLICE_STATES = 1 << 17  # states a slice of the enumeration holds: its planes stay in cache


class Rule110(Task):
    """`states` random rings of `width` cells, a separator, then one label per ring.

    A cell becomes bit `4*left + 2*self + right` of 110; label i is the leftmost cell of ring i
    after `steps` steps (`steps=0`: plain retrieval). Tokens: cells 0 and 1, separator 2. An
    example is `states * width` cells, leftmost first, the separator, `states` labels; labels are
    -100 except for the last `states`, so the separator predicts the first label.

    With several `steps`, each example has one of them, equally often, and its separator says which:
    token 2 for the smallest number, 3 for the next. So what a sleep has to prepare is known only
    when the past has gone.

    Train and test contexts are disjoint for any seeds: a 64-bit hash of all `states * width`
    cells of a context, which knows nothing of the labels, decides which split it belongs to
    (one in 16 is test), and a drawn context of the other split is passed over. Single rings do
    recur: what is new in the test split is the context, not each ring in it. Contexts are drawn
    with replacement, from raw Philox words, whose stream is the same in every numpy version.

    Raises ValueError unless width >= 3, states >= 1, and steps is an integer >= 0 or a list of
    different ones.
    """

    name = "rule110"
    difficulty = "steps"

    def __init__(self, width: int = 24, states: int = 4, steps: int | Sequence[int] = 8):
        self.width = check_count("width", width, 3, LARGEST_SIZE)
        self.states = check_count("states", states, 1, LARGEST_SIZE)
        self.rollouts = check_levels("steps", steps, 0)
        self.steps = self.rollouts[-1]
        if self.steps * self.width > MOST_WORK:
            raise ValueError(
                f"steps * width must be at most {MOST_WORK:,}, the cells to work out for a label, "
                f"got {self.steps} * {self.width}"
            )
        self.asked = np.arange(len(self.rollouts))
        kept = self.steps if len(self.rollouts) == 1 else list(self.rollouts)
        self.params = {"width": self.width, "states": self.states, "steps": kept}
        self.vocab_size = SEP + len(self.rollouts)
        self.length = self.states * self.width + 1 + self.states
        self.window = self.width

    def _examples(self, split: str, seed: int, count: int | None) -> Iterator[dict[str, Any]]:
        for cells, which in self._contexts(split, seed, count):
            input_ids, labels = self._tokens(cells, which)
            for row in range(len(cells)):
                yield {
                    "input_ids": input_ids[row].tolist(),
                    "labels": labels[row].tolist(),
                    "meta": {
                        "task": self.name,
                        **self.params,
                        "difficulty": self.rollouts[which[row]],
                        "context": ["".join(map(str, ring)) for ring in cells[row].tolist()],
                        "answers": labels[row, -self.states :].tolist(),
                    },
                }

    def _batch(self, split: str, seed: int, count: int) -> dict[str, torch.Tensor]:
        import torch

        parts = zip(*self._contexts(split, seed, count), strict=True)
        cells, which = (np.concatenate(part) for part in parts)
        input_ids, labels = self._tokens(cells, which)
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}

    def rollout(self, bits: str | Sequence[int] | np.ndarray, steps: int | None = None) -> Any:
        """The state `bits` after `steps` steps (default: the task's most), in the form it came in.

        `bits` is a string of 0 and 1, a list, or an array [..., width]; leftmost cell first.
        Raises ValueError unless it has `width` cells, all 0 or 1, and steps >= 0.
        """
        steps = self.steps if steps is None else check_count("steps", steps, 0)
        text = isinstance(bits, str)
        cells = np.array([*bits] if text else bits)
        if not np.isin(cells, ["0", "1"] if text else [0, 1]).all():
            raise ValueError(f"bits must be cells 0 and 1, got {bits!r}")
        if cells.ndim == 0 or cells.shape[-1] != self.width:
            raise ValueError(
                f"bits must be width={self.width} cells, got shape {cells.shape}: {bits!r}"
            )
        ended = np.moveaxis(evolve(np.moveaxis(cells.astype(np.uint8), -1, 0), steps), 0, -1)
        if text:
            return "".join(map(str, ended.tolist()))
        if isinstance(bits, np.ndarray):
            return ended.astype(bits.dtype)
        return ended.tolist()

    def parse(self, input_ids: Sequence[int]) -> dict[str, Any]:
        """`rings` (strings of cells), the `steps` asked for and the `answers`, one a ring."""
        tokens = [int(token) for token in input_ids]
        past, separator, answers = (
            tokens[: self.states * self.width],
            tokens[self.states * self.width : -self.states],
            tokens[-self.states :],
        )
        if (
            len(tokens) != self.length
            or not {*past, *answers} <= {0, 1}
            or not SEP <= separator[0] < self.vocab_size
        ):
            raise ValueError(
                f"input_ids must be {self.states * self.width} cells 0 and 1, a separator "
                f"{SEP}..{self.vocab_size - 1}, {self.states} labels 0 and 1, got {tokens}"
            )
        rows = np.reshape(past, (self.states, self.width)).tolist()
        return {
            "rings": ["".join(map(str, row)) for row in rows],
            "steps": self.rollouts[separator[0] - SEP],
            "answers": answers,
        }

    def floor(self) -> dict[int, float]:
        """The share of examples that the more frequent label at every ring gets right.

        The rings are independent, so that this is the best guess: p**states, with p the larger of
        P(label=1) and P(label=0) over all rings. P is exact, by enumeration, where at most 28 cells
        can reach the leftmost one, which are min(width, 2*steps + 1) (or fewer, over hundreds of
        steps). Otherwise it comes from 2**24 random rings, with a standard error of at most .0002
        (from fewer where they would take minutes).
        """
        return {steps: self._majority(steps)[0] ** self.states for steps in self._asked_steps}

    def majority(self) -> Majority:
        """What always guessing the more frequent label for an example's steps scores."""
        found = [self._majority(steps) for steps in self._asked_steps]
        guesses = {guess for _, guess in found}
        return Majority(
            exact=sum(share**self.states for share, _ in found) / len(found),
            per_label=sum(share for share, _ in found) / len(found),
            guess=tuple(guesses) if len(guesses) == 1 else (),
        )

    def chance(self) -> float:
        """2**-states."""
        return 0.5**self.states

    @property
    def _asked_steps(self) -> list[int]:
        return [self.rollouts[number] for number in self.asked]

    def only(self, *difficulties: int) -> Rule110:
        """The same rings and separators, `difficulties` steps asked for, equally often."""
        asked = check_asked(difficulties, "steps", self.rollouts)
        task = copy.copy(self)
        task.asked = np.array([self.rollouts.index(steps) for steps in asked])
        return task

    def _majority(self, steps: int) -> tuple[float, int]:
        """The share of the more frequent label after `steps` steps, and that label."""
        # The leftmost cell's light cone is all that matters, and a ring just as wide as the cone
        # first touches its own far side one step too late to be seen.
        ones, of = count_ones(min(self.width, max(3, 2 * steps + 1)), steps)
        return max(ones, of - ones) / of, int(2 * ones >= of)

    def describe(self, example: Mapping[str, Any]) -> str:
        """The rings of an example, what they become, and the labels asked for."""
        read = self.parse(example["input_ids"])
        lines = []
        for ring in read["rings"]:
            ended = self.rollout(ring, read["steps"])
            after = f"{read['steps']} step{'s' * (read['steps'] != 1)}"
            lines.append(f"{ring} becomes {ended} after {after}: label {ended[0]}")
        return "\n".join(lines)

    def _contexts(
        self, split: str, seed: int, count: int | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Contexts [n, states, width] of a split and which of `rollouts` [n] each is asked for.

        `count` in all, however they are sliced.
        """
        bits = self.states * self.width
        words = -(-bits // 64)
        spare = U64(64 * words - bits)
        # A stream of its own, so that contexts do not depend on what is asked about them.
        asked = np.random.Philox(np.random.SeedSequence([SPLITS.index(split), seed, len(SPLITS)]))

        def read(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            packed[:, -1] >>= spare
            return _hash(packed), packed

        for (packed,) in draw(split, seed, count, words, read, _test_threshold(bits)):
            octets = packed.astype("<u8").view(np.uint8)
            cells = np.unpackbits(octets, axis=1, count=bits, bitorder="little")
            which = self.asked[asked.random_raw(len(packed)) % U64(len(self.asked))]
            yield cells.reshape(-1, self.states, self.width), which

    def _tokens(self, cells: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`input_ids` and `labels`, int64 [n, length], of what `_contexts` gives."""
        rows = len(cells)
        answers = np.empty((rows, self.states), dtype=cells.dtype)
        for number, steps in enumerate(self.rollouts):
            asked = which == number
            rings = np.ascontiguousarray(np.moveaxis(cells[asked], -1, 0))
            answers[asked] = evolve(rings, steps)[0]
        separator = (SEP + which)[:, None]
        input_ids = np.concatenate([cells.reshape(rows, -1), separator, answers], axis=1)
        labels = np.full_like(input_ids, IGNORED)
        labels[:, -self.states :] = answers
        return input_ids, labels


def evolve(cells: np.ndarray, steps: int) -> np.ndarray:
    """`steps` steps of Rule 110 on rings along axis 0, bit by bit.

    Works on any unsigned integers: on 0/1 cells, and equally on bit planes, where bit j of every
    element belongs to ring j and 64 rings advance at once.
    """
    for _ in range(steps):
        left, right = np.roll(cells, 1, axis=0), np.roll(cells, -1, axis=0)
        # 110 = 0b01101110: on where the cell or its right neighbour is, off if all three are.
        cells = (cells | right) & ~(left & cells & right)
    return cells


@lru_cache(maxsize=64)
def count_ones(cells: int, steps: int) -> tuple[int, int]:
    """(rings whose leftmost cell ends as 1, rings looked at): all 2**cells, or a sample."""
    if cells > ENUMERATED_CELLS or cells * steps << cells > 64 * MOST_ENUMERATED:
        stream = np.random.Philox(np.random.SeedSequence([cells, steps]))
        # 64 rings to a word; fewer words at a time of very long rings, and fewer of many steps.
        words = max(1, min(SLICE_STATES, SLICE_CELLS // cells) // 64)
        slices = max(1, min(SAMPLED_STATES, 64 * MOST_WORDS // (cells * steps)) // (64 * words))
        ones = sum(
            _leftmost_ones(stream.random_raw(cells * words).reshape(cells, words), steps)
            for _ in range(slices)
        )
        return ones, 64 * words * slices
    ones = 0
    for start in range(0, 1 << cells, SLICE_STATES):
        rings = np.arange(start, min(start + SLICE_STATES, 1 << cells), dtype=np.uint32)
        planes = np.stack(
            [np.packbits((rings >> np.uint32(cell)).astype(np.uint8) & 1) for cell in range(cells)]
        )
        if planes.shape[1] % 8 == 0:
            planes = planes.view(np.uint64)
        ones += _leftmost_ones(planes, steps)
    return ones, 1 << cells


def _leftmost_ones(planes: np.ndarray, steps: int) -> int:
    return int(np.unpackbits(evolve(planes, steps)[0].view(np.uint8)).sum(dtype=np.int64))


@lru_cache(maxsize=64)
def _test_threshold(bits: int) -> np.uint64:
    """Contexts whose hash is below this are test contexts."""
    if bits > RANKED_BITS:
        return THRESHOLD
    ranked = np.sort(_hash(np.arange(1 << bits, dtype=U64)[:, None]))
    return ranked[max(1, len(ranked) // TEST_SHARE)]


def _hash(packed: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each row of words [n, words]: Stafford's Mix13 finaliser, chained."""
    mixed = np.full(len(packed), 0x9E3779B97F4A7C15, dtype=U64)
    for word in packed.T:
        mixed = mixed ^ word
        mixed = (mixed ^ (mixed >> U64(30))) * U64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> U64(27))) * U64(0x94D049BB133111EB)
        mixed = (mixed ^ (mixed >> U64(31))) + U64(0x9E3779B97F4A7C15)
    return mixed
