"""The files of tensors in a folder of facts: factors and trained weights, a file each a commit, and
pristine weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid_sleep.parametric.durable import read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from hybrid_sleep.parametric.factors import Factors

PRISTINE = "pristine.safetensors"
PARTS = ("left", "right", "keys", "facts")

_COMMITS = r"(commit|weights)-\d{6,}\.safetensors"
_UNFINISHED = rf"\.({_COMMITS}|{re.escape(PRISTINE)})\..+\.partial\.safetensors"


def write_factors(folder: Path, commit: int, factors: Mapping[str, Factors]) -> tuple[str, str]:
    """Write the factors of a commit, by site; returns the file's name and its digest."""
    name = f"commit-{commit:06d}.safetensors"
    tensors = {f"{site}.{p}": getattr(part, p) for site, part in factors.items() for p in PARTS}
    return name, write_tensors(folder / name, tensors)


def write_weights(folder: Path, commit: int, weights: Mapping[str, Tensor]) -> tuple[str, str]:
    """Write what a commit trained, by parameter; returns the file's name and its digest."""
    name = f"weights-{commit:06d}.safetensors"
    return name, write_tensors(folder / name, weights)


def read_factors(path: Path, digest: str) -> dict[str, Factors]:
    """Factors by site; OSError or ValueError, naming the file, if not those of `digest`."""
    from hybrid_sleep.parametric.factors import Factors

    by_site: dict[str, dict[str, Tensor]] = {}
    for name, value in read_tensors(path, digest).items():
        site, _, part = name.rpartition(".")
        by_site.setdefault(site, {})[part] = value
    return {site: Factors(**parts) for site, parts in by_site.items()}


def check_factors(site: str, part: Factors) -> set[int]:
    """Ids of the facts of `part`; ValueError unless its tensors fit together and are finite."""
    import torch

    left, right, keys, facts = (getattr(part, name) for name in PARTS)
    fits = (
        left.ndim == right.ndim == keys.ndim == 2
        and left.shape[1] == right.shape[0]
        and keys.shape[1] == right.shape[1]
        and facts.shape == keys.shape[:1]
        and left.dtype == right.dtype == keys.dtype == torch.float32
        and facts.dtype == torch.int64
    )
    if not fits:
        found = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (left, right, keys, facts))
        raise ValueError(
            f"factors of {site} must be left [o, r], right [r, d], keys [p, d] in float32 and "
            f"facts [p] in int64, got {found}"
        )
    for name in ("left", "right", "keys"):
        if not bool(torch.isfinite(getattr(part, name)).all()):
            raise ValueError(f"{name} of {site} must be finite, got a NaN or an infinity")
    return set(facts.tolist())


def save_pristine(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Keep `tensors`, by name, beside those kept already, which stay as they are.

    Raises ValueError, before anything changes, if one that is kept has another shape or dtype.
    """
    kept = read_pristine(folder)
    for name in kept.keys() & tensors.keys():
        old, new = kept[name], tensors[name]
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ValueError(
                f"{name} must be {old.dtype} of shape {tuple(old.shape)}, as it is kept, got "
                f"{new.dtype} of shape {tuple(new.shape)}"
            )
    if tensors.keys() - kept.keys():
        write_tensors(folder / PRISTINE, {**tensors, **kept})


def read_pristine(folder: Path) -> dict[str, Tensor]:
    """What `save_pristine` kept; OSError or ValueError, naming the file, if it is damaged."""
    path = folder / PRISTINE
    return read_tensors(path) if path.exists() else {}


def remove_orphans(folder: Path, used: Collection[str]) -> None:
    """Remove what a killed writer left: files of commits not `used`, and unfinished ones."""
    for path in folder.iterdir():
        orphan = re.fullmatch(_COMMITS, path.name) and path.name not in used
        if orphan or re.fullmatch(_UNFINISHED, path.name):
            path.unlink()
