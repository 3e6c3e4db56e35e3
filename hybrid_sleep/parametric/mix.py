"""What a sleep trains on: experience, dreams, foundations and facts, by shares of tokens.

Recent and dreamed text alone would push out what the model could do before. A few percent of
foundations prevent most of that, of a corpus or, nearly as well, of what the model itself wrote
before the sleep (arXiv 2510.11842, 2605.26097).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hybrid_sleep.parametric.dreams.dream import Dream
from hybrid_sleep.parametric.statistics import SAMPLE_LENGTH, own_samples
from hybrid_sleep.training.data import derive_seed
from hybrid_sleep.validation import check_count, check_number

PARTS = ("recent", "dream", "foundation", "fact")


@dataclass(frozen=True)
class Row:
    """One text to train on.

    ids, start: its tokens, of which those from `start` on are predicted; all count for a share.
    weight: of its loss, in `weighted_mean`. origin: the id of the experience or dream, or what else
    it is of. Raises ValueError for a row without a token to predict or a weight that is not above
    0.
    """

    ids: tuple[int, ...]
    start: int = 1
    weight: float = 1.0
    origin: str = ""

    def __post_init__(self) -> None:
        check_count("start", self.start, 0)
        check_number("weight", self.weight, above=0)
        if len(self.ids) <= max(1, self.start):
            raise ValueError(
                f"ids must have a token to predict from {max(1, self.start)} on, got "
                f"{len(self.ids)} tokens"
            )

    @classmethod
    def of_dream(cls, dream: Dream) -> Row:
        """The row of a dream; ValueError for one that is not kept."""
        if not dream.kept:
            raise ValueError(f"dreams to train on must be kept, got {dream.id}: {dream.why}")
        return cls(dream.ids, dream.start, origin=dream.id)


@dataclass(frozen=True)
class Shares:
    """Shares of tokens, of 1 in all. Raises ValueError for a negative one or another sum."""

    recent: float = 0.45
    dream: float = 0.45
    foundation: float = 0.10
    fact: float = 0.0

    def __post_init__(self) -> None:
        total = sum(check_number(f.name, getattr(self, f.name), least=0) for f in fields(self))
        if abs(total - 1) > 1e-9:
            raise ValueError(f"shares must add up to 1, got {total!r}")


SHARES = Shares()


@dataclass(frozen=True)
class Mixed:
    """A row and the part of the mix that it stands for, one of `PARTS`."""

    part: str
    row: Row


@dataclass(frozen=True)
class Mix:
    """`rows` in the order to train in, and how they came about.

    asked: tokens by part, after any redistribution; tokens: those there are. rows_of: rows by part;
    passes: how often the material of a part was gone through, 1.5 if half of it came twice.
    missing: parts that were asked for without any material, whose share went to the others.
    """

    rows: tuple[Mixed, ...]
    asked: dict[str, float]
    tokens: dict[str, int]
    rows_of: dict[str, int]
    passes: dict[str, float]
    missing: tuple[str, ...]

    @property
    def shares(self) -> dict[str, float]:
        """Realised, of the tokens there are."""
        total = sum(self.tokens.values())
        return {part: count / total for part, count in self.tokens.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the rows."""
        made = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rows"}
        return {**made, "missing": list(self.missing), "shares": self.shares}


