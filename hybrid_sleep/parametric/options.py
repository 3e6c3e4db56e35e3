"""How a memory works: where and how strongly it writes, when it sleeps, what its gate asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hybrid_sleep.parametric.edit import EditOptions
from hybrid_sleep.parametric.experience.options import StudyOptions
from hybrid_sleep.parametric.gate import Thresholds
from hybrid_sleep.parametric.pressure import Limits
from hybrid_sleep.parametric.refine import Refinement
from hybrid_sleep.parametric.schedule import Schedule
from hybrid_sleep.parametric.targets import TargetOptions
from hybrid_sleep.support.io import read_json, write_json_atomic
from hybrid_sleep.validation import check_count, check_number


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """What a `Memory` is opened with; kept in its folder.

    layers: of the sites to edit, ascending; None: found with the first facts (see `locate`), with
        the position of keys.
    wake: how `learn` writes; night: how a sleep does, by default in every wording of a relation.
    refine: how a sleep finds the values of its solution again, through the model.
    thresholds: of the gate. limits: of the pressure to sleep. cap: facts to keep at most.
    strengths: multiples of the night's weight, tried in order while locality, negation or
        perplexity misses its threshold.
    naps: facts that a nap audits. seed: of all that is drawn. study: a sleep over experience.
    undos: the newest commits that can be taken back; for each of them that trained weights, these
        are on the disk, as large as the model. None: all of them.
    schedule: when to sleep, which is asked for, not acted on by itself (see `Memory.due`).
    """

    layers: tuple[int, ...] | None = None
    wake: EditOptions = field(default_factory=lambda: EditOptions(statements=1, questions=1))
    night: EditOptions = field(default_factory=EditOptions)
    refine: Refinement = field(default_factory=Refinement)
    thresholds: Thresholds = field(default_factory=Thresholds)
    limits: Limits = field(default_factory=Limits)
    cap: int = 1000
    strengths: tuple[float, ...] = (1.0, 4.0, 16.0)
    naps: int = 8
    undos: int | None = 30
    seed: int = 0
    study: StudyOptions = field(default_factory=StudyOptions)
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        for name in ("cap", "naps"):
            check_count(name, getattr(self, name))
        check_count("seed", self.seed, minimum=0)
        if self.undos is not None:
            check_count("undos", self.undos, minimum=0)
        if not self.strengths:
            raise ValueError("strengths must be one or more, got none")
        for strength in self.strengths:
            check_number("strengths", strength, above=0)
        if self.layers is not None:
            for layer in self.layers:
                check_count("layers", layer, minimum=0)
            if not self.layers or list(self.layers) != sorted(set(self.layers)):
                raise ValueError(f"layers must be one or more, ascending, got {list(self.layers)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MemoryOptions:
        """The options of `to_dict`."""

        def edit(part: Mapping[str, Any]) -> EditOptions:
            rest = {**part, "target": TargetOptions(**part["target"])}
            return EditOptions(**{**rest, "prefixes": tuple(part["prefixes"])})

        parts = {
            "wake": edit,
            "night": edit,
            "refine": lambda part: Refinement(**part),
            "thresholds": lambda part: Thresholds(**part),
            "limits": lambda part: Limits(**part),
            "layers": lambda part: None if part is None else tuple(part),
            "strengths": tuple,
            "study": StudyOptions.from_dict,
            "schedule": Schedule.from_dict,
        }
        given: dict[str, Any] = {k: parts[k](v) if k in parts else v for k, v in data.items()}
        return cls(**given)


def changed_options(options: MemoryOptions, changes: Mapping[str, Any]) -> MemoryOptions:
    """`options` with `changes`: values by name, those of a part by dotted names or in a mapping.

    Raises ValueError, naming it, for what is no option, and for values of the wrong kind.
    """
    content = options.to_dict()

    def change(part: dict[str, Any], values: Mapping[str, Any], above: str) -> None:
        for key, value in values.items():
            name, _, below = str(key).partition(".")
            known = isinstance(part, dict) and name in part
            nested = {below: value} if below else value
            if known and isinstance(part[name], dict) and isinstance(nested, Mapping):
                change(part[name], nested, f"{above}{name}.")
            elif not known or below or isinstance(part[name], dict):
                raise ValueError(f"options must be those of a memory, got {above}{key!s}")
            else:
                part[name] = value

    change(content, changes, "")
    try:
        return MemoryOptions.from_dict(content)
    except TypeError as error:
        raise ValueError(f"options must have values of the right kind: {error}") from error


def chosen_options(path: Path, given: MemoryOptions | None) -> MemoryOptions:
    """`given`, or what the file `path` has, or the defaults.

    Where edits go stays as it is in the file, unless `given` says otherwise.
    """
    if not path.exists():
        return given or MemoryOptions()
    try:
        kept = MemoryOptions.from_dict(read_json(path))
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} must hold the options of a memory: {error}") from error
    if given is None:
        return kept
    return given if given.layers is not None else replace(given, layers=kept.layers)


def remember_options(path: Path, options: MemoryOptions) -> None:
    """Keep `options` in the file `path`, atomically, unless it has them already."""
    if not path.exists() or MemoryOptions.from_dict(read_json(path)) != options:
        write_json_atomic(path, options.to_dict())
