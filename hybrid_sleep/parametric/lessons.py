"""What a model is taught asleep: token sequences, and what a teacher expects behind each token.

The compress phase of Schwarz et al., "Progress & Compress", arXiv 1805.06370, Eq. 2: the student is
drawn to the teacher's distribution by `KL(teacher || student)`. The teacher is the same model
before the sleep, with a context in front or with the fast weights of a cache; the student has
neither, so what they say of the tokens has to move into its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_sleep.parametric.measure import right_padded
from hybrid_sleep.parametric.sites import frozen
from hybrid_sleep.validation import check_choice, check_count, check_number

KINDS = ("recent", "dream", "foundation")


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """A row of ids, of which those from `start` on are taught.

    kind: one of `KINDS`, where it comes from. weight: of each of its tokens, above 0.
    teacher: log probabilities `[T - start, vocabulary]`, fp32 or more; None: the tokens themselves
    count as what is to be said.

    Raises ValueError for a row with nothing in front of what is taught, or with nothing to teach.
    """

    ids: tuple[int, ...]
    start: int = 1
    kind: str = "recent"
    weight: float = 1.0
    teacher: Tensor | None = None

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        check_number("weight", self.weight, above=0)
        check_count("start", self.start)
        if self.start >= len(self.ids):
            raise ValueError(f"start must be below the {len(self.ids)} ids, got {self.start}")
        if self.teacher is not None and len(self.teacher) != self.tokens:
            raise ValueError(
                f"teacher must be of the {self.tokens} tokens that are taught, got "
                f"{len(self.teacher)}"
            )

    @property
    def tokens(self) -> int:
        """How many are taught."""
        return len(self.ids) - self.start


@torch.no_grad()
def taught(
    model: nn.Module,
    lessons: Sequence[Lesson],
    *,
    context: Sequence[int] = (),
    cache: Any = None,
    at_once: int = 16,
) -> list[Lesson]:
    """`lessons` with what `model` expects, as it is now, behind `context` or going on from `cache`.

    context: ids in front of each row. cache: of `model`, of one row, its fast weights among what is
    read with; it is left as it was. With neither the model is its own teacher: it is not to change.
    What comes back takes 4 bytes for each token taught and each entry of the vocabulary.
    """
    if len(context) and cache is not None:
        raise ValueError("context must be empty where there is a cache, got both")
    device = next(model.parameters()).device
    told: list[Lesson] = []
    with frozen(model):
        while len(told) < len(lessons):
            # A cache takes no pads behind a row: the next call would go on from them.
            part = lessons[len(told) : len(told) + (at_once if cache is None else 1)]
            ids, mask = right_padded([(*context, *lesson.ids) for lesson in part], device)
            if cache is None:
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            else:
                logits = model(input_ids=ids, cache=cache.copy()).logits
            for lesson, row in zip(part, logits, strict=True):
                end = len(context) + len(lesson.ids) - 1
                said = _log_softmax(row[end - lesson.tokens : end])
                told.append(replace(lesson, teacher=said))
    return told


def lesson_loss(model: nn.Module, lessons: Sequence[Lesson], **forward: Any) -> Tensor:
    """The mean over the taught tokens of `lessons`, each by its weight, of `KL(teacher || model)`,
    or of cross entropy where there is no teacher, in nats. A scalar with its gradient."""
    if not lessons:
        raise ValueError("lessons must be one or more, got none")
    device = next(model.parameters()).device
    ids, mask = right_padded([lesson.ids for lesson in lessons], device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **forward).logits
    losses, weights = [], []
    for row, lesson in zip(logits, lessons, strict=True):
        end = len(lesson.ids)
        said = _log_softmax(row[lesson.start - 1 : end - 1])
        if lesson.teacher is None:
            told = torch.tensor(lesson.ids[lesson.start :], device=device)
            losses.append(nn.functional.nll_loss(said, told, reduction="none"))
        else:
            expected = lesson.teacher.to(said)
            # 0 log 0 is 0, where a teacher excludes a token.
            parts = torch.where(expected.isneginf(), 0.0, expected.exp() * (expected - said))
            losses.append(parts.sum(-1))
        weights.append(said.new_full((lesson.tokens,), lesson.weight))
    every, by = torch.cat(losses), torch.cat(weights)
    return (every * by).sum() / by.sum()


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
