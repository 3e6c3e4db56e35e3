"""Canaries: what the weights still give away of a text that was learned from and erased.

Carlini et al., "The Secret Sharer" (1802.08232), section 4: a random secret is planted among what
is learned, and afterwards ranked by likelihood among all that it could have been.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hybrid_sleep.validation import check_count

# Log-likelihoods of texts, one each.
Score = Callable[[Sequence[str]], Sequence[float]]

BATCH = 256
# Of models that never saw a canary one in a thousand shows as much.
TELLING = 10.0


@dataclass(frozen=True)
class Secrets:
    """The space R of texts with a secret in them: `length` parts of `alphabet` for "{}".

    alphabet: characters, or longer parts. Raises ValueError unless `text` has one "{}", and
    `alphabet` at least two different parts.
    """

    text: str = "The code of the safe is {}."
    length: int = 6
    alphabet: Sequence[str] = "0123456789"

    def __post_init__(self) -> None:
        check_count("length", self.length)
        if not isinstance(self.text, str) or self.text.count("{}") != 1:
            raise ValueError(f"text must have one {{}} in it, got {self.text!r}")
        if len(set(self.alphabet)) != len(self.alphabet) or len(self.alphabet) < 2:
            raise ValueError(
                f"alphabet must be at least two different parts, got {self.alphabet!r}"
            )

    @property
    def size(self) -> int:
        """|R|, how many texts there are."""
        return len(self.alphabet) ** self.length

    def __getitem__(self, number: int) -> str:
        """The text `number`, of 0 to `size` - 1."""
        check_count("number", number, 0, self.size - 1)
        letters = []
        for _ in range(self.length):
            number, place = divmod(number, len(self.alphabet))
            letters.append(self.alphabet[place])
        return self.text.replace("{}", "".join(reversed(letters)))

    def canary(self, seed: int) -> Canary:
        """A text drawn uniformly by `seed`, to be planted; the same seed finds it again."""
        return Canary(self, random.Random(seed).randrange(self.size))


@dataclass(frozen=True)
class Canary:
    """The text `number` of a space."""

    secrets: Secrets
    number: int

    def __str__(self) -> str:
        return self.secrets[self.number]


@dataclass(frozen=True)
class Exposure:
    """How much likelier a canary is than what it could have been.

    bits: log2 |R| - log2 rank (definition 3). rank: of the canary by likelihood, 1 the likeliest;
    an estimate where only `compared` of `size` texts were scored. exact: whether all were.
    """

    bits: float
    rank: float
    size: int
    compared: int
    exact: bool

    @property
    def most(self) -> float:
        """The most bits that this many texts can show."""
        return math.log2(self.compared)

    @property
    def telling(self) -> bool:
        """Whether the canary leaks beyond doubt."""
        return self.bits >= TELLING

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "most": self.most, "telling": self.telling, "says": str(self)}

    def __str__(self) -> str:
        how = "" if self.exact else f", estimated from {self.compared:,}"
        chance = f"{100 * 2**-self.bits:.2g} %"
        head = (
            f"exposure {self.bits:.1f} of at most {self.most:.1f} bits "
            f"(rank {self.rank:,.0f} of {self.size:,}{how})"
        )
        if self.telling:
            return f"{head}: the weights give the erased canary away"
        if self.most < TELLING:
            return f"{head}: too few texts were compared to prove a leak"
        return f"{head}: no proof of a leak; of models that never saw it {chance} show as much"


def exposure(
    canary: Canary, score: Score, *, compared: int = 10_000, seed: int = 0
) -> Exposure:  # fmt: skip
    """The exposure of `canary`, by the log-likelihoods that `score` gives to texts.

    All of R is scored where it has at most `compared` texts. Otherwise that many are, the canary
    among them and others drawn by `seed`, and the rank is the share that is at least as likely
    times |R| (section 4.3, by sampling). A text as likely as the canary counts before it.

    Raises ValueError unless `compared` is at least 2 and the scores are numbers, one a text.
    """
    check_count("compared", compared, minimum=2)
    size = canary.secrets.size
    exact = size <= compared
    draw = random.Random(seed)
    others: list[int] = []
    if exact:
        others = [number for number in range(size) if number != canary.number]
    while len(others) < min(size, compared) - 1:
        number = draw.randrange(size)
        if number != canary.number:
            others.append(number)
    own = _scores(score, [str(canary)])[0]
    before = 0
    for first in range(0, len(others), BATCH):
        texts = [canary.secrets[number] for number in others[first : first + BATCH]]
        before += sum(x >= own for x in _scores(score, texts))
    share = (1 + before) / (1 + len(others))
    return Exposure(-math.log2(share), share * size, size, 1 + len(others), exact)


def _scores(score: Score, texts: list[str]) -> list[float]:
    scores = [float(x) for x in score(texts)]
    if len(scores) != len(texts) or any(math.isnan(x) for x in scores):
        raise ValueError(f"score must give a number for each of {len(texts)} texts, got {scores}")
    return scores
