"""`hybrid-sleep experience`: what a model is to learn from asleep, and the folder that keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hybrid_sleep.cli.commands import command
from hybrid_sleep.cli.memories import (
    SETTINGS,
    Changes,
    Dtype,
    Folder,
    Model,
    OptionsFile,
    bars,
    given_options,
    opened,
    say,
)
from hybrid_sleep.cli.options import Device
from hybrid_sleep.support.io import read_text, unreadable

experience = typer.Typer(
    help="Experience kept until a sleep, which moves it into the weights of a model.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

NOT_DUE = 3
ADDED = {"text"}, {"prompt", "rejected", "provenance"}
Source = Annotated[str, typer.Option(help="Whose it is; what is erased together.")]


@experience.command("add")
@command
def add(
    folder: Folder,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="Something that was read.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="JSON Lines, each with text, and prompt and rejected for an answer and its "
            "correction."
        ),
    ] = None,
    source: Source = "user",
    consent: Annotated[
        bool, typer.Option(help="It may be kept and learned from; refused without.")
    ] = False,
    model: Model = None,
    dtype: Dtype = None,
    changes: Changes = None,
    options: OptionsFile = None,
    device: Device = "cpu",
) -> None:
    """Keep experiences for the next sleep; the weights stay as they are.

    Secrets are taken out first, and what reaches the disk is encrypted.
    """
    given = [{"text": text} for text in texts or ()] + (_read(file, *ADDED) if file else [])
    if not given:
        raise ValueError("TEXT or --file must give an experience, got none")
    with opened(folder, model, dtype, device, changes, options) as memory:
        added = [memory.experience(source=source, consent=consent, **one) for one in given]
    kept = sum(one.id is not None for one in added)
    known = sum(one.duplicate is not None for one in added)
    secrets = sum(sum(one.scrubbed.values()) for one in added)
    gone = len({number for one in added for number in one.evicted})
    typer.echo(
        f"{kept} kept, {known} were known, {secrets} secrets taken out, {gone} left out or "
        "removed for lack of room"
    )


@experience.command("sleep")
@command
def sleep(
    folder: Folder,
    facts: Annotated[
        bool, typer.Option("--facts/--no-facts", help="Sleep over the facts as well, afterwards.")
    ] = False,
    questions: Annotated[
        Path | None,
        typer.Option(help="JSON Lines, each with question and answer, asked at the gate."),
    ] = None,
    caches: Annotated[
        list[Path] | None,
        typer.Option(
            "--cache",
            help="A folder with a SleepCache of this model, learned as well; may be repeated.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do and measure all of it, and take it back.")
    ] = False,
    when_due: Annotated[
        bool,
        typer.Option("--when-due", help="Only if the folder's schedule asks for it now."),
    ] = False,
    changes: Changes = None,
    options: OptionsFile = None,
    device: Device = "cpu",
) -> None:
    """Train on what was kept, on dreams of it and on foundations, and keep that if the gate passes.

    Otherwise the weights are what they were, which is said; the exit code is 0 either way. What a
    commit was over is erased; the folders of caches stay, and are of no use then. With --when-due
    it is 3 where no sleep is due, or something else has the folder open; no model is loaded for
    that, so that cron may ask as often as it likes.
    """
    from hybrid_sleep.parametric import CachedContext
    from hybrid_sleep.sleep.cache import SleepCache

    given = _read(questions, {"question", "answer"}, set()) if questions else []
    asked = [(one["question"], one["answer"]) for one in given]
    kind = "full" if facts else "experience"
    if when_due:
        _only_when_due(folder, kind, changes, options)
    with opened(folder, device=device, changes=changes, file=options) as memory:
        days = [
            CachedContext(SleepCache.from_pretrained(path, model=memory.model))
            for path in caches or ()
        ]
        with bars() as progress:
            record = memory.sleep(
                progress, kind=kind, caches=days, questions=asked, dry_run=dry_run
            )
        say(record)


def _only_when_due(
    folder: Path, kind: str, changes: list[str] | None, file: Path | None
) -> None:
    """Say whether a sleep of `kind` is due, and why; end with `NOT_DUE` unless it is."""
    from hybrid_sleep.parametric.awake import due_now
    from hybrid_sleep.parametric.options import chosen_options
    from hybrid_sleep.parametric.schedule import Due
    from hybrid_sleep.parametric.store import FactStore

    options = given_options(folder, changes, file) or chosen_options(folder / SETTINGS, None)
    # To read alone at first, so that a folder is not made by asking.
    with FactStore.open(folder, write=False) as store:
        found = due_now(store, options, kind)
    try:
        FactStore.open(folder).close()
    except BlockingIOError:
        found = Due(False, f"{folder} is in use")
    typer.echo(f"{'due' if found else 'not due'}: {found.why}")
    if not found:
        raise typer.Exit(NOT_DUE)


@experience.command("status")
@command
def status(folder: Folder, device: Device = "cpu") -> None:
    """What waits for a sleep, by state and source, and what was left out; no content."""
    with opened(folder, device=device) as memory:
        typer.echo(json.dumps(memory.buffer.summary(), indent=2))


@experience.command("erase")
@command
def erase(folder: Folder, source: Source = "user", device: Device = "cpu") -> None:
    """Erase all of a source that is kept: keys, rows, and what is left of them on the disk.

    What was learned of it in a sleep stays in the weights: take that back with `facts undo`.
    """
    with opened(folder, device=device) as memory:
        count = memory.buffer.erase(source)
    typer.echo(f"{count} experiences of {source} erased")


def _read(path: Path, needed: set[str], more: set[str]) -> list[dict[str, Any]]:
    """The objects of a file of JSON Lines; ValueError naming the line that is none, or has not all
    of `needed`, or anything but that and `more`."""
    found = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
        except ValueError as error:
            raise unreadable(path, f"line {number}: {error}") from error
        if not (isinstance(one, dict) and needed <= one.keys() <= needed | more):
            names = " and ".join(sorted(needed))
            also = f", and may have {', '.join(sorted(more))}" if more else ""
            raise unreadable(path, f"line {number} must have {names}{also}, got {line}")
        found.append(one)
    return found
