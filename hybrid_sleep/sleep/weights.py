"""Whose memory is it: which architecture, which weights, which version of them."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations.accelerate import load_offloaded_parameter

from hybrid_sleep.configuration import HybridSleepConfig
from hybrid_sleep.sleep.history import History

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
    versions of one model mean equal weights, with the same adapters at work (`adapters`). torch
    does not see a change made through `p.data`: whoever does that calls `bump_weights_version()`.
    Nor can it see those that accelerate keeps offloaded, which are new tensors at every call.
    """
    return weights_state(model)[0]


def weights_state(model: nn.Module) -> tuple[int, tuple[Hashable, ...]]:
    """`weights_version`, and what of peft's adapters takes part in a forward pass.

    Adapters add to weights without changing them: switching one off, on or over, scaling and
    merging it leave every version as it was (peft merges through `p.data`). A loop of its own,
    since `modules()` also makes up names and takes several times as long.
    """
    version, adapters, recreated = model.config.weights_version, [], set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        held = vars(module)
        if "merged_adapters" in held or "_active_adapter" in held:
            adapters.append(adapter_state(module))
            if "parameter_name" in held:
                # peft wraps the parameter anew in every forward pass, which counts as a change.
                parameter = module.get_param()
                recreated.add(id(parameter))
                adapters.append(_checksum(parameter))
        for p in held["_parameters"].values():
            # Tensors made in inference mode keep no count.
            if p is None or p.is_inference() or p.is_meta or id(p) in recreated:
                continue
            version += p._version
        if held["_modules"]:
            waiting += [child for child in held["_modules"].values() if child is not None]
    return version, tuple(adapters)


def adapter_state(module: nn.Module) -> Hashable:
    """Which adapters of one of peft's modules are at work, and how; None for any other module."""
    held = vars(module)
    if "merged_adapters" not in held and "_active_adapter" not in held:
        return None
    active = held.get("_active_adapter")
    return (
        bool(held.get("_disable_adapters", False)),
        tuple(active) if isinstance(active, (list, tuple)) else active,
        tuple(held.get("merged_adapters", ())),
        tuple(sorted((name, float(x)) for name, x in held.get("scaling", {}).items())),
    )


def _checksum(parameter: torch.Tensor) -> int:
    rows = parameter.detach().reshape(1, -1, parameter.shape[-1])
    none = torch.zeros(1, dtype=torch.long)
    return int(History.empty(1).extend(rows, none, none + rows.shape[1]).folded().whole)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters, name by name, and of the adapters at work, if there are any.

    Reads every byte: about a second a gigabyte. Parameters that accelerate keeps elsewhere
    (offloaded to the CPU or a disk) are fetched one by one.
    """

    def fetched() -> Iterator[tuple[str, torch.Tensor]]:
        for name, p in sorted(model.named_parameters(), key=lambda pair: pair[0]):
            yield name, load_offloaded_parameter(model, name) if p.is_meta else p

    states = [state for state in map(adapter_state, model.modules()) if state is not None]
    return _digest(fetched(), repr(states) if states else "")


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, shapes, dtypes and contents, whatever their order."""
    return _digest(sorted(tensors.items(), key=lambda pair: pair[0]))


def _digest(tensors: Iterable[tuple[str, torch.Tensor]], more: str = "") -> str:
    digest = hashlib.sha256()
    for name, value in tensors:
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name}:{tuple(value.shape)}:{value.dtype}:".encode())
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    digest.update(more.encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Owner:
    """The model that a cache was made with, at one version of its weights."""

    model: weakref.ref[nn.Module]
    version: int
    adapters: tuple[Hashable, ...]
    config: HybridSleepConfig

    @classmethod
    def of(cls, model: nn.Module) -> Owner:
        """`model` as it is now."""
        return cls(weakref.ref(model), *weights_state(model), model.config)

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
        if self.adapters != now.adapters:
            raise ValueError(
                f"{name} was made with other adapters at work than the model has now: they were "
                "switched, scaled or merged since; go back to those, or read the text again with "
                "a new cache"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Owner:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process has another model object: there, only equal weights can tell.
        model = self.model()
        unchanged = model is not None and Owner.of(model) == self
        digest = weights_digest(model) if unchanged else None
        return FormerOwner, (digest, self.config.weights_version)


@dataclass(frozen=True)
class FormerOwner:
    """Whose an unpickled cache was: a model of these weights, at this version.

    digest: see `weights_digest`; None where the model was gone or had changed when it was pickled.
    """

    digest: str | None
    version: int

    def model(self) -> None:
        """There is none yet; the first model that the cache serves becomes its owner."""

    def check_same(self, now: Owner, name: str) -> None:
        """Raise ValueError unless `now` has the same weights. Reads every byte of them."""
        if self.digest is None:
            raise ValueError(
                f"{name} was pickled when its model had changed or no longer existed, so no model "
                "can be known to have written it; read the text again with a new cache"
            )
        if self.version != now.config.weights_version:
            raise ValueError(
                f"{name} was made under weights version {self.version}, the model is at "
                f"{now.config.weights_version}; read the text again with a new cache"
            )
        if self.digest != weights_digest(now.model()):
            raise ValueError(
                f"{name} was made by other weights than this model's (SHA-256 differs); load the "
                "checkpoint it was made with"
            )
