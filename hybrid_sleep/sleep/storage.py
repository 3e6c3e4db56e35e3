"""Fast weights on disk: one safetensors file a cache, replaced whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from hybrid_sleep.sleep.history import History
from hybrid_sleep.sleep.state import AttentionMemory, FastWeights
from hybrid_sleep.sleep.weights import (
    Owner,
    architecture,
    same_architecture,
    tensors_digest,
    weights_digest,
)
from hybrid_sleep.support.io import atomic_path, unreadable

if TYPE_CHECKING:
    from hybrid_sleep.sleep.cache import SleepCache

FILE_NAME = "sleep_cache.safetensors"
FORMAT = "hybrid_sleep.cache.2"
_HASHES = ("whole", "opening")
_VECTORS = ("counts", "kept", "positions", "sleeps", "supervised")


def save_cache(cache: SleepCache, directory: str | os.PathLike) -> Path:
    """Write `directory/sleep_cache.safetensors`: fast weights, open window, counts, and whose.

    Raises ValueError for a cache that has read nothing, whose model is gone or has changed since,
    or whose fast weights are not finite. The old file stays whole until the new one is complete.
    """
    model = cache.owner.model() if cache.owner is not None else None
    if model is None:
        raise ValueError(
            "cache has read nothing yet, or its model no longer exists; only a cache that a living "
            "model has filled can be saved"
        )
    cache.owner.check_same(Owner.of(model), "cache")
    cache.check_finite()
    tensors = {f"rows.{name}": getattr(cache, name) for name in _VECTORS}
    for name, value in zip(_HASHES, cache.history.folded(), strict=False):
        tensors[f"rows.{name}"] = value
    if cache.hidden is not None:
        tensors["hidden"] = cache.hidden
    parts = [(f"memory.{i}", m) for i, m in enumerate(cache.memory) if m is not None]
    parts += [(f"opening.{i}", m) for i, m in cache.opening.items()]
    for prefix, part in parts:
        for field, value in part._asdict().items():
            if value is not None:
                tensors[f"{prefix}.{field}"] = value
    metadata = {
        "format": FORMAT,
        "config": json.dumps(architecture(cache.config)),
        "weights": weights_digest(model),
        "weights_version": str(cache.config.weights_version),
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
    cls: type[SleepCache], directory: str | os.PathLike, model: nn.Module
) -> SleepCache:
    """Read what `save_cache` wrote, onto the device of `model`.

    Raises FileNotFoundError where there is no such file, and ValueError where it is no cache, is
    damaged, or belongs to another config, other weights or another weights version.
    """
    path = Path(directory) / FILE_NAME
    if not path.exists():
        raise FileNotFoundError(
            f"directory={str(directory)!r} holds no {FILE_NAME}; save_pretrained() writes one"
        )
    metadata, tensors = _read(path, str(model.input_device))
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} has format {metadata.get('format')!r}, allowed is {FORMAT!r}")
    try:
        config, version = json.loads(metadata["config"]), int(metadata["weights_version"])
        columns, contents = int(metadata["columns"]), metadata["contents"]
        if not isinstance(config, dict):
            raise ValueError(f"its config is a {type(config).__name__}")
    except (KeyError, ValueError) as error:
        raise unreadable(path, f"its metadata cannot be read ({error})") from error
    same_architecture(config, model.config, f"cache {path}")
    if version != model.config.weights_version:
        raise ValueError(
            f"cache {path} was made under weights version {version}, the model is at "
            f"{model.config.weights_version}; read the text again with a new cache"
        )
    if metadata.get("weights") != weights_digest(model):
        raise ValueError(
            f"cache {path} was made by other weights than this model's (SHA-256 differs); "
            "load the checkpoint it was made with"
        )
    if contents != tensors_digest(tensors):
        raise unreadable(path, "its tensors are not those that were saved (SHA-256 differs)")
    cache = cls(model.config)
    for name in _VECTORS:
        setattr(cache, name, tensors.pop(f"rows.{name}").cpu())
    cache.history = History(*(tensors.pop(f"rows.{name}") for name in _HASHES))
    cache.hidden = tensors.pop("hidden", None)
    cache.columns = columns
    parts: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        kind, layer, field = name.split(".")
        parts.setdefault((kind, int(layer)), {})[field] = value
    for (kind, layer), fields in parts.items():
        if kind == "opening":
            cache.opening[layer] = FastWeights(**{"S": None, **fields})
        elif "k" in fields:
            cache.memory[layer] = AttentionMemory(**fields)
        else:
            cache.memory[layer] = FastWeights(**fields)
    cache.owner = Owner.of(model)
    cache.check_finite(f"cache {path}")
    return cache


def _read(path: Path, device: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a file of safetensors; OSError or ValueError if it is none."""
    try:
        with safe_open(path, framework="pt", device=device) as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error
