"""A reward for what the student writes: how near it comes to what was written for it to learn.

Learning to imitate, of Knowledge Seeding (Behrouz et al., arXiv 2606.03979, section 3.3). The
student completes a random prefix of a row of `on_policy.py`, and what it writes is rewarded by

    r = gamma r_sem + (1 - gamma) r_abs                                         (Eq. 3)
    r_abs = 1 - z / max(|written|, |row|) if z <= z_0, else 0                   (Eq. 4)

with z the Levenshtein distance in tokens, and r_sem what a reward model says. To be made large is

    L_KS = E_x [(1 - alpha) E_{y ~ student} r(y) - alpha E_{y ~ student} D(teacher || student)(y)].

How r is optimised is open there. Here it is REINFORCE: the gradient of `log p(y) (r - b)`, as a
mean over tokens as the divergence is, with b the mean reward of the other rows of the step (0 for
one alone), which changes no expectation. Open as well are alpha, gamma, z_0 and the law of
prefixes, here uniform over all places in what is taught.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hybrid_sleep.parametric.lessons import Lesson
from hybrid_sleep.validation import check_count, check_number

Semantic = Callable[[str, str], float]


@dataclass(frozen=True, kw_only=True)
class Imitation:
    """alpha: of 1, what the divergence counts in rows on policy; the reward counts the rest. gamma:
    of the reward, what the semantic one counts. z0: tokens, the distance from which on the absolute
    one is 0. Raises ValueError for one out of range; none of the defaults is published.
    """

    alpha: float = 0.5
    gamma: float = 0.0
    z0: int = 32

    def __post_init__(self) -> None:
        for name in ("alpha", "gamma"):
            if check_number(name, getattr(self, name), least=0) > 1:
                raise ValueError(f"{name} must be at most 1, got {getattr(self, name)!r}")
        check_count("z0", self.z0, minimum=0)


def levenshtein(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens must be put in, taken out or exchanged at least to make `other` of `one`."""
    row = list(range(len(other) + 1))
    for i, x in enumerate(one, 1):
        left, row[0] = row[0], i
        for j, y in enumerate(other, 1):
            left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, left + (x != y))
    return row[-1]


def absolute_reward(written: Sequence[int], teacher: Sequence[int], z0: int) -> float:
    """Eq. 4, from 0 to 1; two empty texts are equal."""
    distance = levenshtein(written, teacher)
    if distance > z0:
        return 0.0
    return 1 - distance / max(len(written), len(teacher), 1)


def reward(
    imitation: Imitation,
    tokenizer: Any,
    written: Sequence[int],
    teacher: Sequence[int],
    semantic: Semantic | None = None,
) -> float:
    """Eq. 3 of ids. semantic: asked with both texts where it counts; ValueError for an answer of it
    that is not from 0 to 1."""
    found = (1 - imitation.gamma) * absolute_reward(written, teacher, imitation.z0)
    if imitation.gamma:
        assert semantic is not None
        said = semantic(*(tokenizer.decode(list(ids)) for ids in (written, teacher)))
        if check_number("semantic reward", said, least=0) > 1:
            raise ValueError(f"semantic reward must be at most 1, got {said!r}")
        found += imitation.gamma * float(said)
    return found


def advantages(rewards: Sequence[float]) -> list[float]:
    """Each reward less the mean of the others."""
    others = len(rewards) - 1
    if not others:
        return list(rewards)
    total = sum(rewards)
    return [x - (total - x) / others for x in rewards]


def prefixed(lesson: Lesson, draws: random.Random) -> Lesson:
    """`lesson` taught from a random one of its tokens on, those before in front; not taught yet."""
    begun = len(lesson.ids) - lesson.tokens
    start = draws.randrange(begun, len(lesson.ids))
    front = lesson.front
    if front is not None:
        front = (*front, *lesson.ids[begun:start])
    return replace(lesson, row=replace(lesson.row, start=start), teacher=None, front=front)
