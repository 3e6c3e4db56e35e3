"""Fast weights on disk: one safetensors file a cache, replaced whole or not at all."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hybrid_sleep.sleep.history import History
from hybrid_sleep.sleep.options import SleepOptions
from hybrid_sleep.sleep.state import LayerState
from hybrid_sleep.sleep.weights import Owner, durable_version, tensors_digest, weights_digest
from hybrid_sleep.support.io import atomic_path, unreadable

if TYPE_CHECKING:
    from hybrid_sleep.sleep.cache import SleepCache

FILE_NAME = "sleep_cache.safetensors"
FORMAT = "hybrid_sleep.cache.3"
_HASHES = ("whole", "opening")
# Fields that configs got after files of this format were written, and what held before.
_SINCE = {
    "sleep_carry": "both",
    "distinct_passes": 1,
    "linear_allow_neg_eigval": False,
    "token_fields": None,
}
_VECTORS = ("counts", "kept", "positions", "sleeps", "supervised")

# Format 2 had names for the states of two kinds of layers.
_FORMAT_2 = "hybrid_sleep.cache.2"
_FIELDS_OF_2 = {"q_tail": "tails.0", "kv_tail": "tails.1", "k": "slots.0", "v": "slots.1"}


class Keeper(Protocol):
    """What storage needs of a model beside its parameters."""

    @property
    def options(self) -> SleepOptions: ...

    @property
    def input_device(self) -> torch.device: ...

    def architecture(self) -> dict[str, Any]:
        """The fields of its config that give a cache its meaning, as plain JSON data."""


def save_cache(cache: SleepCache, directory: str | os.PathLike) -> Path:
    """Write `directory/sleep_cache.safetensors`: fast weights, open window, counts, and whose.

    Raises ValueError for a cache that has read nothing, whose model is gone or has changed since,
    or whose fast weights are not finite. The old file stays whole until the new one is complete.
    """
    model: Any = cache.owner.model() if cache.owner is not None else None
    if model is None:
        raise ValueError(
            "cache has read nothing yet, or its model no longer exists; only a cache that a living "
            "model has filled can be saved"
        )
    assert isinstance(cache.owner, Owner)
    cache.owner.check_same(Owner.of(model), "cache")
    cache.check_finite()
    tensors = {f"rows.{name}": getattr(cache, name) for name in _VECTORS}
    for name, value in zip(_HASHES, cache.history.folded(), strict=False):
        tensors[f"rows.{name}"] = value
    if cache.hidden is not None:
        tensors["hidden"] = cache.hidden
    for kind in ("states", "opening"):
        for layer, state in getattr(cache, kind).items():
            parts = {"S": state.S}
            parts |= {f"tails.{i}": x for i, x in enumerate(state.tails)}
            parts |= {f"slots.{i}": x for i, x in enumerate(state.slots)}
            tensors |= {f"{kind}.{layer}.{k}": x for k, x in parts.items() if x is not None}
    metadata = {
        "format": FORMAT,
        "config": json.dumps(model.architecture()),
        "weights": weights_digest(model),
        "weights_version": str(durable_version(model)),
        "columns": str(cache.columns),
    }
    # safetensors refuses views that share storage; what is saved is what is seen.
    tensors = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
    metadata["contents"] = tensors_digest(tensors)
    path = Path(directory) / FILE_NAME
    with atomic_path(path) as partial:
        save_file(tensors, partial, metadata=metadata)
    return path


def load_cache(
    cls: type[SleepCache], directory: str | os.PathLike, model: Any
) -> SleepCache:
    """Read what `save_cache` wrote, onto the device of `model` (see `Keeper`).

    Raises FileNotFoundError where there is no such file, and ValueError where it is no cache, is
    damaged, or belongs to another config, other weights or another weights version.
    """
    from hybrid_sleep.sleep.cache import check_same_fields

    path = Path(directory) / FILE_NAME
    if not path.exists():
        raise FileNotFoundError(
            f"directory={str(directory)!r} holds no {FILE_NAME}; save_pretrained() writes one"
        )
    metadata, tensors = _read(path, str(model.input_device))
    if metadata.get("format") not in (FORMAT, _FORMAT_2):
        raise ValueError(
            f"{path} has format {metadata.get('format')!r}, allowed is {FORMAT!r} or {_FORMAT_2!r}"
        )
    try:
        config, version = json.loads(metadata["config"]), int(metadata["weights_version"])
        columns, contents = int(metadata["columns"]), metadata["contents"]
        if not isinstance(config, dict):
            raise ValueError(f"its config is a {type(config).__name__}")
    except (KeyError, ValueError) as error:
        raise unreadable(path, f"its metadata cannot be read ({error})") from error
    check_same_fields({**_SINCE, **config}, model.architecture(), f"cache {path}")
    if version != durable_version(model):
        raise ValueError(
            f"cache {path} was made under weights version {version}, the model is at "
            f"{durable_version(model)}; read the text again with a new cache"
        )
    if metadata.get("weights") != weights_digest(model):
        raise ValueError(
            f"cache {path} was made by other weights than this model's (SHA-256 differs); "
            "load the checkpoint it was made with"
        )
    if contents != tensors_digest(tensors):
        raise unreadable(path, "its tensors are not those that were saved (SHA-256 differs)")
    cache = cls(model.options)
    for name in _VECTORS:
        setattr(cache, name, tensors.pop(f"rows.{name}").cpu())
    whole, opening = (tensors.pop(f"rows.{name}") for name in _HASHES)
    cache.history = History(whole, opening)
    cache.hidden = tensors.pop("hidden", None)
    cache.columns = columns
    parts: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        kind, number, field = name.split(".", 2)
        parts.setdefault((kind, int(number)), {})[_FIELDS_OF_2.get(field, field)] = value
    for (kind, layer), fields in sorted(parts.items()):
        states = cache.opening if kind == "opening" else cache.states
        slots = (x for x in _numbered("slots", fields) if x is not None)
        states[layer] = LayerState(fields.get("S"), _numbered("tails", fields), tuple(slots))
    cache.owner = Owner.of(model)
    cache.check_finite(f"cache {path}")
    return cache


def _numbered(
    name: str, fields: dict[str, torch.Tensor]
) -> tuple[torch.Tensor | None, ...]:
    """`name.0, name.1, ...` of `fields` as a tuple, None where one was left out."""
    given = [int(m[1]) for field in fields if (m := re.fullmatch(rf"{name}\.(\d+)", field))]
    return tuple(fields.get(f"{name}.{i}") for i in range(max(given, default=-1) + 1))


def _read(path: Path, device: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a file of safetensors; OSError or ValueError if it is none."""
    try:
        with safe_open(path, framework="pt", device=device) as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error
