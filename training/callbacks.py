"""What a run shows and writes while it goes on: metrics, a live line, a clean stop."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from hybrid_sleep.io import write_text_atomic

if TYPE_CHECKING:
    from hybrid_sleep.training.trainer import SleepTrainer, StepRecord

PLAIN_LINES = 20  # in a whole run, where a line cannot be rewritten in place


class RunLog(TrainerCallback):
    """Writes `metrics.jsonl` and drives a display.

    Lines: `{step, depth, loss, lr}` for every step (counted from 1; `lr` by algorithm),
    `{step, seconds, tokens_per_second}` every `every` steps, `{step, exact, per_label}` (by depth)
    for every evaluation. A resumed run first drops what lies beyond its checkpoint.

    Raises ValueError when a loss is not finite, naming step and depth.
    """

    def __init__(
        self, trainer: SleepTrainer, path: Path, every: int, display: Display | None = None
    ):
        self.trainer, self.path, self.every, self.display = trainer, path, every, display
        self.rates: dict[str, float] = {}
        self.pending: list[tuple[StepRecord, dict[str, float]]] = []
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = _up_to(self.path, state.global_step)
        write_text_atomic(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self.seconds = max((record.get("seconds", 0.0) for record in kept), default=0.0)
        self.flushed = time.perf_counter()
        if self.display is not None:
            self.display.start(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        groups = kwargs["optimizer"].param_groups
        self.rates = {group.get("algorithm", "all"): group["lr"] for group in groups}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pending.append((self.trainer.last_step, self.rates))
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            self.flush()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.flush()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        self.flush()
        record: dict[str, Any] = {"step": state.global_step}
        for key, value in (metrics or {}).items():
            name, _, depth = key.removeprefix("eval_").rpartition("_")
            if depth.isdigit():
                record.setdefault(name, {})[int(depth)] = value
        self._write([record])
        if self.display is not None and "exact" in record:
            self.display.say(f"step {state.global_step}: exact accuracy {shares(record['exact'])}")
        # The time of an evaluation is the run's, but no training throughput.
        now = time.perf_counter()
        self.seconds += now - self.flushed
        self.flushed = now

    def flush(self) -> None:
        """Write what has not been written yet."""
        if not self.pending:
            return
        losses = torch.stack([record.loss for record, _ in self.pending]).tolist()
        lines: list[dict[str, Any]] = []
        for (record, rates), loss in zip(self.pending, losses, strict=True):
            if not math.isfinite(loss):
                raise ValueError(
                    f"loss is {loss} at step {record.step + 1} (sleep_passes={record.depth}); try "
                    "a lower lr_muon or lr_adamw, a longer warmup or a smaller grad_clip"
                )
            line = {"step": record.step + 1, "depth": record.depth, "loss": loss, "lr": rates}
            lines.append(line)
        now = time.perf_counter()
        speed = sum(record.tokens for record, _ in self.pending) / (now - self.flushed)
        self.seconds += now - self.flushed
        self.flushed = now
        self.pending.clear()
        step = lines[-1]["step"]
        lines.append({"step": step, "seconds": self.seconds, "tokens_per_second": speed})
        self._write(lines)
        if self.display is not None:
            self.display.update(step, sum(losses) / len(losses), lines[-2]["depth"], speed)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        with open(self.path, "a", encoding="utf-8") as out:
            out.writelines(json.dumps(line) + "\n" for line in lines)


class StopOnSignal(TrainerCallback):
    """Ends training after the current step, with a checkpoint, once `requested` is set."""

    def __init__(self) -> None:
        self.requested = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Turn the first SIGINT or SIGTERM into a request; a second one acts as usual."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

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
        if self.requested:
            control.should_save = True
            control.should_training_stop = True


class Display:
    """One live line on stderr: step, loss, depth, tokens/s, time left; plain lines elsewhere."""

    def __init__(self, steps: int):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self.live = console.is_terminal
        self.steps, self.said = steps, 0
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}  {task.description}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not self.live,
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

    def update(self, step: int, loss: float, depth: int, speed: float) -> None:
        """Show the state after `step` steps; `loss` is the mean since the last update."""
        text = f"loss {loss:.3f}  depth {depth}  {speed:,.0f} tokens/s"
        self.progress.update(self.task, completed=step, description=text)
        if not self.live and (step - self.said >= self.steps / PLAIN_LINES or step >= self.steps):
            self.said = step
            self.say(f"step {step}/{self.steps}  {text}")

    def say(self, text: str) -> None:
        """A line that stays."""
        self.progress.console.print(text, highlight=False, soft_wrap=True)


def shares(by_depth: dict[int, float]) -> str:
    """Accuracies by depth in one short line."""
    return ", ".join(f"{value:.3f} at depth {depth}" for depth, value in by_depth.items())


def _up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """The records of `path` up to `step`; none of a run that starts anew."""
    kept = []
    if step and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            # A killed run can leave its last line cut short; that one is beyond its checkpoint.
            with contextlib.suppress(json.JSONDecodeError):
                record = json.loads(line)
                if record["step"] <= step:
                    kept.append(record)
    return kept
