"""What a model is taught asleep: token sequences, and what a teacher expects behind each token.

The compress phase of Schwarz et al., "Progress & Compress", arXiv 1805.06370, Eq. 2: the student is
drawn to the teacher's distribution by `KL(teacher || student)`. The teacher is the same model
before the sleep, with a context in front or with the fast weights of a cache; the student has
neither, so what they say of the tokens has to move into its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_sleep.parametric.measure import repeated, right_padded
from hybrid_sleep.parametric.mix import PARTS, Mixed, weighted_mean
from hybrid_sleep.parametric.sites import frozen
from hybrid_sleep.validation import check_choice


@dataclass(frozen=True)
class Lesson(Mixed):
    """A row of a mix, and what a teacher expects in it.

    teacher: log probabilities `[tokens, vocabulary]`, fp32 or more, of the tokens that are taught;
    None: these tokens themselves count as what is to be said. front: what it had in front of them,
    in the place of the row's own beginning; cache: what it went on from. divergence, policy: what
    in the loss the divergence from it counts, and the cross entropy of the tokens themselves beside
    that, negative for what is not to be said. Raises ValueError for a teacher of another number of
    tokens.
    """

    teacher: Tensor | None = None
    front: tuple[int, ...] | None = None
    cache: Any = field(default=None, compare=False, repr=False)
    divergence: float = 1.0
    policy: float = 0.0

    def __post_init__(self) -> None:
        check_choice("part", self.part, PARTS)
        if self.teacher is not None and len(self.teacher) != self.tokens:
            raise ValueError(
                f"teacher must be of the {self.tokens} tokens that are taught, got "
                f"{len(self.teacher)}"
            )

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens of the row."""
        return self.row.ids

    @property
    def tokens(self) -> int:
        """How many are taught: the first of a row, which nothing stands in front of, never is."""
        return len(self.ids) - max(1, self.row.start)


@torch.no_grad()
def taught(
    model: nn.Module,
    lessons: Sequence[Lesson],
    *,
    reads: Sequence[Sequence[int]] | None = None,
    cache: Any = None,
    at_once: int = 16,
) -> list[Lesson]:
    """`lessons` with what `model` expects, as it is now.

    reads: what it reads in the place of each row, with a context in front of the tokens that are
    taught, say; it ends with these. cache: of `model`, of one row, from which it goes on; left as
    it was. With neither the model is its own teacher: it is not to change. What comes back takes
    4 bytes for each token taught and each entry of the vocabulary.

    Raises ValueError, before the model runs, for a row that ends otherwise.
    """
    rows = [lesson.ids for lesson in lessons] if reads is None else list(map(tuple, reads))
    for lesson, row in zip(lessons, rows, strict=True):
        if row[-lesson.tokens :] != lesson.ids[-lesson.tokens :] or len(row) <= lesson.tokens:
            raise ValueError(
                f"reads must end with the {lesson.tokens} tokens that are taught, behind others, "
                f"got {row}"
            )
    device = next(model.parameters()).device
    told: list[Lesson] = []
    with frozen(model):
        while len(told) < len(lessons):
            first = len(told)
            part = rows[first : first + at_once]
            ids, mask = right_padded(part, device)
            past = {"use_cache": False} if cache is None else {"cache": repeated(cache, len(part))}
            logits = model(input_ids=ids, attention_mask=mask, **past).logits
            taught_now = lessons[first : first + at_once]
            for lesson, read, row in zip(taught_now, part, logits, strict=True):
                said = _log_softmax(row[len(read) - 1 - lesson.tokens : len(read) - 1])
                front = None if reads is None else read[: -lesson.tokens]
                told.append(replace(lesson, teacher=said, front=front, cache=cache))
    return told


def lesson_loss(model: nn.Module, lessons: Sequence[Lesson], **forward: Any) -> Tensor:
    """The mean over the taught tokens of `lessons`, each by its row's weight, of the divergence
    `KL(teacher || model)`, or of cross entropy where there is no teacher, in nats.

    Where a row says so, of `divergence * KL + policy * cross entropy`.
    """
    if not lessons:
        raise ValueError("lessons must be one or more, got none")
    device = next(model.parameters()).device
    ids, mask = right_padded([lesson.ids for lesson in lessons], device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **forward).logits
    losses, weights = [], []
    for row, lesson in zip(logits, lessons, strict=True):
        end = len(lesson.ids)
        said = _log_softmax(row[end - 1 - lesson.tokens : end - 1])
        if lesson.teacher is None or lesson.policy:
            told = torch.tensor(lesson.ids[-lesson.tokens :], device=device)
            entropy = nn.functional.nll_loss(said, told, reduction="none")
        if lesson.teacher is None:
            losses.append(entropy)
        else:
            expected = lesson.teacher.to(said)
            # 0 log 0 is 0, where a teacher excludes a token.
            parts = torch.where(expected.isneginf(), 0.0, expected.exp() * (expected - said))
            loss = parts.sum(-1)
            if lesson.divergence != 1:
                loss = lesson.divergence * loss
            losses.append(loss + lesson.policy * entropy if lesson.policy else loss)
        weights.append(said.new_full((lesson.tokens,), lesson.row.weight))
    return weighted_mean(torch.cat(losses), torch.cat(weights))


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
