"""The slow weights: their version, their digest, snapshots of them, and whose a cache is."""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import nn
from transformers.integrations.accelerate import load_offloaded_parameter

from hybrid_sleep.sleep.history import History

_JOURNAL = "_hybrid_sleep_journal"
_PROBED = 8
_version_of = attrgetter("_version")


class _Journal:
    """What was last seen of one model: which parameters are counted, and their digest.

    Lives on the model. A copied or unpickled one is empty, since it tells of other objects.
    """

    def __init__(self) -> None:
        self._registries: list[dict[str, Any]] = []
        self._members: list[Any] | None = None
        self.parameters: dict[int, nn.Parameter] = {}
        self.counted_before = 0
        self.adapters: list[Any] = []
        self.digest: tuple[Hashable, str] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Journal, ()

    @classmethod
    def of(cls, model: nn.Module) -> _Journal:
        """The journal of `model`, with the parameters that it has now."""
        journal = vars(model).setdefault(_JOURNAL, cls())
        # A walk over the modules costs a hundredth of a decode step; asking whether all that was
        # registered is still the same objects costs a tenth of that.
        members, now = journal._members, journal._registered()
        if members is None or len(members) != len(now) or not all(map(is_, members, now)):
            journal._look(model)
        return journal

    def _registered(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._registries)))

    def _look(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._registries = [registry for m in modules for registry in (m._parameters, m._modules)]
        first, self._members = self._members is None, self._registered()
        self.adapters = [m for m in modules if adapter_state(m) is not None]
        # peft wraps a raw parameter anew in every forward pass, which counts as a change.
        recreated = {id(m.get_param()) for m in self.adapters if "parameter_name" in vars(m)}
        found = {id(p): p for m in modules for p in m._parameters.values() if p is not None}
        counted = {
            key: p
            for key, p in found.items()
            # Tensors made in inference mode keep no count, offloaded ones are new at every look.
            if key not in recreated and not p.is_inference() and not p.is_meta
        }
        if not first and counted.keys() != self.parameters.keys():
            # A new parameter begins its count anew, and a version must never come back.
            self.counted_before += 1 + sum(map(_version_of, self.parameters.values()))
        self.parameters = counted
        self.digest = None


def weights_version(model: nn.Module) -> int:
    """How often the slow weights were changed, counted by the config and by torch itself.

    Every in-place change of a parameter counts (an optimiser step, an edit, a rollback), and so
    does another parameter in its place, so equal versions of one model mean equal weights, with the
    same adapters at work. torch does not see a change made through `p.data`: whoever does that
    calls `bump_weights_version()`. Nor can it see those that accelerate keeps offloaded, which are
    new tensors at every call.
    """
    return weights_state(model)[0]


def durable_version(model: nn.Module) -> int:
    """The part of `weights_version` that is saved with the model."""
    return int(getattr(model.config, "weights_version", 0))


def weights_state(model: nn.Module) -> tuple[int, tuple[Hashable, ...]]:
    """`weights_version`, and what of peft's adapters takes part in a forward pass.

    Adapters add to weights without changing them: switching one off, on or over, scaling and
    merging it leave every version as it was (peft merges through `p.data`).
    """
    journal = _Journal.of(model)
    version = durable_version(model) + journal.counted_before
    version += sum(map(_version_of, journal.parameters.values()))
    adapters: list[Hashable] = []
    for module in journal.adapters:
        adapters.append(adapter_state(module))
        if "parameter_name" in vars(module):
            adapters.append(_checksum(module.get_param()))
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


@contextlib.contextmanager
def gathered(parameters: Iterable[torch.Tensor], write: bool = False) -> Iterator[None]:
    """`parameters` whole, where DeepSpeed's ZeRO-3 has partitioned them; a collective call then.

    write: what the first process makes of them is kept, in all.
    """
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield


def weights_digest(model: nn.Module, instead: Mapping[str, torch.Tensor] | None = None) -> str:
    """SHA-256 of all parameters, name by name, and of the adapters at work, if there are any.

    Reads every byte, about a second a gigabyte, once for each version of the weights. A write
    through `p.data` is none, and then found only where it touches one of a few elements of each
    parameter: whoever writes so calls `bump_weights_version()`. Parameters
    that accelerate keeps elsewhere (offloaded to the CPU or a disk) are fetched one by one, and
    hashed every time, since no version tells of them.
    instead: parameters to take as if these were theirs, by name; that is never cached.
    """
    others = instead or {}
    parameters = sorted(model.named_parameters(), key=lambda pair: pair[0])
    journal = _Journal.of(model)
    offloaded = bool(others) or any(p.is_meta or hasattr(p, "ds_id") for _, p in parameters)
    key = None if offloaded else (weights_state(model), _probe(p for _, p in parameters))
    if key is not None and journal.digest is not None and journal.digest[0] == key:
        return journal.digest[1]

    # transformers says that it fetches for its own models alone, and does for any module.
    anyone: Any = model

    def fetched() -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in parameters:
            p = load_offloaded_parameter(anyone, name) if parameter.is_meta else parameter
            with gathered([p]):
                yield name, others.get(name, p)

    states = [state for state in map(adapter_state, model.modules()) if state is not None]
    digest = _digest(fetched(), repr(states) if states else "")
    journal.digest = None if key is None else (key, digest)
    return digest


@torch.no_grad()
def _probe(parameters: Iterable[torch.Tensor]) -> str:
    """A hash of some elements of each parameter, spread over it.

    Versions do not tell of writes through `p.data`, by which some optimisers step; few of them
    leave all of these elements as they were.
    """
    samples = []
    for p in parameters:
        flat = p.detach().reshape(-1)
        samples.append(flat[:: max(1, len(flat) // _PROBED)].contiguous().view(torch.uint8).cpu())
    return hashlib.sha256(torch.cat(samples).numpy().tobytes()).hexdigest() if samples else ""


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, shapes, dtypes and contents, whatever their order."""
    return _digest(sorted(tensors.items(), key=lambda pair: pair[0]))


def _digest(tensors: Iterable[tuple[str, torch.Tensor]], more: str = "") -> str:
    digest = hashlib.sha256()
    for name, value in tensors:
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name}:{tuple(value.shape)}:{value.dtype}:".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    digest.update(more.encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Snapshot:
    """Copies of some parameters as they were, and their digest (see `tensors_digest`)."""

    tensors: dict[str, torch.Tensor]
    digest: str


def bump_version(model: nn.Module) -> int:
    """Count a change of the slow weights, durably (it is saved with the config)."""
    config: Any = model.config
    config.weights_version = durable_version(model) + 1
    return weights_version(model)


@torch.no_grad()
def snapshot(model: nn.Module, names: Collection[str] | None = None) -> Snapshot:
    """Copy the parameters `names` (None: all) of `model`, for `rollback`.

    Raises ValueError naming the first of `names` that is no parameter of the model.
    """
    parameters = dict(model.named_parameters())
    chosen = list(parameters) if names is None else list(names)
    for name in chosen:
        if name not in parameters:
            raise ValueError(f"names must be parameters of the model, got {name!r}")
    with gathered(parameters[name] for name in chosen):
        tensors = {name: parameters[name].detach().clone() for name in chosen}
    return Snapshot(tensors, tensors_digest(tensors))


@torch.no_grad()
def rollback(model: nn.Module, to: Snapshot) -> int:
    """Put back what `snapshot` copied, bit for bit; returns the weights version, which grows.

    Parameters are written in place, so optimisers and captured graphs go on with them. It grows,
    rather than going back: a cache made in between was written by weights that are gone, and one
    made before is refused as well, since versions are never used twice.

    Raises ValueError, before anything is changed, for a snapshot of other parameters or one that
    was changed itself, and RuntimeError if the bits are not those of the snapshot afterwards.
    """
    parameters = dict(model.named_parameters())
    with gathered([parameters[n] for n in to.tensors if n in parameters], write=True):
        for name, saved in to.tensors.items():
            p = parameters.get(name)
            if p is None or p.shape != saved.shape or p.dtype != saved.dtype:
                found = "no such parameter" if p is None else f"{p.dtype} of shape {tuple(p.shape)}"
                raise ValueError(
                    f"snapshot must be of this model: it has {name!r} as {saved.dtype} of shape "
                    f"{tuple(saved.shape)}, the model has {found}"
                )
        if tensors_digest(to.tensors) != to.digest:
            raise ValueError("snapshot must be as it was taken, but its tensors have changed since")
        for name, saved in to.tensors.items():
            parameters[name].copy_(saved)
        if tensors_digest({name: parameters[name] for name in to.tensors}) != to.digest:
            raise RuntimeError("the parameters are not those of the snapshot after copying it back")
    return bump_version(model)


@dataclass(frozen=True)
class Owner:
    """The model that a cache was made with, at one version of its weights."""

    model: weakref.ref[nn.Module]
    version: int
    adapters: tuple[Hashable, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Owner:
        """`model` as it is now."""
        return cls(weakref.ref(model), *weights_state(model))

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
        if model is None or Owner.of(model) != self:
            return FormerOwner, (None, 0)
        return FormerOwner, (weights_digest(model), durable_version(model))


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
        """Raise ValueError unless `now` has the same weights."""
        if self.digest is None:
            raise ValueError(
                f"{name} was pickled when its model had changed or no longer existed, so no model "
                "can be known to have written it; read the text again with a new cache"
            )
        model = now.model()
        assert model is not None
        if self.version != durable_version(model):
            raise ValueError(
                f"{name} was made under weights version {self.version}, the model is at "
                f"{durable_version(model)}; read the text again with a new cache"
            )
        if self.digest != weights_digest(model):
            raise ValueError(
                f"{name} was made by other weights than this model's (SHA-256 differs); load the "
                "checkpoint it was made with"
            )
