"""Whose memory is it: which architecture, which weights, which version of them."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hybrid_sleep.configuration import HybridSleepConfig

# A cache means the same under any value of these.
_FREE_FIELDS = (
    "sleep_passes",
    "sleep_schedule",
    "use_cache",
    "initializer_range",
    "attention_dropout",
    "max_position_embeddings",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "weights_version",
)


def architecture(config: HybridSleepConfig) -> dict[str, Any]:
    """The fields of `config` that give a cache its meaning, as plain JSON data."""
    own = {name for name in HybridSleepConfig.__annotations__ if name not in _FREE_FIELDS}
    return json.loads(json.dumps({name: getattr(config, name) for name in sorted(own)}))


def same_architecture(
    held: HybridSleepConfig | dict[str, Any], wanted: HybridSleepConfig, name: str
) -> None:
    """Raise ValueError naming the fields in which the cache's config and the model's differ."""
    if held is wanted:
        return
    before = held if isinstance(held, dict) else architecture(held)
    now = architecture(wanted)
    differing = [key for key in now if before.get(key) != now[key]]
    if differing:
        details = ", ".join(f"{k}={before.get(k)!r} (model: {now[k]!r})" for k in differing)
        raise ValueError(f"{name} was made under another config: {details}; use the same config")


def weights_version(model: nn.Module) -> int:
    """How often the slow weights were changed, counted by the config and by torch itself.

    Every in-place change of a parameter counts (an optimiser step, an edit, a rollback), so equal
    versions of one model mean equal weights. torch does not see a change made through `p.data`:
    whoever does that calls `bump_weights_version()`.
    """
    return model.config.weights_version + sum(
        p._version for p in model.parameters() if not p.is_inference()
    )


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters, name by name. Reads every byte: about a second a gigabyte."""
    return tensors_digest(dict(model.named_parameters()))


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, shapes, dtypes and contents, whatever their order."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name}:{tuple(value.shape)}:{value.dtype}:".encode())
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


@dataclass(frozen=True)
class Owner:
    """The model that a cache was made with, at one version of its weights."""

    model: weakref.ref[nn.Module]
    version: int
    config: HybridSleepConfig

    @classmethod
    def of(cls, model: nn.Module) -> Owner:
        """`model` as it is now."""
        return cls(weakref.ref(model), weights_version(model), model.config)

    def check_same(self, now: Owner, name: str) -> None:
        """Raise ValueError unless `now` is the same model at the same version."""
        if self.model() is not now.model():
            raise ValueError(
                f"{name} was made by another model object; a cache serves the model that made it. "
                "Save it with save_pretrained() and load it for this model: that compares weights"
            )
        if self.version != now.version:
            raise ValueError(
                f"{name} was made under version {self.version} of the weights, the model is at "
                f"version {now.version}; what it remembers was written by other weights, so read "
                "the text again with a new cache"
            )
