"""A training run in one YAML file, checked in full before anything is built."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from hybrid_sleep.training.depth import DepthPolicy, parse_depth

Schedule = Literal["constant", "linear", "cosine", "trapezoid"]


@dataclass(kw_only=True)
class TaskConfig:
    """What to learn: a task of `hybrid_sleep.eval.tasks` and its parameters."""

    name: str
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class TrainConfig:
    """How to learn it.

    Optimisation: `steps` updates of `batch_size` examples each (`accumulate` micro-batches of
    `batch_size / accumulate`), Muon with `lr_muon` on matrices, AdamW with `lr_adamw` and betas
    (0.9, 0.95) on the rest, decoupled `weight_decay` (matrices and embeddings), gradients clipped
    to norm `grad_clip` (None: not clipped). The rates
    rise linearly for `warmup` steps, then follow `schedule`: `constant`; `linear` or `cosine` to
    zero at the last step; `trapezoid`, constant and then linear to zero over the last `cooldown`
    share of all steps.

    Reports: metrics every `log_every` steps; every `eval_every` steps (None: never) the exact
    accuracy at `eval_depths` (None: every depth that training draws) on `eval_examples` examples
    drawn from the training split with a seed of their own. A checkpoint every `save_every` steps
    (None: only when interrupted), of which the last `keep_checkpoints` are kept.

    Machine: `dtype` float32, or bfloat16 (autocast over fp32 weights); `device` auto or cpu;
    `activation_checkpointing` block, pass or None (see `model.set_activation_checkpointing`);
    `threads` of the processor for one operation (None: torch's choice, one a core). A small model
    that shares its cores with anything else trains several times faster with one.
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    lr_muon: float = 2e-3
    lr_adamw: float = 5e-5
    weight_decay: float = 0.0
    warmup: int = 0
    schedule: Schedule = "constant"
    cooldown: float = 0.3
    grad_clip: float | None = 1.0
    eval_every: int | None = None
    eval_depths: list[int] | None = None
    eval_examples: int = 1000
    log_every: int = 10
    save_every: int | None = None
    keep_checkpoints: int = 1
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu"] = "auto"
    activation_checkpointing: Literal["block", "pass"] | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        def demand(holds: bool, name: str, allowed: str) -> None:
            if not holds:
                raise ValueError(f"train.{name}={getattr(self, name)!r}; allowed: {allowed}")

        for name in ("steps", "batch_size", "accumulate", "eval_examples", "log_every"):
            demand(getattr(self, name) >= 1, name, "an integer >= 1")
        demand(self.keep_checkpoints >= 1, "keep_checkpoints", "an integer >= 1")
        demand(
            self.batch_size % self.accumulate == 0,
            "accumulate",
            f"a divisor of train.batch_size={self.batch_size}",
        )
        for name in ("lr_muon", "lr_adamw"):
            rate = getattr(self, name)
            demand(math.isfinite(rate) and rate > 0, name, "a finite number > 0")
        demand(0 <= self.weight_decay < math.inf, "weight_decay", "a finite number >= 0")
        demand(0 <= self.warmup <= self.steps, "warmup", f"0..train.steps={self.steps}")
        demand(0 <= self.cooldown <= 1, "cooldown", "a share of the steps, 0..1")
        clip = self.grad_clip
        demand(clip is None or 0 < clip < math.inf, "grad_clip", "null or a finite number > 0")
        for name in ("eval_every", "save_every", "threads"):
            every = getattr(self, name)
            demand(every is None or every >= 1, name, "null or an integer >= 1")
        depths = self.eval_depths
        demand(
            depths is None or (len(depths) > 0 and min(depths) >= 1),
            "eval_depths",
            "null or a list of depths >= 1",
        )
        demand(self.seed >= 0, "seed", "an integer >= 0")


@dataclass(kw_only=True)
class RunConfig:
    """A model, a task, how to train it, how deep it sleeps meanwhile, and where results go.

    `model` holds the arguments of `HybridSleepConfig`; `vocab_size` and `window` default to the
    task's. `sleep_passes` is a depth policy (or what `parse_depth` reads). Raises ValueError
    naming the key, its value and what is allowed.
    """

    model: dict[str, Any]
    task: TaskConfig
    train: TrainConfig
    sleep_passes: DepthPolicy
    output_dir: str

    def __post_init__(self) -> None:
        self.sleep_passes = parse_depth(self.sleep_passes)
        if not self.output_dir:
            raise ValueError("output_dir is empty; allowed: the path of a folder")
        task = self.load_task()
        self.model = {"vocab_size": task.vocab_size, "window": task.window, **self.model}
        self.model_config()

    def load_task(self) -> Any:
        """The task (`hybrid_sleep.eval.tasks`); ValueError for a name or parameter it lacks."""
        from hybrid_sleep.eval import tasks

        try:
            return tasks.load(self.task.name, **self.task.params)
        except ValueError as error:
            raise ValueError(f"task: {error}") from error

    def model_config(self) -> Any:
        """The `HybridSleepConfig` of `model`; ValueError for a key or value it does not allow."""
        from hybrid_sleep import HybridSleepConfig

        task = self.load_task()
        known = {f.name for f in dataclasses.fields(HybridSleepConfig)}
        _only_known(self.model, known, "model.")
        try:
            config = HybridSleepConfig(**self.model)
        except ValueError as error:
            raise ValueError(f"model: {error}") from error
        if config.vocab_size < task.vocab_size:
            raise ValueError(
                f"model.vocab_size={config.vocab_size}; allowed: at least {task.vocab_size}, the "
                f"tokens of task {self.task.name!r}"
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `run_config` turns back into an equal RunConfig."""
        return {
            "model": dict(self.model),
            "task": dataclasses.asdict(self.task),
            "sleep_passes": self.sleep_passes.to_config(),
            "train": dataclasses.asdict(self.train),
            "output_dir": self.output_dir,
        }

    def to_yaml(self) -> str:
        """`to_dict` as YAML, defaults written out."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def run_config(content: Mapping[str, Any]) -> RunConfig:
    """A RunConfig from nested mappings, as read from YAML. Raises ValueError (see the class)."""
    content = dict(content)
    _only_known(content, {f.name for f in dataclasses.fields(RunConfig)}, "")
    for name, kind in (("task", TaskConfig), ("train", TrainConfig)):
        if name in content:
            content[name] = _build(kind, content[name], f"{name}.")
    if "model" in content and not isinstance(content["model"], Mapping):
        raise ValueError(f"model={content['model']!r}; allowed: keys of HybridSleepConfig")
    _none_missing(RunConfig, content, "")
    return RunConfig(**{**content, "output_dir": str(content["output_dir"])})


def load_run_config(
    path: str | Path, overrides: Mapping[str, Any] | Iterable[str] = ()
) -> RunConfig:
    """Read a run from a YAML file.

    `overrides` replaces values by dotted key: `{"train.steps": 10}` or `["train.steps=10"]`, the
    text after `=` read as YAML. Raises FileNotFoundError if there is no such file, ValueError for
    anything in it that is unknown, missing or impossible, naming the key and what is allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config {str(path)!r} is no file; allowed: a run's YAML file")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
        if not isinstance(content, dict):
            raise ValueError(f"the file holds {type(content).__name__}; allowed: keys and values")
        for key, value in _parse_overrides(overrides):
            _set(content, key, value)
        return run_config(content)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"config {str(path)!r}: {error}") from error


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ValueError(f"key {key!r} in line {line} is given twice; allowed: once")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _parse_overrides(overrides: Mapping[str, Any] | Iterable[str]) -> list[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        return list(overrides.items())
    parsed = []
    for text in [overrides] if isinstance(overrides, str) else overrides:
        key, equals, value = text.partition("=")
        if not (key.strip() and equals):
            raise ValueError(f"override {text!r}; allowed: key=value, such as train.steps=100")
        parsed.append((key.strip(), yaml.safe_load(value)))
    return parsed


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for depth, name in enumerate(parents):
        content = content.setdefault(name, {})
        if not isinstance(content, dict):
            raise ValueError(
                f"override {key!r}: {'.'.join(parents[: depth + 1])} is a value; allowed: a key "
                "that holds keys"
            )
    content[last] = value


def _build(kind: type, content: Any, prefix: str) -> Any:
    fields = {f.name for f in dataclasses.fields(kind)}
    if not isinstance(content, Mapping):
        allowed = ", ".join(sorted(fields))
        raise ValueError(f"{prefix[:-1]}={content!r}; allowed: the keys {allowed}")
    _only_known(content, fields, prefix)
    _none_missing(kind, content, prefix)
    hints = typing.get_type_hints(kind)
    return kind(**{k: _typed(v, hints[k], prefix + k) for k, v in content.items()})


def _only_known(content: Mapping[str, Any], known: Iterable[str], prefix: str) -> None:
    for key in content:
        if key not in known:
            raise ValueError(f"unknown key {prefix}{key}; allowed: {', '.join(sorted(known))}")


def _none_missing(kind: type, content: Mapping[str, Any], prefix: str) -> None:
    for f in dataclasses.fields(kind):
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if needed and f.name not in content:
            raise ValueError(f"key {prefix}{f.name} is missing; it has no default")


def _typed(value: Any, hint: Any, key: str) -> Any:
    """`value` if it is what `hint` says; a whole or written-out number passes as a float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (a for a in arguments if a is not type(None))
        try:
            return _typed(value, hint, key)
        except ValueError as error:
            raise ValueError(str(error).replace("; allowed: ", "; allowed: null or ")) from None
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{key}={value!r}; allowed: {', '.join(map(str, arguments))}")
        return value
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{key}={value!r}; allowed: a list")
        return [_typed(item, arguments[0], f"{key}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{key}={value!r}; allowed: keys and values")
        return dict(value)
    if hint is float:
        # YAML 1.1 reads 2e-3 as text; only 2.0e-3 is a number to it.
        if not isinstance(value, bool) and isinstance(value, (int, float, str)):
            try:
                return float(value)
            except ValueError:
                pass
        raise ValueError(f"{key}={value!r}; allowed: a number")
    if hint is int and isinstance(value, bool) or not isinstance(value, hint):
        names = {int: "an integer", str: "text"}
        raise ValueError(f"{key}={value!r}; allowed: {names[hint]}")
    return value
