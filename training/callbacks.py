"""What a run writes, shows and reports while it goes on, and how it stops: on all ranks at once."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback
from transformers.integrations import (
    TensorBoardCallback,
    get_available_reporting_integrations,
)
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hybrid_sleep.support.io import read_json_lines, unreadable, write_text_atomic
from hybrid_sleep.training.depth import in_words
from hybrid_sleep.training.folder import last_good, written
from hybrid_sleep.training.ranks import over_ranks, ranks
from hybrid_sleep.training.schema import alike

if TYPE_CHECKING:
    from hybrid_sleep.training.depth import Drawn
    from hybrid_sleep.training.loop import StepRecord
    from hybrid_sleep.training.losses import LossByPosition
    from hybrid_sleep.training.trainer import SleepTrainer

PLAIN_LINES = 20  # in a whole run, where a line cannot be rewritten in place
NARROW = 100  # columns below which a terminal has no room for a bar


class RunLog(TrainerCallback):
    """Writes `metrics.jsonl` and feeds a display, from the first process, and reporters.

    Make one on every rank: losses are means over ranks, tokens and `losses` (which the trainer
    fills) sums, memory the largest of any rank. Lines: `{step, depth, loss, lr}` for every step
    (counted from 1; `lr` by algorithm); every `every` steps and before a checkpoint or evaluation
    `{step, seconds, tokens_per_second, memory}` (see `memory_in_use`) and, with `losses`,
    `{step, loss_by_position, loss_by_depth}` since the last; what an evaluation gives by depth,
    `{step, exact, per_label}` or `{step, held_out_loss, perplexity, ...}`. A resumed run first
    drops what lies beyond its checkpoint. reports: whether the trainer has reporters, such as
    W&B's; it then logs to them whenever lines are written, what is measured here included.

    Raises ValueError on every rank when a loss is not finite on any, naming step and depth, before
    a checkpoint is written after that step.
    """

    def __init__(
        self,
        trainer: SleepTrainer,
        path: Path,
        every: int,
        display: Display | None = None,
        *,
        losses: LossByPosition | None = None,
        reports: bool = False,
    ):
        self.trainer, self.path, self.every, self.losses = trainer, path, every, losses
        self.main = trainer.args.process_index == 0
        self.display = display if self.main else None
        self.reports = reports
        self.rates: dict[str, float] = {}
        self.pending: list[tuple[StepRecord, dict[str, float]]] = []
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.flushed = time.perf_counter()
        if not self.main:
            return
        kept = up_to(self.path, state.global_step)
        write_text_atomic(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self.seconds = max((record.get("seconds", 0.0) for record in kept), default=0.0)
        if self.display is not None:
            self.display.start(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        groups = kwargs["optimizer"].param_groups
        self.rates = {group.get("algorithm", "all"): group["lr"] for group in groups}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = self.trainer.last_step
        assert step is not None
        self.pending.append((step, self.rates))
        last = state.global_step >= state.max_steps
        ahead = control.should_save or control.should_evaluate
        if state.global_step % self.every == 0 or last or ahead:
            self.flush()
            control.should_log = control.should_log or self.reports

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.flush()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        self.flush()
        record: dict[str, Any] = {"step": state.global_step}
        for key, value in (metrics or {}).items():
            name, _, depth = key.removeprefix("eval_").rpartition("_")
            if depth.isdigit():
                # `loss` is a training step's, in every record.
                name = "held_out_loss" if name == "loss" else name
                record.setdefault(name, {})[int(depth)] = value
        self._write([record])
        for name, title in (("exact", "exact accuracy"), ("perplexity", "perplexity")):
            if self.display is not None and name in record:
                self.display.say(f"step {state.global_step}: {title} {by_depth(record[name])}")
        # The time of an evaluation is the run's, but no training throughput.
        now = time.perf_counter()
        self.seconds += now - self.flushed
        self.flushed = now

    def flush(self) -> None:
        """Write what has not been written yet; on every rank at once."""
        if not self.pending:
            return
        pending, self.pending = self.pending, []
        tokens = sum(record.tokens for record, _ in pending)
        shares = [torch.as_tensor(record.loss).detach().double() for record, _ in pending]
        parts = [torch.stack(shares).cpu()]
        parts.append(torch.tensor([tokens], dtype=torch.float64))
        if self.losses is not None:
            parts.append(self.losses.tensor().cpu().flatten())
        parts = over_ranks(torch.cat(parts), "SUM").split([part.numel() for part in parts])
        losses = (parts[0] / ranks()).tolist()
        for (record, _), loss in zip(pending, losses, strict=True):
            if not math.isfinite(loss):
                raise ValueError(self._diverged(record, loss))
        memory = memory_in_use(shares[-1].device)
        most = torch.tensor([memory["current"], memory["peak"]], dtype=torch.float64)
        current, peak = over_ranks(most, "MAX").tolist()
        memory |= {"current": int(current), "peak": int(peak)}
        now = time.perf_counter()
        speed = float(parts[1]) / (now - self.flushed)
        self.seconds += now - self.flushed
        self.flushed = now
        lines: list[dict[str, Any]] = [
            {"step": record.step + 1, "depth": record.depth, "loss": loss, "lr": rates}
            for (record, rates), loss in zip(pending, losses, strict=True)
        ]
        step, depth = lines[-1]["step"], lines[-1]["depth"]
        timing = {"seconds": self.seconds, "tokens_per_second": speed, "memory": memory}
        measured = {"lr": lines[-1]["lr"], **timing}
        lines.append({"step": step, **timing})
        if self.losses is not None:
            self.losses.load(parts[2].view_as(self.losses.tensor()))
            measured |= self.losses.summary()
            lines.append({"step": step, **self.losses.summary()})
            self.losses.reset()
        self._write(lines)
        if self.reports:
            self.trainer.measured = scalars(measured)
        if self.display is not None:
            self.display.update(step, sum(losses) / len(losses), depth, speed, memory)

    def _diverged(self, record: StepRecord, loss: float) -> str:
        return (
            f"loss is {loss} at step {record.step + 1} (sleep_passes={record.depth}); try a lower "
            "lr_muon or lr_adamw, a longer warmup or a smaller grad_clip; "
            f"{last_good(self.trainer.args.output_dir)}"
        )

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if not self.main:
            return
        run_dir = self.trainer.args.output_dir
        with written("metrics", run_dir), open(self.path, "a", encoding="utf-8") as out:
            out.writelines(json.dumps(line) + "\n" for line in lines)


class TensorBoardEvents(TensorBoardCallback):
    """transformers' TensorBoard log, in `folder`.

    A run that goes on hides what an earlier process wrote beyond its checkpoint (TensorBoard's
    purge), so that no step is shown twice.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.logging_dir = str(folder)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the event file behind the step that the run is at."""
        from torch.utils.tensorboard import SummaryWriter

        if state.is_world_process_zero:
            self.tb_writer = SummaryWriter(self.logging_dir, purge_step=state.global_step + 1)
        super().on_train_begin(args, state, control, **kwargs)


class StopOnSignal(TrainerCallback):
    """Ends training after the current step, with a checkpoint, once `requested` is set on any rank.

    A signal reaches the ranks at different steps, so they ask each other after every one.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Turn the first SIGINT or SIGTERM into a request; a second one acts as usual."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        usual: dict[int, Any] = {
            number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
        }

        def request(number: int, frame: Any) -> None:
            self.requested = True
            signal.signal(number, usual[number] or signal.SIG_DFL)

        for number in usual:
            signal.signal(number, request)
        try:
            yield
        finally:
            for number, handler in usual.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        requested = torch.tensor([self.requested], dtype=torch.float64)
        # Never set to False: a signal may arrive in between.
        if bool(over_ranks(requested, "MAX")):
            self.requested = True
            control.should_save = True
            control.should_training_stop = True


