"""What a run shows while it goes on: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

PLAIN_LINES = 20  # in a whole run, where a line cannot be rewritten in place
NARROW = 100  # columns below which a terminal has no room for a bar


class Display:
    """Step, loss, depth, memory, tokens/s and time left, in one line on stderr."""

    def __init__(self, steps: int):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self.live = console.is_terminal
        self.steps, self.said = steps, 0
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
        self, step: int, loss: float, depth: int, speed: float, memory: dict[str, Any]
    ) -> None:
        """Show the state after `step` steps; `loss` is the mean since the last update."""
        used = "/".join(f"{memory[name] / 2**30:.1f}" for name in ("current", "peak"))
        text = f"loss {loss:.3f}  depth {depth}  {memory['of']} {used} GiB  {speed:,.0f} tokens/s"
        self.progress.update(self.task, completed=step, description=text)
        if not self.live and (step - self.said >= self.steps / PLAIN_LINES or step >= self.steps):
            self.said = step
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
    this process. Without /proc (not Linux) the current resident set is given as its peak.
    """
    if device.type == "cuda":
        current, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        return {"of": "cuda", "current": current, "peak": peak}
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    statm = Path("/proc/self/statm")
    current = peak
    if statm.is_file():
        current = int(statm.read_text().split()[1]) * resource.getpagesize()
    # The kernel updates the two at different moments.
    return {"of": "rss", "current": current, "peak": max(current, peak)}
