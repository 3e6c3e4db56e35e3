"""Rows that the student writes as it is when their step comes: the on-policy share of distillation.

Generalised knowledge distillation (Agarwal et al., arXiv 2306.13649; in Knowledge Seeding, Behrouz
et al., arXiv 2606.03979, section 3.3) with the share lambda = `StudyOptions.on_policy`:

    (1 - lambda) E_{(x, y) ~ D} F(x, y) + lambda E_{x ~ D} E_{y ~ student(. | x)} F(x, y),

F the divergence of `lesson_loss`, D what there is to learn. So the teacher corrects what the
student would say itself. The student writes at temperature 1, with every filter off, and no
gradient passes through what it draws.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.parametrize import cached

from hybrid_sleep.parametric.experience.imitation import (
    Semantic,
    advantages,
    prefixed,
    reward,
)
from hybrid_sleep.parametric.lessons import Lesson, taught
from hybrid_sleep.parametric.sampling import continuations
from hybrid_sleep.sleep.weights import Owner
from hybrid_sleep.training.data import derive_seed
from hybrid_sleep.training.ranks import of_first

if TYPE_CHECKING:
    from hybrid_sleep.parametric.experience.options import StudyOptions


class OnPolicy:
    """The rows of `lessons` that `model` writes anew, of a training that has not begun.

    trained: the parameters that are trained, by name; as they are now they make the teacher.
    chosen: the places of these rows, `options.on_policy` of those that a teacher speaks of, drawn
    by `seed`; where words count as they are, there is nobody to judge others. semantic: see
    `imitation.reward`; `options.imitation` says whether rows are rewarded.

    A row costs its tokens one after another, and a forward pass of the teacher, once for every time
    it comes; the teacher takes a copy of `trained`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        lessons: Sequence[Lesson],
        options: StudyOptions,
        trained: Mapping[str, nn.Parameter],
        *,
        semantic: Semantic | None = None,
        seed: int = 0,
    ):
        self.imitation, self.semantic = options.imitation, semantic
        self.model, self.tokenizer, self.lessons = model, tokenizer, lessons
        self.rows, self.seed, self.trained = options.rows, seed, trained
        told = [i for i, lesson in enumerate(lessons) if lesson.teacher is not None]
        count = round(options.on_policy * len(told))
        draws = random.Random(derive_seed("on policy", seed))
        self.chosen = frozenset(draws.sample(told, count))
        kept = trained.items() if self.chosen else ()
        self.before = {name: p.detach().clone() for name, p in kept}

    def count(self, steps: int) -> int:
        """How many of the rows of the first `steps` steps the student writes."""
        return sum(i < steps * self.rows for i in self.chosen)

    def step(self, number: int) -> tuple[list[Lesson], list[float]]:
        """The lessons of step `number`, written by the model as it is now where they are chosen;
        and the rewards of these.

        The same call with the same weights gives the same rows; in several processes it is
        collective, and the first one's rows count.
        """
        begin = number * self.rows
        members = list(self.lessons[begin : begin + self.rows])
        mine = [i for i in range(len(members)) if begin + i in self.chosen]
        if not mine:
            return members, []
        seed = derive_seed("on policy", self.seed, number)
        chosen = [members[i] for i in mine]
        if self.imitation is not None:
            draws = random.Random(seed)
            chosen = [prefixed(lesson, draws) for lesson in chosen]
        # By all, as nobody waits for long; rounding may differ from one to another.
        made = self._written(chosen, seed)
        rows = of_first(lambda: made)
        rewards = of_first(self._rewards, chosen, rows)
        again = self._taught(chosen, rows)
        if self.imitation is not None:
            alpha = self.imitation.alpha
            again = [
                replace(lesson, divergence=alpha, policy=(1 - alpha) * gain)
                for lesson, gain in zip(again, advantages(rewards), strict=True)
            ]
        for i, lesson in zip(mine, again, strict=True):
            members[i] = lesson
        return members, rewards

    def _rewards(self, lessons: Sequence[Lesson], rows: Sequence[Sequence[int]]) -> list[float]:
        """Of `rows` in the place of what `lessons` teach; none unless they are to imitate it."""
        if self.imitation is None:
            return []
        return [
            reward(self.imitation, self.tokenizer, new, old.ids[-old.tokens :], self.semantic)
            for old, new in zip(lessons, rows, strict=True)
        ]

    def _written(self, lessons: Sequence[Lesson], seed: int) -> list[list[int]]:
        """What the model writes in the place of the tokens that are taught, as many at most."""
        begun = [lesson.ids[: -lesson.tokens] for lesson in lessons]
        longest = max(lesson.tokens for lesson in lessons)
        with cached():
            drawn = continuations(self.model, self.tokenizer, begun, longest, seed=seed)
        end = getattr(self.tokenizer, "eos_token_id", None)
        rows = []
        for lesson, new in zip(lessons, drawn, strict=True):
            new = new[: lesson.tokens]
            # A foundation goes on behind its end, as the model's own samples do.
            if end in new and lesson.part != "foundation":
                new = new[: new.index(end) + 1]
            rows.append(new)
        return rows

    def _taught(self, lessons: Sequence[Lesson], rows: Sequence[Sequence[int]]) -> list[Lesson]:
        """`lessons` with `rows` in the place of what was taught, and what the teacher expects."""
        anew, reads = [], []
        for lesson, new in zip(lessons, rows, strict=True):
            begun = lesson.ids[: -lesson.tokens]
            row = replace(lesson.row, ids=(*begun, *new))
            anew.append(replace(lesson, row=row, teacher=None))
            reads.append((*(begun if lesson.front is None else lesson.front), *new))
        told: dict[int, Lesson] = {}
        with self._before(), cached():
            for cache in {id(x.cache): x.cache for x in anew}.values():
                own = [i for i, lesson in enumerate(anew) if lesson.cache is cache]
                held = cache if cache is None else cache.copy()
                if held is not None:
                    # The weights that wrote it are here again, whatever was counted in between.
                    held.owner = Owner.of(self.model)
                answers = taught(
                    self.model, [anew[i] for i in own], reads=[reads[i] for i in own], cache=held
                )
                told |= dict(zip(own, answers, strict=True))
        return [told[i] for i in range(len(anew))]

    @contextmanager
    def _before(self) -> Iterator[None]:
        """The model as it was before it was trained, bit for bit, inside of the block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, value in self.before.items():
            p = self.trained[name]
            now = p.detach().clone()
            # In place: graphs and DeepSpeed's buffers are over these very bytes.
            p.copy_(value)
            value.copy_(now)
