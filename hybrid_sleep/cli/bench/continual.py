"""`hybrid-sleep bench continual`: task after task, by a sleep and by what it is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hybrid_sleep.cli.commands import command, measure
from hybrid_sleep.cli.options import Minutes, Out
from hybrid_sleep.support.lists import parse_counts, parse_names


@command
def continual(
    stream: Annotated[
        str,
        typer.Option(
            help="What is learned: rules (of elementary automata), facts (that are told, "
            "contradicted and updated), clinc150 or banking77 (intents of texts)."
        ),
    ] = "rules",
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Parquet, JSON or CSV files of clinc150 or banking77, by split."
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE",
            help="Settings of the stream, such as sessions=4 or updates=8 of facts, intents=15, "
            "shuffled=1, scope=task or text_length=48 of intents.",
        ),
    ] = None,
    rules: Annotated[
        str | None,
        typer.Option(
            metavar="N,N",
            help="Elementary automaton rules, a task each, in this order (default: 110,30,90).",
        ),
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Cells of an automaton's ring, 3 to 16 (default: 10).")
    ] = None,
    tags: Annotated[
        bool | None, typer.Option(help="Whether each row says its rule (default: yes).")
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME",
            help="All or some of none, in-context, fine-tuning, replay, ewc, compress, sleep, "
            "joint.",
        ),
    ] = "all",
    seeds: Annotated[str, typer.Option(metavar="N,N", help="Of models and rows.")] = "0,1,2",
    steps: Annotated[int | None, typer.Option(help="Training steps of a task.")] = None,
    jobs: Annotated[
        int, typer.Option(help="Methods measured at the same time, each in its own process.")
    ] = 1,
    minutes: Minutes = None,
    out: Out = None,
) -> None:
    """What a model keeps of earlier tasks, and learns of new ones: accuracy, transfer, forgetting.

    Small models of ours learn the tasks of a stream one after the other: by a sleep (distillation
    with replay of the model's own samples, under EWC), by parts of it, by plain training, and all
    at once. What an earlier call finished in the folder, with the same code, versions and settings,
    is kept.
    """
    from hybrid_sleep.eval.continual import bench
    from hybrid_sleep.eval.continual.methods import METHODS, Training
    from hybrid_sleep.eval.continual.streams import new_stream
    from hybrid_sleep.training.parsing import parse_overrides

    # A list without any is written none, which here is the name of a method.
    chosen = [methods] if methods in METHODS else parse_names("methods", methods, tuple(METHODS))
    numbers = None if rules is None else tuple(parse_counts("rules", rules, minimum=0))
    given = {"data": data, "rules": numbers, "width": width, "tags": tags}
    settings = {key: value for key, value in given.items() if value is not None}
    settings.update(parse_overrides(changes or [], example="sessions=4"))

    def run(**how: Any) -> Any:
        return bench.run(
            new_stream(stream, settings),
            methods=chosen,
            seeds=parse_counts("seeds", seeds, minimum=0),
            training=Training() if steps is None else Training(steps=steps),
            jobs=jobs,
            minutes=minutes,
            **how,
        )

    measure("continual", run, out)