def mix(
    material: Mapping[str, Sequence[Row]],
    tokens: int,
    shares: Shares = SHARES,
    *,
    redistribute: bool = False,
    seed: int = 0,
) -> Mix:
    """About `tokens` tokens of `material`, rows by part, in an order shuffled by `seed`.

    Rows stay whole. Of each part they are drawn without replacement, all of them again in another
    order once all were drawn, until another one would bring the part no nearer to its tokens. So
    the tokens of a part differ from what is asked by at most half of its longest row, and from its
    share of the tokens there are by at most the longest row of all.

    redistribute: let parts without material give their share to the others, in proportion; Mix
    names them. Raises ValueError otherwise, for an unknown part, and if nothing is left.
    """
    check_count("tokens", tokens)
    unknown = sorted(set(material) - set(PARTS))
    if unknown:
        raise ValueError(f"material must be of {', '.join(PARTS)}, got {unknown}")
    wanted = {part: getattr(shares, part) for part in PARTS}
    missing = tuple(part for part in PARTS if wanted[part] and not material.get(part))
    if missing and not redistribute:
        raise ValueError(
            f"material must have rows of every part with a share, got none of {', '.join(missing)};"
            " give some, a share of 0, or redistribute=True"
        )
    left = sum(share for part, share in wanted.items() if part not in missing)
    if not left:
        raise ValueError("material must have rows of a part with a share, got none")
    asked = {
        part: 0.0 if part in missing else tokens * share / left for part, share in wanted.items()
    }
    drawn = {
        part: _draw(material.get(part, ()), goal, random.Random(derive_seed(seed, part)))
        for part, goal in asked.items()
    }
    rows = [Mixed(part, row) for part in PARTS for row in drawn[part]]
    random.Random(derive_seed(seed, "order")).shuffle(rows)
    if not rows:
        longest = {part: max(len(row.ids) for row in material[part]) for part in PARTS
                   if material.get(part)}  # fmt: skip
        raise ValueError(f"tokens must be enough for a row, the longest {longest}, got {tokens}")
    return Mix(
        tuple(rows),
        asked,
        {part: sum(len(row.ids) for row in own) for part, own in drawn.items()},
        {part: len(own) for part, own in drawn.items()},
        {part: len(own) / len(material[part]) if own else 0.0 for part, own in drawn.items()},
        missing,
    )


def _draw(rows: Sequence[Row], goal: float, generator: random.Random) -> list[Row]:
    def endless() -> Iterator[Row]:
        while rows:
            yield from generator.sample(list(rows), len(rows))

    taken: list[Row] = []
    total = 0
    for row in endless():
        if abs(total + len(row.ids) - goal) >= abs(total - goal):
            break
        taken.append(row)
        total += len(row.ids)
    return taken


def foundation(
    model: Any,
    tokenizer: Any,
    tokens: int,
    corpus: Sequence[Sequence[int]] | None = None,
    *,
    length: int = SAMPLE_LENGTH,
    seed: int = 0,
    **sample: Any,
) -> list[Row]:
    """Rows for the part "foundation": all of `corpus` (ids), or what the model writes itself.

    tokens, length: in all and of a row, of what it writes (`own_samples`), which must be before the
    sleep changes it. `origin` says which: "corpus" or "own samples". Raises ValueError for a corpus
    without a row that has a token to predict.
    """
    if corpus is None:
        written = own_samples(model, tokenizer, tokens, length=length, seed=seed, **sample)
        return [Row(tuple(row), origin="own samples") for row in written]
    rows = [Row(tuple(row), origin="corpus") for row in corpus if len(row) > 1]
    if not rows:
        raise ValueError("corpus must have a row of two tokens or more, got none")
    return rows


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """`sum w l / sum w` over all of `losses` and `weights` of the same shape.

    A weight of 1.5 beside 1 counts as three rows beside two, and unlike `mean(w l)` leaves the size
    of a step alone. With all weights 1 it is `losses.mean()`, bit for bit. Raises ValueError for
    weights that are negative, not finite, or all 0.
    """
    if losses.shape != weights.shape:
        raise ValueError(
            f"weights must have the shape of losses, {tuple(losses.shape)}, got "
            f"{tuple(weights.shape)}"
        )
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()) or not bool(weights.any()):
        raise ValueError(f"weights must be finite, at least 0 and not all 0, got {weights}")
    if bool((weights == 1).all()):
        # Not every device divides a sum to the same bits as it takes a mean.
        return losses.mean()
    weights = weights.to(losses)
    return (weights * losses).sum() / weights.sum()
