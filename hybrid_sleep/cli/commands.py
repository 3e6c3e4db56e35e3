"""What the commands of `hybrid-sleep` share: how one ends, and how a benchmark reports."""

from __future__ import annotations

import functools
import shlex
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hybrid_sleep.support.io import sole_writer
from hybrid_sleep.training.zero import choose_accelerator

if TYPE_CHECKING:
    from hybrid_sleep.eval.results import Result

PATIENCE = 2.0  # seconds of silence
CONTINUES = "the time is up; the same call continues"
shown = {"traceback": False}


def command(work: Callable[..., Any]) -> Callable[..., Any]:
    """`work` as a command: bad input ends in one line and exit code 2, Ctrl-C in 130.

    Too large for the memory is bad input. In a path, `~` is the home folder.
    """

    @functools.wraps(work)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            choose_accelerator()
            work(*args, **{name: _at_home(value) for name, value in kwargs.items()})
        except KeyboardInterrupt as interrupt:
            # Work that can say what it saved raises with that text.
            typer.echo(f"interrupted: {str(interrupt) or 'nothing more was written'}", err=True)
            raise typer.Exit(130) from None
        except (ValueError, OSError) as error:
            if shown["traceback"]:
                raise
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None
        except (MemoryError, RuntimeError) as error:
            if shown["traceback"] or not _is_too_large(error):
                raise
            typer.echo(f"error: out of memory ({str(error).partition(chr(10))[0]})", err=True)
            raise typer.Exit(2) from None

    return run


def _at_home(value: Any) -> Any:
    """A path with the home folder for its `~`, which a shell leaves in `--out=~/results`."""
    if isinstance(value, list):
        return [_at_home(part) for part in value]
    return value.expanduser() if isinstance(value, Path) else value


def _is_too_large(error: Exception) -> bool:
    """Whether memory did not suffice: torch raises a RuntimeError of its own on a CPU."""
    words = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in words)


def command_line() -> str:
    """This call as someone else can repeat it: relative paths, no folder of this machine."""
    return shlex.join(["hybrid-sleep", *(_shown(word) for word in sys.argv[1:])])


def _shown(word: str) -> str:
    path = Path(word)
    if not path.is_absolute():
        return word
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return path.name


def patiently(lines: Iterable[str], what: str) -> Iterator[str]:
    """`lines` as they come; `what` goes on is said on stderr before one that takes seconds."""
    iterator = iter(lines)
    while True:
        timer = threading.Timer(PATIENCE, typer.echo, [what], {"err": True})
        timer.daemon = True
        timer.start()
        try:
            line = next(iterator)
        except StopIteration:
            return
        finally:
            timer.cancel()
        yield line


def measure(name: str, run: Callable[..., Result], out: Path | None, **given: Any) -> None:
    """Run the benchmark `name` with what is given, showing progress, and report its result.

    `run` gets `out` as well, whose earlier results it may keep (default: out/bench-NAME, with the
    kind of a device that is given and is no CPU behind it).
    """
    from hybrid_sleep.support.progress import progress_bar

    kind = given.get("device", "cpu").partition(":")[0]
    out = out or Path("out") / f"bench-{name}{'' if kind == 'cpu' else f'-{kind}'}"
    with sole_writer(out):
        with progress_bar(name) as progress:
            result = run(**given, out=out, command=command_line(), progress=progress)
        report(result, out)


def report(result: Result, out: Path) -> None:
    """Write a benchmark's files and show its table; KeyboardInterrupt if it was interrupted."""
    show(result, out)
    if result.ended == "time is up":
        typer.echo(CONTINUES, err=True)
    elif not result.complete:
        raise KeyboardInterrupt("these files hold what was finished")


def show(result: Result | dict[str, Any], out: Path) -> None:
    """Write a benchmark's files and show its table."""
    from hybrid_sleep.eval.results import save

    paths = save(result, out)
    typer.echo(paths[1].read_text(encoding="utf-8"))
    typer.echo("wrote " + ", ".join(str(path) for path in paths), err=True)
