"""Texts of keys and values: a window of pairs that is slept over, and one that asks for them.

Multi-query associative recall (`tasks.mqar`), written out: the first window says `pairs` pairs, the
second one asks for each key, in another order, and answers it. Each window opens with a first
token. As text the tokens are words: <s>, k1, k2..., v32, v33....
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hybrid_sleep.eval.tasks.mqar import Mqar
from hybrid_sleep.validation import check_count

BEGIN = 0
FIRST = "<s>"
# Texts that days are chosen from: enough that few keys come twice.
CANDIDATES = 4096
DAYS_SEED = 2_000_000


@dataclass(frozen=True)
class Day:
    """A text that is read and slept over: ids `[window]`, and its keys with their values."""

    text: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]

    @property
    def questions(self) -> list[tuple[list[int], list[int]]]:
        """What is asked of it: each key behind the first token, and its value."""
        return [([BEGIN, key], [value]) for key, value in self.pairs]


@dataclass(frozen=True)
class Texts:
    """Texts of `pairs` pairs over `vocab_size` tokens; ValueError for numbers that cannot be."""

    vocab_size: int = 32
    pairs: int = 4

    def __post_init__(self) -> None:
        check_count("pairs", self.pairs, 1)
        self._task  # noqa: B018  (it checks both)

    @cached_property
    def _task(self) -> Mqar:
        return Mqar(self.vocab_size, 4 * self.pairs, self.pairs, random_non_queries=False)

    @property
    def window(self) -> int:
        """Tokens of a window: a first one, and a key and a value for each pair."""
        return 1 + 2 * self.pairs

    def rows(self, split: str, seed: int, count: int) -> Tensor:
        """Texts `[count, 2 window]`, of the train or the test split of `Mqar`."""
        batch = self._task.batch(split, seed, count)
        answered = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
        windows = answered.view(count, 2, -1)
        first = torch.full_like(windows[:, :, :1], BEGIN)
        return torch.cat((first, windows), dim=2).flatten(1)

    @property
    def answers(self) -> Tensor:
        """Where in a row the values stand that the second window answers."""
        return torch.arange(self.window + 2, 2 * self.window, 2)

    def days(self, seed: int, count: int, split: str = "test") -> list[Day]:
        """`count` texts to be slept over, no key of which is in two; by `seed`.

        Raises ValueError where there are not as many keys.
        """
        found: list[Day] = []
        taken: set[int] = set()
        for row in self.rows(split, DAYS_SEED + seed, CANDIDATES)[:, : self.window].tolist():
            if taken.isdisjoint(row[1::2]) and len(found) < count:
                found.append(Day(tuple(row), tuple(zip(row[1::2], row[2::2], strict=True))))
                taken.update(row[1::2])
        if len(found) < count:
            raise ValueError(
                f"days must be texts without a key in common, {len(found)} of {self.pairs} pairs "
                f"over {self.vocab_size} tokens, got {count}"
            )
        return found

    def words(self, ids: Sequence[int]) -> str:
        """A row as text, which the tokenizer turns into these ids again."""
        half = self.vocab_size // 2
        return " ".join(FIRST if i == BEGIN else f"{'k' if i < half else 'v'}{i}" for i in ids)

    def tokenizer(self) -> Any:
        """A word for a token, of transformers' fast kind; a user's turn is what the user says."""
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import WhitespaceSplit
        from tokenizers.processors import TemplateProcessing
        from transformers import PreTrainedTokenizerFast

        vocabulary = {self.words([i]): i for i in range(self.vocab_size)}
        made = Tokenizer(WordLevel(vocabulary, unk_token=FIRST))
        made.pre_tokenizer = WhitespaceSplit()
        made.post_processor = TemplateProcessing(
            single=f"{FIRST} $A", special_tokens=[(FIRST, BEGIN)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=made,
            bos_token=FIRST,
            pad_token=FIRST,
            chat_template="{{ messages[-1]['content'] }}",
            padding_side="left",
        )
