"""What word problems have in common as sequences: text, cue, answer, in windows."""

from __future__ import annotations

import copy
import hashlib
import itertools
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval.tasks.base import IGNORED, Task, check_asked
from hybrid_sleep.eval.tasks.gsm_infinite.language import Vocabulary, slack

if TYPE_CHECKING:
    import torch

LONGEST = 32768
SAMPLED = 1 << 14


class WordTask(Task):
    """Fill, question and problem (`text` tokens); a cue, the answer, an end token, and fill.

    Subclasses draw problems (objects with `problem`, `question`, `solution`, `op`), name what is
    supervised, and read a text back. `recipe` is what they draw, a dataclass with `ops`.
    """

    difficulty = "op"
    block = 16
    recipe: Any
    vocabulary: Vocabulary
    question_first: bool

    def _lay_out(self, length: int, windows: int, cue: str, tail: int, what: str) -> None:
        """Set lengths and windows; `what` takes at most `tail` tokens after the cue."""
        self.vocab_size = len(self.vocabulary)
        self._cue = self.vocabulary.encode(cue)
        tail += len(self._cue)
        self._text = length
        self.length = length + tail
        self.window = length // windows
        if length % windows or self.window < tail:
            raise ValueError(
                f"windows must divide length={length} and leave at least {tail} tokens, which "
                f"{what} takes, to a window, got {windows}"
            )

    @abstractmethod
    def _problems(self, split: str, seed: int) -> Iterator[Any]:
        """Problems of a split without end."""

    @abstractmethod
    def _reply(self, problem: Any) -> str:
        """What is supervised, before the end token."""

    @abstractmethod
    def _fields(self, problem: Any) -> dict[str, Any]:
        """What `meta` says of a problem."""

    @abstractmethod
    def _read(self, question: str, statements: list[str], reply: str) -> dict[str, Any]:
        """What `parse` gives besides question and problem; ValueError for other words."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text in the task's words; ValueError for any other word."""
        return self.vocabulary.encode(text)

    def decode(self, ids: Any) -> str:
        """The text of token ids, fill and end left out."""
        return self.vocabulary.decode(ids)

    def only(self, *difficulties: int) -> WordTask:
        """The same task with problems of `difficulties` operations only, each equally often."""
        ops = check_asked(difficulties, "ops", self.recipe.ops)
        task = copy.copy(self)
        task.recipe = replace(self.recipe, ops=tuple(ops))
        return task

    def parse(self, input_ids: Sequence[int]) -> dict[str, Any]:
        """`question` and `problem`, the `statements` of the problem, and the `answer`.

        Statements are pairs (name, what it equals), in order. Raises ValueError for anything but
        a whole sequence of this task, its answer included.
        """
        ids = [int(token) for token in input_ids]
        text, reply = self._parts(ids)
        if self.question_first:
            question, _, problem = text.partition("? ")
            question += "?"
        else:
            problem, _, question = text.rpartition(". ")
            problem += "."
        statements = problem.removesuffix(".").split(". ")
        if not problem.endswith("."):
            raise self._foreign(f"a problem that ends in {problem[-20:]!r}")
        return {
            "question": question,
            "problem": problem,
            **self._read(question, statements, reply),
        }

    def describe(self, example: Mapping[str, Any]) -> str:
        """An example's question and problem, how it is solved, and its answer."""
        ids = [int(token) for token in example["input_ids"]]
        text, tail = (self.decode(part) for part in (ids[: self._text], ids[self._text :]))
        solved = example.get("meta", {}).get("solution")
        return "\n".join([text, *([solved] if solved and solved not in tail else []), tail])

    def _parts(self, ids: list[int]) -> tuple[str, str]:
        """Text and reply of a sequence, whose layout is checked."""
        fill, end = self.vocabulary.fill, self.vocabulary.end
        if len(ids) != self.length:
            raise self._foreign(f"{len(ids)} tokens, not {self.length}")
        if not all(0 <= token < self.vocab_size for token in ids):
            raise self._foreign(f"a token outside 0..{self.vocab_size - 1}")
        text = ids[: self._text]
        text = text[next((i for i, token in enumerate(text) if token != fill), len(text)) :]
        cue, tail = ids[self._text :][: len(self._cue)], ids[self._text + len(self._cue) :]
        at = tail.index(end) if end in tail else len(tail)
        reply, rest = tail[:at], tail[at + 1 :]
        if cue != self._cue or at == len(tail) or any(token != fill for token in rest):
            raise self._foreign(f"the end {self.decode(ids[self._text :])!r}")
        words = self.decode(text), self.decode(reply)
        if [self.encode(part) for part in words] != [text, reply]:
            raise self._foreign("fill or an end token inside the text")
        return words

    def _foreign(self, what: str) -> ValueError:
        return ValueError(f"input_ids must be a sequence of task {self.name!r}, got {what}")

    def _examples(self, split: str, seed: int, count: int | None) -> Iterator[dict[str, Any]]:
        for problem in itertools.islice(self._problems(split, seed), count):
            input_ids, labels = self._tokens(problem)
            content = f"{problem.question}\n{problem.problem}".encode()
            digest = hashlib.blake2b(content, digest_size=6).digest()
            meta = {
                "task": self.name,
                "difficulty": problem.op,
                **self._fields(problem),
                "id": int.from_bytes(digest, "big"),
                "messages": [{"role": "user", "content": "\n".join(self._ordered(problem))}],
            }
            yield {"input_ids": input_ids, "labels": labels, "meta": meta}

    def _batch(self, split: str, seed: int, count: int) -> dict[str, torch.Tensor]:
        import torch

        drawn = itertools.islice(self._problems(split, seed), count)
        rows = torch.tensor([self._tokens(problem) for problem in drawn])
        return {"input_ids": rows[:, 0].contiguous(), "labels": rows[:, 1].contiguous()}

    def _ordered(self, problem: Any) -> list[str]:
        parts = [problem.question, problem.problem]
        return parts if self.question_first else parts[::-1]

    def _tokens(self, problem: Any) -> tuple[list[int], list[int]]:
        """`input_ids` and `labels` of a problem, `length` of each."""
        text = self.encode(" ".join(self._ordered(problem)))
        answer = [*self.encode(self._reply(problem)), self.vocabulary.end]
        fill = [self.vocabulary.fill]
        before = fill * (self._text - len(text)) + text + self._cue
        after = fill * (self.length - len(before) - len(answer))
        return (
            before + answer + after,
            [IGNORED] * len(before) + answer + [IGNORED] * len(after),
        )


