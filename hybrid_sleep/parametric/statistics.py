"""The second moment of the keys that a model forms on ordinary text: what an edit leaves alone.

C = E[k k^T] of arXiv 2210.07229, Eq. 14. A few times as many tokens as a key has entries suffice
(arXiv 2506.04226), minutes instead of hours. Up to `DENSE` entries it is summed whole, in fp64;
wider keys go into a sketch of bounded size, robust Frequent Directions (Luo et al., "Robust
Frequent Directions", JMLR 2019, Algorithm 2).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_sleep.parametric.sampling import SAMPLED_AT_ONCE, continuations
from hybrid_sleep.parametric.sites import Site, capture, ending, frozen
from hybrid_sleep.parametric.solve import Spectrum
from hybrid_sleep.support.io import atomic_path, unreadable
from hybrid_sleep.validation import check_count

DENSE = 4096
ROWS = 512
AT_ONCE = 8
# Tokens of a corpus for each entry of a key, and at least.
TOKENS_AN_ENTRY, LEAST_TOKENS = 10, 2048
SAMPLE_LENGTH = 64


class SecondMoment:
    """Sum of `k k^T` over keys, exact, in fp64."""

    def __init__(self, inputs: int, device: torch.device | str = "cpu"):
        self.total = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.count = 0.0

    def add(self, keys: Tensor, weight: float = 1.0) -> None:
        """Count `keys: [T, d]`, each `weight` times."""
        keys = keys.double()
        self.total.addmm_(keys.T, keys, alpha=weight)
        self.count += weight * len(keys)

    def spectrum(self) -> Spectrum:
        """Of the mean over all keys so far."""
        return Spectrum.of(self.total / self.count)


class Sketch:
    """The same in `2 rows * d` numbers: the strongest directions, and a floor for what is left.

    `||C - sketch||_2 <= tr(C - C_j) / (2 (rows - j))` for every j < rows, C_j the best of rank j,
    in sums over keys: half of what Frequent Directions alone would leave.
    """

    def __init__(self, inputs: int, rows: int = ROWS, device: torch.device | str = "cpu"):
        check_count("rows", rows)
        self.rows = min(rows, inputs)
        self.held = torch.zeros(0, inputs, dtype=torch.float64, device=device)
        self.floor, self.count = 0.0, 0.0

    def add(self, keys: Tensor, weight: float = 1.0) -> None:
        """Count `keys: [T, d]`, each `weight` times."""
        self.count += weight * len(keys)
        for part in (weight**0.5 * keys.double()).split(self.rows):
            self.held = torch.cat((self.held, part))
            if len(self.held) > 2 * self.rows:
                self._shrink()

    def _shrink(self) -> None:
        _, sizes, directions = torch.linalg.svd(self.held, full_matrices=False)
        squares = sizes.square()
        lost = squares[self.rows] if len(squares) > self.rows else squares.new_zeros(())
        kept = (squares[: self.rows] - lost).clamp(min=0).sqrt()
        self.held = kept[:, None] * directions[: self.rows]
        # What is taken from every kept direction is missing in all; half of it is the best guess.
        self.floor += float(lost) / 2

    def spectrum(self) -> Spectrum:
        """Of the mean over all keys so far."""
        if len(self.held) > self.rows:
            self._shrink()
        _, sizes, directions = torch.linalg.svd(self.held, full_matrices=False)
        values = (sizes.square() + self.floor) / self.count
        return Spectrum(directions.T.contiguous(), values, self.floor / self.count)


@dataclass(frozen=True)
class KeyStatistics:
    """The spectrum of one site's keys, and what it was made from.

    made_from: `model` (a digest of the pristine weights), `site`, `corpus` (a digest of its
    tokens), `tokens`, and `method`: "second moment" or "sketch of N rows".
    """

    spectrum: Spectrum
    made_from: dict[str, Any]

    def check(self, model: str, site: Site) -> None:
        """Raise ValueError unless these are of the model with this digest and of `site`."""
        for name, wanted in (("model", model), ("site", site.name)):
            if self.made_from[name] != wanted:
                raise ValueError(
                    f"statistics must be of this {name}, {wanted!r}, got those of "
                    f"{self.made_from[name]!r}; collect them again"
                )

    def save(self, path: str | os.PathLike) -> None:
        """Write them to `path` (safetensors), atomically."""
        from safetensors.torch import save_file

        tensors = {"vectors": self.spectrum.vectors, "values": self.spectrum.values}
        more = json.dumps({**self.made_from, "floor": self.spectrum.floor})
        with atomic_path(path) as partial:
            save_file(
                {name: x.cpu().contiguous() for name, x in tensors.items()},
                partial,
                metadata={"made_from": more},
            )

    @classmethod
    def load(cls, path: str | os.PathLike) -> KeyStatistics:
        """What `save` wrote; OSError or ValueError naming a file that is missing or damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                made_from = json.loads(file.metadata()["made_from"])
                vectors, values = file.get_tensor("vectors"), file.get_tensor("values")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise unreadable(path, error) from error
        return cls(Spectrum(vectors, values, made_from.pop("floor")), made_from)


