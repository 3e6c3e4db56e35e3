"""One training run from its config to a saved model."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PrinterCallback, TrainingArguments, set_seed
from transformers.utils import logging

from hybrid_sleep.io import write_text_atomic
from hybrid_sleep.training.callbacks import Display, RunLog, StopOnSignal
from hybrid_sleep.training.config import RunConfig
from hybrid_sleep.training.data import HeldOut, TaskBatches
from hybrid_sleep.training.trainer import (
    STAGING,
    SleepTrainer,
    check_finite,
    checkpoints,
    publish,
)

RUN_FILE = "run.yaml"
METRICS_FILE = "metrics.jsonl"
WEIGHTS = ".safetensors"
# What may differ between the two parts of a resumed run: where it is, what it reports and keeps.
FREE_ON_RESUME = (
    "output_dir",
    "train.device",
    "train.eval_depths",
    "train.eval_examples",
    "train.keep_checkpoints",
)


@dataclass(kw_only=True)
class TrainResult:
    """A finished run.

    `model_dir` holds the model (`from_pretrained` takes it), `run.yaml` and `metrics.jsonl`;
    `metrics` has `loss` (mean of the last tenth of the steps) and, if the run evaluates, the last
    `exact` and `per_label` by depth; it is empty in all processes but the first. `seconds` is the
    time of this call, `steps` the steps of the whole run.
    """

    model_dir: Path
    steps: int
    seconds: float
    metrics: dict[str, Any] = field(default_factory=dict)


def train(
    run: RunConfig, *, resume: bool = False, overwrite: bool = False, progress: bool = True
) -> TrainResult:
    """Train the model of `run` and save it to `run.output_dir`.

    resume: go on from the last checkpoint there; on a CPU the result is bit for bit that of a run
    that was never stopped. overwrite: replace an earlier run in that folder. progress: show one on
    stderr. SIGINT and SIGTERM end the run after the current step with a checkpoint, and raise
    KeyboardInterrupt with where it is; a second signal ends it at once.

    Raises FileExistsError if the folder holds a run and neither is given, FileNotFoundError if
    there is no checkpoint to resume from, ValueError if the checkpoint is another run's or if
    training diverges.
    """
    started = time.perf_counter()
    out = Path(run.output_dir)
    arguments = training_arguments(run)
    main = arguments.process_index == 0
    if main:
        _prepare_folder(run, out, resume, overwrite)
    trainer = build_trainer(run, arguments)
    stop = StopOnSignal()
    trainer.add_callback(stop)
    with contextlib.ExitStack() as stack:
        display = None
        if progress and main:
            display = stack.enter_context(Display(run.train.steps))
        stack.enter_context(stop.listening())
        stack.enter_context(threads(run.train.threads))
        stack.enter_context(_no_other_bars())
        if main:
            trainer.add_callback(RunLog(trainer, out / METRICS_FILE, run.train.log_every, display))
        trainer.train(resume_from_checkpoint=str(checkpoints(out)[-1]) if resume else None)
    steps = trainer.state.global_step
    if stop.requested and steps < run.train.steps:
        raise KeyboardInterrupt(
            f"step {steps} of {run.train.steps} is saved in {checkpoints(out)[-1]}; the same "
            "command with --resume goes on from there"
        )
    if main:
        save_model(trainer.model, run, out)
    return TrainResult(
        model_dir=out,
        steps=steps,
        seconds=time.perf_counter() - started,
        metrics=summary(out / METRICS_FILE) if main else {},
    )


def build_trainer(run: RunConfig, arguments: TrainingArguments | None = None) -> SleepTrainer:
    """Model, data, optimizer and schedule of `run`, ready to train."""
    from hybrid_sleep import HybridSleepForCausalLM

    settings = run.train
    task = run.load_task()
    set_seed(settings.seed)
    model = HybridSleepForCausalLM(run.model_config())
    model.set_activation_checkpointing(settings.activation_checkpointing)
    arguments = arguments or training_arguments(run)
    depths = settings.eval_depths or sorted(run.sleep_passes.probabilities())
    trainer = SleepTrainer(
        model,
        arguments,
        sleep_passes=run.sleep_passes,
        lr_muon=settings.lr_muon,
        train_dataset=TaskBatches(
            task,
            length=settings.steps * settings.accumulate,
            size=arguments.per_device_train_batch_size,
            seed=settings.seed,
            rank=arguments.process_index,
        ),
        eval_dataset=HeldOut(
            task=task, depths=tuple(depths), count=settings.eval_examples, seed=settings.seed
        ),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def training_arguments(run: RunConfig) -> TrainingArguments:
    """`run.train` in the words of transformers."""
    settings = run.train
    schedule: dict[str, Any] = {"lr_scheduler_type": settings.schedule}
    if settings.schedule == "constant":
        schedule = {"lr_scheduler_type": "constant_with_warmup"}
    elif settings.schedule == "trapezoid":
        cooldown = math.ceil(settings.cooldown * settings.steps)
        cooldown = min(cooldown, settings.steps - settings.warmup)
        kwargs = {"num_decay_steps": cooldown, "decay_type": "linear"}
        schedule = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": kwargs}
    return TrainingArguments(
        output_dir=run.output_dir,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size // settings.accumulate,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr_adamw,
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        warmup_steps=settings.warmup,
        max_grad_norm=settings.grad_clip or 0.0,
        eval_strategy="steps" if settings.eval_every else "no",
        eval_steps=settings.eval_every,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or settings.steps,
        save_total_limit=settings.keep_checkpoints,
        logging_steps=settings.log_every,
        # A nan must end the run, not be averaged away.
        logging_nan_inf_filter=False,
        seed=settings.seed,
        bf16=settings.dtype == "bfloat16",
        use_cpu=settings.device == "cpu",
        use_cache=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        **schedule,
    )


def save_model(model: Any, run: RunConfig, out: Path) -> None:
    """Write `model` and `run.yaml` into `out`, file by file, weights last.

    A folder without weights is unfinished; one with weights is whole.
    """
    check_finite(model, "the end of training")
    staging = out / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    with _no_other_bars():
        model.save_pretrained(staging)
    write_text_atomic(staging / RUN_FILE, run.to_yaml())
    for path in sorted(staging.iterdir(), key=lambda path: path.name.endswith(WEIGHTS)):
        publish(path, out / path.name)
    staging.rmdir()


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` threads for one operation on the processor; None: as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _no_other_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar for every file it saves."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def summary(path: Path) -> dict[str, Any]:
    """Final loss and the last accuracies in a `metrics.jsonl`."""
    records = [yaml.safe_load(line) for line in path.read_text(encoding="utf-8").splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    tail = losses[-max(1, len(losses) // 10) :]
    result: dict[str, Any] = {"loss": sum(tail) / len(tail)}
    for record in records:
        if "exact" in record:
            for name in ("exact", "per_label"):
                result[name] = {int(depth): value for depth, value in record[name].items()}
    return result


def _prepare_folder(run: RunConfig, out: Path, resume: bool, overwrite: bool) -> None:
    """Check what is in `out` against what is asked, then leave `run.yaml` there."""
    if resume and overwrite:
        raise ValueError("resume=True and overwrite=True; allowed: one of the two")
    saved = checkpoints(out) if out.is_dir() else []
    if resume:
        if not saved:
            raise FileNotFoundError(
                f"resume=True, but output_dir={str(out)!r} holds no checkpoint; allowed: a folder "
                "with one (train.save_every, or an interrupted run), or resume=False"
            )
        before = _flat(yaml.safe_load((out / RUN_FILE).read_text(encoding="utf-8")))
        now = _flat(run.to_dict())
        for key in sorted(before.keys() | now.keys()):
            if key not in FREE_ON_RESUME and before.get(key) != now.get(key):
                raise ValueError(
                    f"{key}={now.get(key)!r} to resume a run with {key}={before.get(key)!r}; "
                    f"allowed: the same run, in which only {', '.join(FREE_ON_RESUME)} may differ"
                )
        return
    model = [path for path in out.glob("*" + WEIGHTS)] if out.is_dir() else []
    old = [*saved, *model]
    if old and not overwrite:
        raise FileExistsError(
            f"output_dir={str(out)!r} holds {old[-1].name} of an earlier run; allowed: resume=True "
            "to go on from its last checkpoint, overwrite=True to replace it, or another folder"
        )
    for path in old:
        shutil.rmtree(path) if path.is_dir() else os.remove(path)
    write_text_atomic(out / RUN_FILE, run.to_yaml())


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted key."""
    flat = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
