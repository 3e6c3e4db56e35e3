"""A training run in one YAML file, checked in full before anything is built."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from hybrid_sleep.training import zero
from hybrid_sleep.training.depth import DepthPolicy, parse_depth
from hybrid_sleep.training.parsing import dump_yaml, parse_overrides, parse_yaml
from hybrid_sleep.training.schedules import parse_windows
from hybrid_sleep.training.schema import (
    STRICT,
    Count,
    CountFrom0,
    FilePath,
    FolderPath,
    Number,
    Rate,
    Text,
    as_number,
    build,
    only_known,
    set_key,
)
from hybrid_sleep.training.start import inherited, initial_model
from hybrid_sleep.training.text.config import TextConfig

Schedule = Literal["constant", "linear", "cosine", "trapezoid"]
# What a stage may change: not where it starts from or writes to, which follows from its place.
STAGE_KEYS = ("model", "task", "text", "train", "sleep_passes")


@dataclass(kw_only=True, config=STRICT)
class TaskConfig:
    """What to learn: a task of `hybrid_sleep.eval.tasks` and its parameters.

    `repeats` writes each window of the context so many times (see `Repeated`).
    """

    name: Text
    params: dict[Text, Any] = field(default_factory=dict)
    repeats: Count = 1


@dataclass(kw_only=True, config=STRICT)
class InitConfig:
    """Start from a trained model instead of random weights.

    `checkpoint` is its folder; its config fills what `model` leaves out. `new_layers` are indices,
    in the model to be trained, of state-space layers which the checkpoint lacks (route (b) of Lee
    et al., arXiv 2605.26099: layers inserted into an attention-only model). They get no MLP unless
    `model.intermediate_size` says so, and start out adding nothing to the residual stream, so that
    the first step begins with the checkpoint's own predictions.
    """

    checkpoint: FolderPath
    new_layers: list[CountFrom0] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(set(self.new_layers)) < len(self.new_layers):
            raise ValueError(
                f"init.new_layers must be distinct indices of layers, got {self.new_layers}"
            )


@dataclass(kw_only=True, config=STRICT)
class TrainConfig:
    """How to learn it.

    Optimisation: `steps` updates of `batch_size` examples each, over all processes together
    (in `accumulate` micro-batches), Muon with `lr_muon` on matrices, AdamW with `lr_adamw` and
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

    steps: Count
    batch_size: Count
    accumulate: Count = 1
    lr_muon: Rate | None = 2e-3
    lr_adamw: Rate = 5e-5
    weight_decay: Annotated[Number, Field(ge=0), "a finite number of at least 0"] = 0.0
    warmup: CountFrom0 = 0
    schedule: Schedule = "constant"
    cooldown: Annotated[Number, Field(ge=0, le=1), "a share of the steps, 0 to 1"] = 0.3
    grad_clip: Rate | None = 1.0
    trainable: Literal["all", "new_layers"] = "all"
    windows: dict[CountFrom0, Count] | None = None
    backprop_passes: Count | None = None
    backprop_windows: Count | None = None
    activation_checkpointing: Any = None
    eval_every: Count | None = None
    eval_depths: Annotated[list[Count], Field(min_length=1), "a list of depths"] | None = None
    eval_examples: Count = 1000
    log_every: Count = 10
    save_every: Count | None = None
    keep_checkpoints: Count = 1
    report_to: Annotated[Text | list[Text], "text or a list of text"] = "none"
    seed: Annotated[CountFrom0, Field(lt=2**32), "an integer from 0 to 2**32 - 1"] = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu"] = "auto"
    deepspeed: Annotated[FilePath, "the path of a JSON file"] | None = None
    workers: CountFrom0 = 0
    threads: Count | None = None

    def __post_init__(self) -> None:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"train.accumulate must be a divisor of train.batch_size={self.batch_size}, got "
                f"{self.accumulate}"
            )
        if self.warmup > self.steps:
            raise ValueError(
                f"train.warmup must be at most train.steps={self.steps}, got {self.warmup}"
            )

    @property
    def reporters(self) -> list[str]:
        """The names in `report_to`."""
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        return [name for name in names if name != "none"]