class Display:
    """Step, loss, depth, memory, tokens/s and time left, in one line on stderr."""

    def __init__(self, steps: int):
        console = Console(stderr=True)
        self.live = console.is_terminal
        self.steps, self.printed = steps, 0
        bar = [] if console.width < NARROW else [BarColumn(bar_width=16)]
        self.progress = Progress(
            *bar,
            TextColumn("{task.completed}/{task.total}  {task.description}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not self.live,
            # By rich's default, lines more than 30 s apart would show no time left.
            speed_estimate_period=3600,
        )
        self.task = self.progress.add_task("", total=steps)

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.progress.stop()

    def start(self, step: int) -> None:
        """Begin at `step`, which is not 0 when a run goes on."""
        self.progress.update(self.task, completed=step)

    def update(
        self, step: int, loss: float, depth: Drawn, speed: float, memory: dict[str, Any]
    ) -> None:
        """Show the state after `step` steps; `loss` is the mean since the last update."""
        used = "/".join(f"{memory[name] / 2**30:.1f}" for name in ("current", "peak"))
        passes = in_words(depth)
        text = f"loss {loss:.3f}  depth {passes}  {memory['of']} {used} GiB  {speed:,.0f} tokens/s"
        self.progress.update(self.task, completed=step, description=text)
        due = step - self.printed >= self.steps / PLAIN_LINES or step >= self.steps
        if due and not self.live:
            self.printed = step
            self.say(f"step {step}/{self.steps}  {text}")

    def say(self, text: str) -> None:
        """A line that stays."""
        self.progress.console.print(text, highlight=False, soft_wrap=True)


def by_depth(values: dict[int, float]) -> str:
    """Values by depth in one short line."""
    return ", ".join(f"{value:.3f} at depth {depth}" for depth, value in values.items())


def memory_in_use(device: torch.device) -> dict[str, Any]:
    """`{of, current, peak}` in bytes, the peak since the process began.

    `of` is "cuda", what PyTorch has allocated on the current GPU, or "rss", the resident set of
    this process.
    """
    if device.type == "cuda":
        current, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        return {"of": "cuda", "current": current, "peak": peak}
    current = psutil.Process().memory_info().rss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    # The kernel updates the two at different moments.
    return {"of": "rss", "current": current, "peak": max(current, peak)}


def scalars(value: Any, name: str = "") -> dict[str, float]:
    """Every number in nested dicts and lists under its path: `loss_by_position/0`, `lr/muon`."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        found = (scalars(item, f"{name}/{key}" if name else str(key)) for key, item in inner)
        return {path: number for part in found for path, number in part.items()}
    return {name: value} if isinstance(value, int | float) else {}


def check_reporters(names: Iterable[str]) -> None:
    """Raise ValueError unless transformers can report to each of `names` on this machine."""
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"train.report_to must be none or some of {', '.join(INTEGRATION_TO_CALLBACK)}, "
                f"got {name!r}{alike(name, INTEGRATION_TO_CALLBACK)}"
            )
        if name not in get_available_reporting_integrations():
            raise ValueError(
                f"train.report_to must name packages that are installed, got {name!r}, which is "
                f"not (pip install {name})"
            )


def up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """The records of `path` up to `step`; none of a run that starts anew.

    A line that a kill cut short is beyond its checkpoint. ValueError if another one is damaged.
    """
    records = read_json_lines(path) if step and path.exists() else []
    for number, record in enumerate(records, 1):
        if not isinstance(record.get("step"), int):
            raise unreadable(path, f"line {number} has no step")
    return [record for record in records if record["step"] <= step]
