"""What an interrupted night leaves to go on from, as ciphertext, until it is through.

    night/about          which night it is
    night/dreams, ...    what was made for it
    night/state          trained weights and the optimizer's state, a few minutes old at most

Its key is made of those of all sources that the night is over, so that it is gone with the first
of them, and the folder is erased with any of their experiences.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hybrid_sleep.parametric.experience.choice import Chosen
from hybrid_sleep.parametric.experience.options import StudyOptions
from hybrid_sleep.parametric.schema import WRITTEN
from hybrid_sleep.training.ranks import of_first

if TYPE_CHECKING:
    from hybrid_sleep.parametric.experience.sealed import Sealed
    from hybrid_sleep.parametric.workspace import Workspace

FOLDER, ABOUT, STATE = "night", "about", "state"


class Unfinished:
    """The folder of the night over `chosen`; in several processes the first one has it, and all
    make every call.

    Leftovers of another night are erased: of other experiences, weights, options, another seed or
    reward (`semantic`).
    found: "this night", "another night" or None, where there were none. keeps: whether anything is
    kept; not of a night over caches, of which nothing is on the disk.
    """

    def __init__(
        self,
        memory: Workspace,
        chosen: Chosen,
        options: StudyOptions,
        questions: Sequence[tuple[str, str]],
        seed: int,
        *,
        prompts: Mapping[int, Sequence[str]] = MappingProxyType({}),
        semantic: Callable[..., float] | None = None,
        keeps: bool = True,
    ):
        self.folder, self.keeps = str(memory.folder / FOLDER), keeps
        self._sealed: Sealed | None = None
        self.found: str | None = None
        if not keeps:
            return
        self._about = _digest(memory, chosen, options, questions, seed, prompts, semantic)
        sources = {kept.experience.source for kept in chosen.experiences}
        self.found = of_first(self._open, memory, sources)

    def _open(self, memory: Workspace, sources: set[str]) -> str | None:
        sealed = self._sealed = memory.buffer.sealed(FOLDER, sources)
        found = None
        if sealed.folder.exists():
            try:
                for _ in sealed.read(ABOUT, self._about):
                    found = "this night"
            except (OSError, ValueError):
                found = "another night" if any(sealed.folder.iterdir()) else None
                sealed.erase()
        if found == "this night":
            sealed.erase_partial()
        else:
            sealed.folder.mkdir(mode=0o700)
            sealed.write(ABOUT, (), self._about)
        return found

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make()` returned the first time, plain data for JSON; of the first process.

        It is made again where what was kept of it is damaged.
        """

        if not self.keeps:
            return make()

        def read() -> Any:
            assert self._sealed is not None
            with suppress(OSError, ValueError):
                return json.loads(b"".join(self._sealed.read(name, self._about)))

        def written() -> Any:
            assert self._sealed is not None
            text = json.dumps(made)
            self._sealed.write(name, [text.encode()], self._about)
            return json.loads(text)

        kept = of_first(read)
        if kept is None:
            # In all processes, as the others would wait longer than they have patience for.
            made = make()
            kept = of_first(written)
        return kept

    def save(self, tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
        """Keep what training has come to in the place of what was kept before."""

        def write() -> None:
            assert self._sealed is not None
            self._sealed.write_tensors(STATE, tensors, told, self._about)

        if self.keeps:
            of_first(write)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `save` kept last; None where it did not yet, or that is damaged."""

        def read() -> tuple[dict[str, Tensor], dict[str, Any]] | None:
            assert self._sealed is not None
            with suppress(OSError, ValueError):
                return self._sealed.read_tensors(STATE, self._about)
            return None

        return of_first(read) if self.keeps else None


def _digest(
    memory: Workspace,
    chosen: Chosen,
    options: StudyOptions,
    questions: Sequence[tuple[str, str]],
    seed: int,
    prompts: Mapping[int, Sequence[str]],
    semantic: Callable[..., float] | None,
) -> str:
    """Of all that decides what a night comes to, a function by its name."""
    experiences = [
        (kept.id, kept.ids, kept.start, weight)
        for kept, weight in zip(chosen.experiences, chosen.weights, strict=True)
    ]
    corpus = None if memory.corpus is None else [list(map(int, row)) for row in memory.corpus]
    words = [memory.relation(x.fact.relation).to_dict() for x in memory.facts(WRITTEN)]
    content = [
        memory.edited.digest(), options.to_dict(), seed, experiences, list(map(list, questions)),
        corpus, words, sorted((i, list(x)) for i, x in prompts.items()), _name(semantic),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _name(function: Callable[..., float] | None) -> str | None:
    if function is None:
        return None
    # An object that is called has the name of its class.
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"
