"""A training run in one YAML file, checked in full before anything is built."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hybrid_sleep.training import zero
from hybrid_sleep.training.depth import DepthPolicy, parse_depth
from hybrid_sleep.training.parsing import dump_yaml, parse_overrides, parse_yaml
from hybrid_sleep.training.schedules import parse_windows
from hybrid_sleep.training.schema import as_path, build, none_missing, only_known, set_key, typed
from hybrid_sleep.training.start import inherited, initial_model
from hybrid_sleep.training.text.config import TextConfig

Schedule = Literal["constant", "linear", "cosine", "trapezoid"]
A_FOLDER = "the path of a folder"
# What a stage may change: not where it starts from or writes to, which follows from its place.
STAGE_KEYS = ("model", "task", "text", "train", "sleep_passes")


@dataclass(kw_only=True)
class TaskConfig:
    """What to learn: a task of `hybrid_sleep.eval.tasks` and its parameters."""

    name: str
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class InitConfig:
    """Start from a trained model instead of from chance.

    `checkpoint` is its folder; its config fills what `model` leaves out. `new_layers` are indices,
    in the model to be trained, of state-space layers which the checkpoint lacks (route (b) of Lee
    et al., arXiv 2605.26099: layers inserted into an attention-only model). They get no MLP unless
    `model.intermediate_size` says so, and start out adding nothing to the residual stream, so that
    the first step begins with the checkpoint's own predictions.
    """

    checkpoint: str
    new_layers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.checkpoint = as_path("init.checkpoint", self.checkpoint, A_FOLDER)
        if len(set(self.new_layers)) < len(self.new_layers) or min(self.new_layers, default=0) < 0:
            raise ValueError(
                f"init.new_layers={self.new_layers}; allowed: distinct indices of layers, from 0"
            )


@dataclass(kw_only=True)
class TrainConfig:
    """How to learn it.

    Optimisation: `steps` updates of `batch_size` examples each, over all processes together
    (`accumulate` micro-batches in turn), Muon with `lr_muon` on matrices, AdamW with `lr_adamw` and
    betas (0.9, 0.95) on the rest (`lr_muon: null`: AdamW on everything), decoupled `weight_decay`
    (matrices and embeddings), gradients clipped to norm `grad_clip` (None: not clipped). The rates
    rise linearly for `warmup` steps, then follow `schedule`: `constant`; `linear` or `cosine` to
    zero at the last step; `trapezoid`, constant and then linear to zero over the last `cooldown`
    share of all steps. `trainable: new_layers` trains only those of `init.new_layers`.

    Through sleeps: `windows` is a curriculum, `{step: window}` from that step on, ending with
    `model.window`. `backprop_passes` and `backprop_windows` truncate backpropagation (see
    `model.set_truncation`; None: not truncated), `activation_checkpointing` recomputes (see
    `model.set_activation_checkpointing`).

    Reports: metrics every `log_every` steps; every `eval_every` steps (None: never) the exact
    accuracy, or the perplexity of held-out text, at `eval_depths` (None: every depth that training
    draws) on `eval_examples` examples drawn from the training split with a seed of their own, or
    rows of that text. A checkpoint every `save_every` steps (None: only when interrupted), of which
    the last `keep_checkpoints` are kept. `report_to`, one name or a list, is what transformers
    reports to as well: wandb, mlflow, tensorboard (into `output_dir/tensorboard`) and others.

    Machine: `dtype` float32, or bfloat16 (autocast over fp32 weights); `device` auto or cpu;
    `deepspeed` is the path of a DeepSpeed JSON, such as those in configs/deepspeed; `workers`
    processes make batches ahead of time; `threads` of the processor for one operation (None:
    torch's choice, one a core). A small model that shares its cores with anything else trains
    several times faster with one.
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    lr_muon: float | None = 2e-3
    lr_adamw: float = 5e-5
    weight_decay: float = 0.0
    warmup: int = 0
    schedule: Schedule = "constant"
    cooldown: float = 0.3
    grad_clip: float | None = 1.0
    trainable: Literal["all", "new_layers"] = "all"
    windows: dict[int, int] | None = None
    backprop_passes: int | None = None
    backprop_windows: int | None = None
    activation_checkpointing: str | int | list | None = None
    eval_every: int | None = None
    eval_depths: list[int] | None = None
    eval_examples: int = 1000
    log_every: int = 10
    save_every: int | None = None
    keep_checkpoints: int = 1
    report_to: str | list[str] = "none"
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu"] = "auto"
    deepspeed: str | None = None
    workers: int = 0
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
            none = name == "lr_muon" and rate is None
            allowed = "null or a finite number > 0" if name == "lr_muon" else "a finite number > 0"
            demand(none or (math.isfinite(rate) and rate > 0), name, allowed)
        demand(0 <= self.weight_decay < math.inf, "weight_decay", "a finite number >= 0")
        demand(0 <= self.warmup <= self.steps, "warmup", f"0..train.steps={self.steps}")
        demand(0 <= self.cooldown <= 1, "cooldown", "a share of the steps, 0..1")
        clip = self.grad_clip
        demand(clip is None or 0 < clip < math.inf, "grad_clip", "null or a finite number > 0")
        counts = ("eval_every", "save_every", "threads", "backprop_passes", "backprop_windows")
        for name in counts:
            count = getattr(self, name)
            demand(count is None or count >= 1, name, "null or an integer >= 1")
        demand(self.workers >= 0, "workers", "an integer >= 0")
        depths = self.eval_depths
        demand(
            depths is None or (len(depths) > 0 and min(depths) >= 1),
            "eval_depths",
            "null or a list of depths >= 1",
        )
        demand(0 <= self.seed < 2**32, "seed", "an integer >= 0, below 2**32")
        if self.deepspeed is not None:
            self.deepspeed = as_path("train.deepspeed", self.deepspeed, "null or a JSON file")

    @property
    def reporters(self) -> list[str]:
        """The names in `report_to`."""
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        return [name for name in names if name != "none"]


PARTS = {"task": TaskConfig, "text": TextConfig, "init": InitConfig, "train": TrainConfig}


@dataclass(kw_only=True)
class RunConfig:
    """A model, what it learns and how, how deep it sleeps meanwhile, and where results go.

    It learns either a `task` or `text`. `model` holds the arguments of `HybridSleepConfig`;
    `vocab_size` and `window` default to the task's, `vocab_size` and special tokens to those of
    text's tokenizer, everything to that of `init.checkpoint` if there is one. `sleep_passes` is a
    depth policy (or what `parse_depth` reads).

    `stages` makes it several runs, one after the other. A stage is a mapping of dotted keys to what
    it changes in this run. It starts from the model that the stage before it left, and writes into
    `output_dir/stage-1` and so on, the last one into `output_dir`.

    Raises ValueError naming the key, its value and what is allowed.
    """

    model: dict[str, Any]
    train: TrainConfig
    sleep_passes: DepthPolicy
    output_dir: str
    task: TaskConfig | None = None
    text: TextConfig | None = None
    init: InitConfig | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sleep_passes = parse_depth(self.sleep_passes)
        self.output_dir = as_path("output_dir", self.output_dir, A_FOLDER)
        if (self.task is None) == (self.text is None):
            given = "neither" if self.task is None else "both"
            raise ValueError(f"task and text: {given} given; allowed: one of the two")
        # A model that is all there was resolved before, or is to come from an earlier stage.
        resolved = self.init is None or self.model.keys() >= inherited()
        self.model = _model_section(self.model)
        start = {} if resolved else initial_model(self.init, self.model)
        self.model = {**self._model_defaults, **start, **self.model}
        self._check_training(self.model_config())
        self.stage_runs()

    def _check_training(self, config: Any) -> None:
        from hybrid_sleep.sleep.checkpointing import parse_granularity

        for difficulty in self.sleep_passes.difficulties():
            try:
                self.load_task().only(difficulty)
            except ValueError as error:
                raise ValueError(f"sleep_passes.by_difficulty: {error}") from error
        if self.train.windows is not None:
            parse_windows(self.train.windows).check(config.window, self.train.steps)
        if self.train.trainable == "new_layers" and not (self.init and self.init.new_layers):
            raise ValueError(
                "train.trainable='new_layers' without init.new_layers; allowed: 'all', or to name "
                "the layers that init.checkpoint lacks"
            )
        try:
            parse_granularity(self.train.activation_checkpointing, config.num_hidden_layers)
        except ValueError as error:
            raise ValueError(f"train.activation_checkpointing: {error}") from error
        if self.train.deepspeed is not None:
            zero.read_config(self.train)
        if self.train.workers > 1 and self.text is not None:
            raise ValueError(
                f"train.workers={self.train.workers} with text; allowed: 0 or 1, because the rows "
                "of a process are read from one stream in order"
            )

    def load_task(self) -> Any:
        """The task (`hybrid_sleep.eval.tasks`); ValueError for a name or parameter it lacks."""
        from hybrid_sleep.eval import tasks

        if self.task is None:
            raise ValueError("this run learns text, not a task; allowed: a run with task.name")
        try:
            return tasks.load(self.task.name, **self.task.params)
        except ValueError as error:
            raise ValueError(f"task: {error}") from error

    def load_tokenizer(self) -> Any:
        """The tokenizer of `text`; ValueError if it cannot be reached."""
        return self._tokenizer

    @functools.cached_property
    def _tokenizer(self) -> Any:
        from hybrid_sleep.training.text.tokenizer import load_tokenizer

        return load_tokenizer(self.text.tokenizer)

    @functools.cached_property
    def _model_defaults(self) -> dict[str, Any]:
        if self.text is None:
            task = self.load_task()
            return {"vocab_size": task.vocab_size, "window": task.window}
        tokenizer = self.load_tokenizer()
        special = ("pad_token_id", "bos_token_id", "eos_token_id")
        tokens = {name: getattr(tokenizer, name) for name in special}
        return {"vocab_size": len(tokenizer), **tokens, "sleep_schedule": "every_window"}

    def model_config(self) -> Any:
        """The `HybridSleepConfig` of `model`; ValueError for a key or value it does not allow."""
        from hybrid_sleep import HybridSleepConfig

        try:
            config = HybridSleepConfig(**self.model)
        except ValueError as error:
            raise ValueError(f"model: {error}") from error
        least = self._model_defaults["vocab_size"]
        if config.vocab_size < least:
            what = f"task {self.task.name!r}" if self.text is None else "text.tokenizer"
            raise ValueError(
                f"model.vocab_size={config.vocab_size}; allowed: at least {least}, the tokens of "
                f"{what}"
            )
        if self.text is not None and config.sleep_schedule != "every_window":
            raise ValueError(
                f"model.sleep_schedule={config.sleep_schedule!r} with text; allowed: "
                "'every_window', because text supervises every window and none would sleep"
            )
        return config

    def stage_runs(self) -> list[RunConfig]:
        """The runs of `stages` in their order; this run alone if it has none."""
        if not self.stages:
            return [self]
        runs: list[RunConfig] = []
        config = self.model_config()
        # As it would come back from a file, where a tuple is a list.
        model = json.loads(json.dumps({key: getattr(config, key) for key in sorted(inherited())}))
        for number, changes in enumerate(self.stages, 1):
            # A copy, down to what dotted keys reach into: stages do not see each other's changes.
            content = copy.deepcopy({**self.to_dict(), "stages": []})
            if runs:
                content["model"] |= model
                content["init"] = {"checkpoint": runs[-1].output_dir}
            if number < len(self.stages):
                content["output_dir"] = str(Path(self.output_dir) / f"stage-{number}")
            try:
                for key, value in changes.items():
                    if str(key).partition(".")[0] not in STAGE_KEYS:
                        allowed = ", ".join(STAGE_KEYS)
                        raise ValueError(f"key {key!r}; allowed: keys in {allowed}")
                    set_key(content, key, value)
                runs.append(run_config(content))
            except ValueError as error:
                raise ValueError(f"stages[{number - 1}]: {error}") from error
        return runs

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `run_config` turns back into an equal RunConfig."""
        return {
            "model": dict(self.model),
            **{
                name: None if part is None else dataclasses.asdict(part)
                for name, part in (("task", self.task), ("text", self.text), ("init", self.init))
            },
            "sleep_passes": self.sleep_passes.to_config(),
            "train": dataclasses.asdict(self.train),
            "output_dir": self.output_dir,
            "stages": [dict(stage) for stage in self.stages],
        }

    def to_yaml(self) -> str:
        """`to_dict` as YAML, defaults written out."""
        return dump_yaml(self.to_dict())


def _model_section(given: Any) -> dict[str, Any]:
    """The keys of `model`, all known; numbers written out in quotes are numbers, as elsewhere."""
    from hybrid_sleep import HybridSleepConfig

    if not isinstance(given, Mapping):
        raise ValueError(f"model={given!r}; allowed: keys of HybridSleepConfig")
    only_known(given, inherited(), "model.")
    kinds = HybridSleepConfig.__annotations__
    return {
        key: typed(value, float, f"model.{key}") if kinds[key] == "float" else value
        for key, value in given.items()
    }


def run_config(content: Mapping[str, Any]) -> RunConfig:
    """A RunConfig from nested mappings, as read from YAML. Raises ValueError (see the class)."""
    content = _as_written_today(content)
    only_known(content, {f.name for f in dataclasses.fields(RunConfig)}, "")
    for name, kind in PARTS.items():
        # Only what may be left out may be null.
        if name in content and (content[name] is not None or name == "train"):
            content[name] = build(kind, content[name], f"{name}.")
    stages = content.get("stages", [])
    if not isinstance(stages, list) or not all(isinstance(stage, Mapping) for stage in stages):
        raise ValueError(f"stages={stages!r}; allowed: a list of mappings of dotted keys to values")
    none_missing(RunConfig, content, "")
    return RunConfig(**content)


def _as_written_today(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with the keys of today, if an earlier version wrote it.

    `train.tensorboard` of the run.yaml of finished runs, whose results are still evaluated.
    """
    train = content.get("train")
    if not isinstance(train, Mapping) or not isinstance(train.get("tensorboard"), bool):
        return dict(content)
    train = dict(train)
    if train.pop("tensorboard") and train.get("report_to", "none") == "none":
        train["report_to"] = "tensorboard"
    return {**content, "train": train}


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
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 at byte {error.start}; allowed: a text file") from None
        content = parse_yaml(text)
        if not isinstance(content, dict):
            found = "nothing" if content is None else type(content).__name__
            raise ValueError(f"the file holds {found}; allowed: keys and values")
        for key, value in parse_overrides(overrides):
            set_key(content, key, value)
        return run_config(content)
    except ValueError as error:
        raise ValueError(f"config {str(path)!r}: {error}") from error