def collect(
    model: nn.Module,
    sites: Sequence[Site],
    corpora: Sequence[Sequence[Sequence[int]]],
    digest: str,
    *,
    rows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Site, KeyStatistics]:
    """Statistics of `sites` on `corpora`, each of rows of ids, in one forward pass over them.

    The corpora count alike, however long they are. digest: of the pristine weights, which the model
    must have now. rows: of a sketch; None sums keys of up to `DENSE` entries whole and sketches
    wider ones with `ROWS`. Keys of every pass of a sleep count. Raises ValueError for corpora with
    fewer tokens than a key has entries.
    """
    kept = [sorted((list(row) for row in c if len(row)), key=len) for c in corpora]
    widest = max(site.inputs for site in sites)
    sizes = [sum(map(len, corpus)) for corpus in kept]
    if sum(sizes) < widest:
        raise ValueError(
            f"corpora must have as many tokens as a key has entries, {widest}, and better ten "
            f"times as many, got {sum(sizes)}"
        )
    held = [size for size in sizes if size]
    shares = [sum(held) / len(held) / size if size else 0.0 for size in sizes]
    device = next(model.parameters()).device
    sums: dict[Site, SecondMoment | Sketch] = {}
    for site in sites:
        dense = rows is None and site.inputs <= DENSE
        sums[site] = (
            SecondMoment(site.inputs, device)
            if dense
            else Sketch(site.inputs, rows or ROWS, device)
        )
    # The longest first, and of one length by corpus.
    order = sorted(
        ((-len(row), c, row) for c, corpus in enumerate(kept) for row in corpus),
        key=lambda of: of[:2],
    )
    done = 0
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.enter_context(torch.no_grad())
        seen = stack.enter_context(capture(model, sites))
        run = stack.enter_context(ending(model, max(site.layer for site in sites)))
        # Rows of one length: a pad's key is nobody's, and which they are no mask says where a
        # model cuts rows into windows of its own.
        for (_, c), same in groupby(order, key=lambda of: of[:2]):
            while rows_now := [row for _, _, row in islice(same, AT_ONCE)]:
                ids = torch.tensor(rows_now, device=device)
                run(input_ids=ids)
                for site in sites:
                    for keys in seen[site]:
                        sums[site].add(keys.flatten(0, -2), shares[c])
                    seen[site].clear()
                done += len(rows_now)
                if progress is not None:
                    progress(done, len(order))
    hashed = hashlib.sha256(json.dumps(kept).encode()).hexdigest()
    return {
        site: KeyStatistics(
            total.spectrum(),
            {
                "model": digest,
                "site": site.name,
                "corpus": hashed,
                "tokens": round(total.count),
                "method": "second moment"
                if isinstance(total, SecondMoment)
                else f"sketch of {total.rows} rows",
            },
        )
        for site, total in sums.items()
    }


def enough_tokens(sites: Sequence[Site]) -> int:
    """Of a corpus for the statistics of `sites`."""
    return max(LEAST_TOKENS, TOKENS_AN_ENTRY * max(site.inputs for site in sites))


def own_samples(
    model: Any,
    tokenizer: Any,
    tokens: int,
    *,
    length: int = SAMPLE_LENGTH,
    behind: Sequence[Sequence[int]] = (),
    seed: int = 0,
    at_once: int = SAMPLED_AT_ONCE,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Rows of `length` ids that the model writes, at temperature 1, with every filter off.

    They are what it knows best, and need no corpus. Rows begin with the tokenizer's first token and
    go on behind its last one. With `behind` each of these texts in turn, which does not count, has
    a row behind it: behind what opens a user's turn (`user_turn`) a chat model writes the question
    and its reply (arXiv 2406.08464). The global random state is left as it was.
    """
    check_count("tokens", tokens)
    begun = [list(ids) for ids in behind]
    if not begun:
        begun = [[first_token(tokenizer)]]
    new = length if behind else length - 1
    count = -(-tokens // length)
    rows = sorted((begun[i % len(begun)] for i in range(count)), key=len)
    written = continuations(
        model, tokenizer, rows, new, seed=seed, at_once=at_once, progress=progress
    )
    return [[*row, *more] for row, more in zip(rows, written, strict=True)]


def first_token(tokenizer: Any) -> int:
    """What a text of the model's own begins with: the tokenizer's first token, or its last one."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    firsts = (getattr(tokenizer, name, None) for name in names)
    return next((int(token) for token in firsts if token is not None), 0)


def load_or_collect(
    folder: Path,
    model: nn.Module,
    sites: Sequence[Site],
    digest: str,
    corpora: Callable[[], Sequence[Sequence[Sequence[int]]]],
    **options: Any,
) -> dict[Site, KeyStatistics]:
    """Those in `folder`, of these sites and this model; what is missing is collected and kept."""
    found: dict[Site, KeyStatistics] = {}
    for site in sites:
        with suppress(FileNotFoundError):
            found[site] = KeyStatistics.load(folder / f"{site.name}.safetensors")
            found[site].check(digest, site)
    missing = [site for site in sites if site not in found]
    if missing:
        new: Mapping[Site, KeyStatistics] = collect(model, missing, corpora(), digest, **options)
        for site, statistics in new.items():
            statistics.save(folder / f"{site.name}.safetensors")
            found[site] = statistics
    return found
