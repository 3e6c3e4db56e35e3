"""A run and what it is compared with: one variant each, named, with what it changes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from hybrid_sleep.training.depth import AtOnce, ByDifficulty

if TYPE_CHECKING:
    from hybrid_sleep.training import RunConfig

REFERENCE = "sleep"
Equal = Literal["compute", "tokens", "both"]
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
# A comma before a key and `=`; any other belongs to the value in front of it.
NEXT_CHANGE = re.compile(r",(?=\s*[\w.]+\s*=)")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A run that is compared with the reference: its name, in words, and what it changes.

    changes: values by key, or `key=value` texts as `hybrid-sleep train` takes them. depths: where
    its models are evaluated. compared_at: the one of them at which it is compared, decided by the
    training and not by what turns out best. equal: what its training has in common with the
    reference's; None where nobody saw to it. tied: the depth of each difficulty, where training
    ties them. rate: the multiple of the run's learning rates that `changes` has because it was the
    best for this variant (see `studies.rates`); None where none was chosen.
    """

    name: str
    label: str
    changes: dict[str, Any] | list[str] = field(default_factory=dict)
    depths: list[int]
    compared_at: int
    role: Literal["reference", "baseline", "ablation"]
    equal: Equal | None = None
    tied: dict[int, int] = field(default_factory=dict)
    rate: float | None = None


def compared_at(run: RunConfig, depths: Sequence[int]) -> int:
    """Where a run is compared: the deepest of `depths` that it trained at, else the shallowest."""
    return max((d for d in depths if d in run.sleep_passes.depths()), default=min(depths))


def tied_depths(run: RunConfig) -> dict[int, int]:
    """The depth of each difficulty, where the training of `run` ties them; else empty.

    Of several depths at which a step asks for a difficulty it is the smallest.
    """
    policy = run.sleep_passes
    if isinstance(policy, ByDifficulty):
        return dict(policy.depths_of)
    if not isinstance(policy, AtOnce):
        return {}
    deepest_first = reversed(policy.asked_at)
    return dict(sorted({level: N for N, levels in deepest_first for level in levels}.items()))


def parse_variant(text: str) -> tuple[str, list[str]]:
    """Name and changes of `NAME:key=value,key=value`; a name alone changes nothing.

    Changes are what `hybrid-sleep train` takes; a comma that no key and `=` follow is part of the
    value before it. ValueError for anything else.
    """
    name, _, rest = text.partition(":")
    changes = [part.strip() for part in NEXT_CHANGE.split(rest)] if rest.strip() else []
    if not NAME.fullmatch(name) or not all("=" in change for change in changes):
        raise ValueError(
            "variant must be NAME:key=value,key=value, with a name of letters, digits and any of "
            f"_.-, got {text!r}"
        )
    return name, changes


def parse_variants(texts: Iterable[str]) -> dict[str, list[str]]:
    """Changes by name (see `parse_variant`); ValueError for no text or a name given twice."""
    found = [parse_variant(text) for text in texts]
    names = [name for name, _ in found]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"variants must be one or more with different names, got {names}")
    return dict(found)