def best_per_label(sequences: Iterable[Sequence[int]]) -> float:
    """The share of labels right that are guessed from their place and the label before them."""
    followed: dict[tuple[int, int], Counter[int]] = {}
    for labels in sequences:
        for place, (before, label) in enumerate(itertools.pairwise([IGNORED, *labels])):
            followed.setdefault((place, before), Counter())[label] += 1
    hits = sum(max(counts.values()) for counts in followed.values())
    return hits / sum(counts.total() for counts in followed.values())


def check_choices(
    name: str, given: Any, options: Sequence[Any], allowed: str | None = None
) -> tuple[Any, ...]:
    """`given` as a tuple of different `options`, at least one; ValueError otherwise."""
    chosen = None if isinstance(given, (str, Mapping)) else given
    try:
        chosen = tuple(chosen)
        wrong = not chosen or len(set(chosen)) < len(chosen)
        wrong = wrong or any(isinstance(x, (bool, float)) or x not in options for x in chosen)
    except TypeError:
        wrong = True
    if wrong:
        raise ValueError(
            f"{name} must be a list of one or more of {allowed or ', '.join(options)}, "
            f"each once, got {given!r}"
        )
    return chosen


def check_fit(
    recipe: Any,
    probes: Callable[[int], Sequence[Sequence[Any]]],
    shortest: int,
    fillers: str,
) -> None:
    """Raise ValueError for a length that too many problems exceed, or cannot be filled up to.

    `probes(op)` draws problems of any length, in groups (drafts with `tokens` and `fits`). Three
    quarters of those with most operations must be short enough. A quarter of each group must be
    such that `fillers`, whose shortest sentence has `shortest` tokens, can fill what is left.
    """
    most, length = max(recipe.ops), recipe.length
    tokens = sorted(draft.tokens for group in probes(most) for draft in group)
    needed = tokens[len(tokens) * 3 // 4]
    if length < needed:
        raise ValueError(f"length must be at least {needed} for op={most}, got {length}")
    if recipe.slack is None or recipe.slack == shortest - 1:
        return
    groups = [group for op in recipe.ops for group in probes(op)]

    def fitting(tried: int) -> bool:
        other = replace(recipe, length=tried, slack=slack(tried, shortest))
        return all(sum(draft.fits(other) for draft in g) * 4 >= len(g) for g in groups)

    if not fitting(length):
        longer = next(tried for tried in itertools.count(length) if fitting(tried))
        raise ValueError(
            f"length must be one that {fillers} can fill problems of these ops up to (unless "
            f"noise=False), such as {longer}, got {length}"
        )
