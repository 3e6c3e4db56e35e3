"""One training run from its config to a saved model."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from hybrid_sleep.support.io import (
    read_json,
    read_json_lines,
    sole_writer,
    write_json_atomic,
    write_text_atomic,
)
from hybrid_sleep.training import zero
from hybrid_sleep.training.build import build_trainer, training_arguments
from hybrid_sleep.training.callbacks import (
    Display,
    RunLog,
    StopOnSignal,
    TensorBoardEvents,
    check_reporters,
    up_to,
)
from hybrid_sleep.training.config import RunConfig, load_run_config
from hybrid_sleep.training.folder import (
    LIST_FILE,
    METRICS_FILE,
    RUN_FILE,
    SAMPLES_FILE,
    STAGING,
    STATE_FILE,
    TENSORBOARD,
    WEIGHTS,
    begin,
    check_checkpoint,
    check_folder,
    checkpoints,
    publish,
    settle,
    weights_in,
    working,
    written,
)
from hybrid_sleep.training.plots import save_run_plot
from hybrid_sleep.training.ranks import of_first
from hybrid_sleep.training.schema import flat
from hybrid_sleep.training.text.batches import TextHeldOut
from hybrid_sleep.training.text.samples import held_out_samples
from hybrid_sleep.training.trainer import SleepTrainer, check_finite
from hybrid_sleep.training.weights import check_model

# What may differ between the two parts of a resumed run: where it is, what it reports and keeps,
# and how its batches are shared out.
FREE_ON_RESUME = (
    "output_dir",
    "train.accumulate",
    "train.device",
    "train.eval_depths",
    "train.eval_examples",
    "train.keep_checkpoints",
    "train.report_to",
    "train.threads",
    "train.workers",
)


@dataclass(kw_only=True)
class TrainResult:
    """A finished run.

    `model_dir` holds the model (`from_pretrained` takes it), `run.yaml`, `metrics.jsonl` and
    `run.png`. `metrics` has `loss` (mean of the last tenth of the steps) and, if the run evaluates,
    the last `exact` and `per_label`, or `perplexity` and `by_window`, by depth. `samples` are texts
    that the model wrote on from held-out beginnings. Both are empty in all processes but the first.
    `seconds` is the time of this call, `steps` the steps of the whole run, of all its stages.
    `finished_before`: there was nothing to do, and nothing was changed.
    """

    model_dir: Path
    steps: int
    seconds: float
    metrics: dict[str, Any] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)
    finished_before: bool = False

    def report(self) -> str:
        """What to print at the end."""
        if self.finished_before:
            return (
                f"this run is finished ({self.steps} steps) and nothing was changed; model in "
                f"{self.model_dir}"
            )
        done = f"trained {self.steps} steps in {self.seconds:.0f} s; model in {self.model_dir}"
        if "perplexity" not in self.metrics:
            return done
        texts = [f"--- sample {i}\n{text}" for i, text in enumerate(self.samples, 1)]
        return "\n".join(["held-out text:", _held_out_table(self.metrics), *texts, done])


def train(
    run: RunConfig, *, resume: bool = False, overwrite: bool = False, progress: bool = True
) -> TrainResult:
    """Train the model of `run` and save it to `run.output_dir`; its stages one after the other.

    In several processes (torchrun, deepspeed) every one calls this. resume: go on from the last
    checkpoint there; on a CPU and as many processes the result is bit for bit that of a run that
    was never stopped; of a finished run nothing is changed. overwrite: replace an earlier run in
    that folder, whose files stay until this one is finished (it lies in `output_dir/unfinished`
    until then), so that it may start from that run's model. progress: show one on stderr. SIGINT
    and SIGTERM end the run after the current step with a checkpoint, and raise KeyboardInterrupt
    with where it is; a second signal ends it at once.

    Raises FileExistsError if the folder holds a run and neither is given, BlockingIOError if
    another process is writing there, FileNotFoundError if there is no checkpoint to resume from,
    ValueError if the checkpoint is another run's or not whole or if training diverges, OSError if a
    checkpoint cannot be written; the last two name the last good checkpoint.
    """
    stages = run.stage_runs()
    if resume and overwrite:
        raise ValueError("one of resume and overwrite must be False, got True for both")
    for stage in stages:
        check_reporters(stage.train.reporters)
        if not resume:
            check_folder(Path(stage.output_dir), overwrite)
    if resume and not Path(stages[0].output_dir).is_dir():
        raise _nothing_to_resume(Path(stages[0].output_dir))
    results = []
    with contextlib.ExitStack() as held:
        for number, stage in enumerate(stages):
            # Processes find each other here, and the first then decides for all.
            arguments = training_arguments(stage)
            if number == 0:
                of_first(_take, stages, overwrite, held, resume=resume)
            place = of_first(_place, stage, resume=resume, later=number > 0)
            if place.finished:
                results.append(_finished(stage, main=arguments.process_index == 0))
                continue
            if progress and len(stages) > 1 and arguments.process_index == 0:
                print(f"stage {number + 1} of {len(stages)}: {stage.output_dir}", flush=True)
            results.append(_train(stage, place, progress=progress))
    done = results[-1]
    done.seconds = sum(result.seconds for result in results)
    done.steps = sum(stage.train.steps for stage in stages)
    return done


@dataclass(kw_only=True)
class _Place:
    """Where a run lies and goes on: `work` folder, checkpoint and what that says, or finished."""

    work: Path
    checkpoint: Path | None = None
    state: dict[str, Any] = field(default_factory=lambda: {"processes": 1, "position": None})
    finished: bool = False


def _take(
    stages: Sequence[RunConfig], overwrite: bool, held: contextlib.ExitStack, *, resume: bool
) -> None:
    """Keep others out of the folders of all stages, and begin there unless the run goes on."""
    for stage in reversed(stages):
        held.enter_context(sole_writer(stage.output_dir))
    for stage in stages:
        settle(Path(stage.output_dir))
        if not resume:
            check_folder(Path(stage.output_dir), overwrite)
    for stage in stages:
        if not resume:
            begin(Path(stage.output_dir), stage.to_yaml())


def _place(run: RunConfig, *, resume: bool, later: bool) -> _Place:
    """Where `run` starts. later: a stage that may not have begun when the run was stopped."""
    out = Path(run.output_dir)
    work = working(out)
    if not resume:
        return _Place(work=work)
    saved = checkpoints(work)
    if not saved and not weights_in(work):
        if not later:
            raise _nothing_to_resume(out)
        return _Place(work=begin(out, run.to_yaml()))
    _check_same(run, work)
    if weights_in(work):
        try:
            check_model(work)
        except (ValueError, OSError) as error:
            again = f", or to remove it and resume from {saved[-1]}" if saved else ""
            raise ValueError(f"the run is finished, but {error}{again}") from error
        return _Place(work=work, finished=True)
    check_checkpoint(saved[-1])
    state = read_json(saved[-1] / STATE_FILE)
    up_to(work / METRICS_FILE, run.train.steps)  # raises if it is damaged
    return _Place(work=work, checkpoint=saved[-1], state=state)


def _finished(run: RunConfig, *, main: bool) -> TrainResult:
    out = Path(run.output_dir)
    return TrainResult(
        model_dir=out,
        steps=run.train.steps,
        seconds=0.0,
        metrics=summary(out / METRICS_FILE) if main and (out / METRICS_FILE).exists() else {},
        finished_before=True,
    )


def _train(run: RunConfig, place: _Place, *, progress: bool) -> TrainResult:
    started = time.perf_counter()
    out, work, checkpoint, state = Path(run.output_dir), place.work, place.checkpoint, place.state
    resume = checkpoint is not None
    world = int(os.environ.get("WORLD_SIZE", "1"))
    universal = resume and run.train.deepspeed is not None and state["processes"] != world
    universal = universal and zero.stage(run.train) > 0
    if universal and run.train.lr_muon is not None:
        raise ValueError(
            f"a run with train.lr_muon under ZeRO must be resumed in {state['processes']} "
            "processes, as before, because DeepSpeed's universal checkpoint has no place for "
            f"Muon's momentum, got {world}"
        )
    arguments = training_arguments(run, universal=universal)
    arguments.output_dir = str(work)
    main = arguments.process_index == 0
    trainer = build_trainer(run, arguments, position=state["position"])
    trainer.checked = checkpoint
    trainer.accelerator.wait_for_everyone()
    if main and universal and checkpoint is not None:
        zero.to_universal(checkpoint)
    trainer.accelerator.wait_for_everyone()
    stop = StopOnSignal()
    trainer.add_callback(stop)
    with contextlib.ExitStack() as stack:
        display = stack.enter_context(Display(run.train.steps)) if progress and main else None
        stack.enter_context(stop.listening())
        stack.enter_context(threads(run.train.threads))
        stack.enter_context(_no_other_bars())
        log = RunLog(
            trainer,
            work / METRICS_FILE,
            run.train.log_every,
            display,
            losses=trainer.losses,
            reports=bool(run.train.reporters),
        )
        trainer.add_callback(log)
        if TENSORBOARD in run.train.reporters:
            trainer.add_callback(TensorBoardEvents(work / TENSORBOARD))
        trainer.train(resume_from_checkpoint=str(checkpoint) if resume else None)
        every = run.train.eval_every or run.train.steps + 1
        if trainer.state.global_step >= run.train.steps and run.train.steps % every:
            # Of text, what was learned is known only at the end, whatever was evaluated on the way.
            if isinstance(trainer.eval_dataset, TextHeldOut):
                trainer.evaluate()
    steps = trainer.state.global_step
    if stop.requested and steps < run.train.steps:
        raise KeyboardInterrupt(
            f"step {steps} of {run.train.steps} is saved in {checkpoints(work)[-1]}; the same "
            "command with --resume goes on from there"
        )
    with written("the model", work):
        save_model(trainer, run, work)
    texts = []
    if main:
        with threads(run.train.threads):
            texts = _describe(trainer.model, run, trainer.eval_dataset, work)
        settle(out)
    trainer.accelerator.wait_for_everyone()
    return TrainResult(
        model_dir=out,
        steps=steps,
        seconds=time.perf_counter() - started,
        metrics=summary(out / METRICS_FILE) if main else {},
        samples=texts,
    )


def _describe(model: Any, run: RunConfig, held_out: Any, work: Path) -> list[str]:
    """Draw `run.png` and, of text, write `samples.txt`; returns the samples, prompts included."""
    majority = run.load_task().majority().exact if run.text is None else None
    save_run_plot(work / METRICS_FILE, work, majority)
    if run.text is None or held_out is None:
        return []
    texts = held_out_samples(model, held_out, passes=run.sleep_passes.deepest, seed=run.train.seed)
    write_text_atomic(work / SAMPLES_FILE, "\n\n".join(texts) + "\n")
    return texts


def save_model(trainer: SleepTrainer, run: RunConfig, out: Path) -> None:
    """Write the model, its tokenizer and `run.yaml` into `out`, file by file, weights last.

    A folder without weights is unfinished; one with weights is whole. Collective.
    """
    model: Any = trainer.model
    check_finite(model, "the end of training")
    weights = None
    if trainer.is_deepspeed_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.args.should_save:
        staging = out / STAGING
        shutil.rmtree(staging, ignore_errors=True)
        with _no_other_bars():
            model.save_pretrained(staging, state_dict=weights)
            if run.text is not None:
                run.load_tokenizer().save_pretrained(staging)
        write_text_atomic(staging / RUN_FILE, run.to_yaml())
        names = [path.name for path in staging.iterdir()]
        names += [TENSORBOARD] if TENSORBOARD in run.train.reporters else []
        write_json_atomic(staging / LIST_FILE, sorted(names))
        for path in sorted(staging.iterdir(), key=lambda path: bool(WEIGHTS.fullmatch(path.name))):
            publish(path, out / path.name)
        staging.rmdir()
    trainer.accelerator.wait_for_everyone()


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
    """Final loss and the last measurements by depth in a `metrics.jsonl`."""
    records = read_json_lines(path)
    losses = [record["loss"] for record in records if "depth" in record]
    tail = losses[-max(1, len(losses) // 10) :]
    result: dict[str, Any] = {"loss": sum(tail) / len(tail)} if tail else {}
    for record in records:
        for name in ("exact", "per_label", "perplexity", "bits_per_byte", "by_window"):
            if name in record:
                result[name] = {int(depth): value for depth, value in record[name].items()}
    return result


def _held_out_table(metrics: dict[str, Any]) -> str:
    """Perplexity of held-out text by depth, and the loss by window, in a table for the terminal."""
    measured = {name: metrics[name] for name in ("perplexity", "bits_per_byte") if name in metrics}
    windows = metrics.get("by_window", {})
    lines = ["depth  " + "  ".join(f"{name:>13}" for name in measured) + "  loss in window 0, 1..."]
    for depth in metrics["perplexity"]:
        numbers = "  ".join(f"{values[depth]:13.4f}" for values in measured.values())
        by_window = " ".join("-" if x is None else f"{x:.3f}" for x in windows.get(depth, []))
        lines.append(f"{depth:5}  {numbers}  {by_window}")
    return "\n".join(lines)


def _nothing_to_resume(out: Path) -> FileNotFoundError:
    return FileNotFoundError(
        "output_dir must hold a checkpoint (of train.save_every, or of an interrupted run) to "
        f"resume from, got {str(out)!r}"
    )


def _check_same(run: RunConfig, out: Path) -> None:
    before, now = flat(load_run_config(out / RUN_FILE).to_dict()), flat(run.to_dict())
    for key in sorted(before.keys() | now.keys()):
        if key not in FREE_ON_RESUME and before.get(key) != now.get(key):
            raise ValueError(
                f"{key} must be {before.get(key)!r}, as in the run that is resumed, where only "
                f"{', '.join(FREE_ON_RESUME)} may differ, got {now.get(key)!r}"
            )
