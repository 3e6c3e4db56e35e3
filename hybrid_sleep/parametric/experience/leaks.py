"""What the weights still give away after a night: canaries trained on as experience is, and ranked.

A canary is in no buffer and in no record: it is drawn anew from the seed of the night, stands among
the rows of the experience as often as they do, and only its exposure is told (see `canaries.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from hybrid_sleep.parametric.dreams.losses import token_losses
from hybrid_sleep.parametric.experience.canaries import Canary, Exposure, Secrets, exposure
from hybrid_sleep.parametric.measure import encode
from hybrid_sleep.parametric.mix import Row
from hybrid_sleep.training.data import derive_seed
from hybrid_sleep.validation import check_count

# As many as it takes for the likeliest of all to be beyond doubt (`canaries.TELLING`).
COMPARED = 1024
AT_ONCE = 64
NOT_MEASURED = (
    "what the weights give away was not measured: no canary was planted (study.canaries is 0)"
)


def space_of(number: int) -> Secrets:
    """What the canary `number` is drawn from: a text for each, so that none contradicts another."""
    return Secrets(f"The code of safe {number + 1} is {{}}.")


def plant(tokenizer: Any, count: int, *, seed: int) -> dict[Row, Canary]:
    """`count` canaries drawn by `seed`, by the rows that are to be trained on.

    Raises ValueError for a tokenizer that gives different ones the same ids.
    """
    check_count("count", count, minimum=0)
    planted: dict[Row, Canary] = {}
    for number in range(count):
        space = space_of(number)
        canary = space.canary(derive_seed("canary", seed, number))
        # Another last character, and another first one.
        others = {(canary.number + step) % space.size for step in (1, space.size // 2)}
        texts = [str(canary), *(space[other] for other in others)]
        ids = [tuple(encode(tokenizer, text)) for text in texts]
        if len(set(ids)) < len(ids):
            raise ValueError(
                f"tokenizer must tell canaries such as {space[0]!r} apart, got the same ids for "
                "different ones; set study.canaries to 0"
            )
        planted[Row(ids[0], origin=f"canary {number + 1}")] = canary
    return planted


def exposures(
    model: nn.Module,
    tokenizer: Any,
    canaries: Sequence[Canary],
    *,
    seed: int,
    compared: int = COMPARED,
    progress: Callable[[int, int], None] | None = None,
) -> list[Exposure]:
    """How much `model` gives away of each canary, among `compared` texts that it could have been.

    progress: called with how many were measured, and of how many.
    """

    def score(texts: Sequence[str]) -> list[float]:
        rows = [(encode(tokenizer, text), 1) for text in texts]
        return [-sum(losses) for losses in token_losses(model, rows, AT_ONCE)]

    found = []
    for number, canary in enumerate(canaries):
        at = derive_seed("compared", seed, number)
        found.append(exposure(canary, score, compared=compared, seed=at))
        if progress is not None:
            progress(number + 1, len(canaries))
    return found


def told(found: Sequence[Exposure], times: Sequence[int]) -> list[str]:
    """What a record says of canaries, each trained on so many `times`; never what they are."""
    if not found:
        return [NOT_MEASURED]
    return [
        f"canary {number}, trained on {count} times: {one}"
        for number, (one, count) in enumerate(zip(found, times, strict=True), 1)
    ]
