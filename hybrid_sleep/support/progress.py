"""A progress bar for long work; goes to stderr, so that stdout holds results alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Yield `update(done, total)`; the bar shows the share done and the time left.

    There is none where it could not be drawn again in place, as in a file. Of work that is refused
    before anything is done, nothing stays on the screen but the reason.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=None)
        try:
            yield lambda done, total: progress.update(task, completed=done, total=total)
        except BaseException:
            progress.live.transient = not progress.tasks[0].completed
            raise