@dataclass(kw_only=True, config=STRICT)
class RunConfig:
    """A model, what it learns and how, how deep it sleeps meanwhile, and where results go.

    It learns either a `task` or `text`. `model` holds the arguments of `HybridSleepConfig`;
    `vocab_size`, `window` and `token_fields` default to the task's, `vocab_size` and special tokens
    to those of text's tokenizer, everything to that of `init.checkpoint` if there is one.
    `sleep_passes` is a depth policy (or what `parse_depth` reads).

    `stages` makes it several runs, one after the other. A stage is a mapping of dotted keys to what
    it changes in this run. It starts from the model that the stage before it left, and writes into
    `output_dir/stage-1` and so on, the last one into `output_dir`.

    Raises ValueError (pydantic's, of several lines; `run_config` says it in one) naming each key
    that is wrong, its value and what is allowed.
    """

    model: dict[Text, Any]
    train: TrainConfig
    sleep_passes: DepthPolicy | Any
    output_dir: FolderPath
    task: TaskConfig | None = None
    text: TextConfig | None = None
    init: InitConfig | None = None
    stages: Annotated[
        list[dict[str, Any]], "a list of mappings of dotted keys to values"
    ] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sleep_passes = parse_depth(self.sleep_passes)
        if (self.task is None) == (self.text is None):
            given = "neither" if self.task is None else "both"
            raise ValueError(f"one of task and text must be given, got {given}")
        # A model that is all there was resolved before, or is to come from an earlier stage.
        resolved = self.model.keys() >= inherited()
        self.model = _model_section(self.model)
        start = {}
        if self.init is not None and not resolved:
            start = initial_model(self.init, self.model)
        self.model = {**self._model_defaults, **start, **self.model}
        self._check_training(self.model_config())
        self.stage_runs()

    def _check_training(self, config: Any) -> None:
        from hybrid_sleep.sleep.checkpointing import parse_granularity

        for groups in self.sleep_passes.difficulties():
            try:
                task = self.load_task()
                for group in groups:
                    task.only(*group)
            except ValueError as error:
                raise ValueError(f"sleep_passes: {error}") from error
        together = 1 if self.task is None else self.load_task().together
        if self.train.batch_size % together:
            raise ValueError(
                f"train.batch_size must be a multiple of the {together} examples that ask about "
                f"one context, got {self.train.batch_size}"
            )
        if self.train.windows is not None:
            parse_windows(self.train.windows).check(config.window, self.train.steps)
        if self.train.trainable == "new_layers" and not (self.init and self.init.new_layers):
            raise ValueError(
                "train.trainable must be 'all' where init.new_layers names no layers, got "
                "'new_layers'"
            )
        granularity: Any = self.train.activation_checkpointing
        try:
            parse_granularity(granularity, config.num_hidden_layers)
        except ValueError as error:
            raise ValueError(f"train.activation_checkpointing: {error}") from error
        if self.train.deepspeed is not None:
            zero.read_config(self.train)
        if self.train.workers > 1 and self.text is not None:
            raise ValueError(
                "train.workers must be 0 or 1 for text, because the rows of a process are read "
                f"from one stream in order, got {self.train.workers}"
            )

    def load_task(self) -> Any:
        """The task (`hybrid_sleep.eval.tasks`); ValueError for a name or parameter it lacks."""
        from hybrid_sleep.eval import tasks
        from hybrid_sleep.eval.tasks.repeated import Repeated

        if self.task is None:
            raise ValueError("the run must have task.name, got one that learns text")
        try:
            task = tasks.load(self.task.name, **self.task.params)
            return task if self.task.repeats == 1 else Repeated(task, self.task.repeats)
        except ValueError as error:
            raise ValueError(f"task: {error}") from error

    def load_tokenizer(self) -> Any:
        """The tokenizer of `text`; ValueError if it cannot be reached."""
        return self._tokenizer

    @functools.cached_property
    def _tokenizer(self) -> Any:
        from hybrid_sleep.training.text.tokenizer import load_tokenizer

        assert self.text is not None
        return load_tokenizer(self.text.tokenizer)

    @functools.cached_property
    def _model_defaults(self) -> dict[str, Any]:
        if self.text is None:
            task = self.load_task()
            fields = {} if task.token_fields is None else {"token_fields": task.token_fields}
            return {"vocab_size": task.vocab_size, "window": task.window, **fields}
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
            what = "text.tokenizer" if self.task is None else f"task {self.task.name!r}"
            raise ValueError(
                f"model.vocab_size must be at least {least}, the tokens of {what}, got "
                f"{config.vocab_size}"
            )
        if self.text is not None and config.sleep_schedule != "every_window":
            raise ValueError(
                "model.sleep_schedule must be 'every_window' for text, which supervises every "
                f"window, so that none would sleep, got {config.sleep_schedule!r}"
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
                        raise ValueError(f"a key must begin with one of {allowed}, got {key!r}")
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


def _model_section(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `model`, all known; numbers written out in quotes are numbers, as elsewhere."""
    from hybrid_sleep import HybridSleepConfig

    only_known(given, inherited(), "model")
    kinds, model = HybridSleepConfig.__annotations__, dict(given)
    for key in model:
        if kinds[key] == "float":
            try:
                model[key] = as_number(model[key])
            except ValueError:
                raise ValueError(f"model.{key} must be a number, got {model[key]!r}") from None
    return model


def run_config(content: Mapping[str, Any]) -> RunConfig:
    """A RunConfig from nested mappings, as read from YAML. Raises ValueError (see the class)."""
    return build(RunConfig, _as_written_today(content))


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
        raise FileNotFoundError(f"config must be the YAML file of a run, got {str(path)!r}")
    try:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"it must be UTF-8 text, got another byte at {error.start}") from None
        content = parse_yaml(text)
        if not isinstance(content, dict):
            found = "nothing" if content is None else type(content).__name__
            raise ValueError(f"it must hold keys and values, got {found}")
        for key, value in parse_overrides(overrides):
            set_key(content, key, value)
        return run_config(content)
    except ValueError as error:
        raise ValueError(f"config {str(path)!r}: {error}") from error
