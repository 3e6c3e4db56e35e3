"""`hybrid-sleep bench continual`: task after task, by a sleep and by what it is compared with."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hybrid_sleep.cli.commands import command, measure
from hybrid_sleep.cli.options import Minutes, Out
from hybrid_sleep.support.lists import parse_counts, parse_names


@command
def continual(
    rules: Annotated[
        str,
        typer.Option(metavar="N,N", help="Elementary automaton rules, a task each, in this order."),
    ] = "110,30,90",
    width: Annotated[int, typer.Option(help="Cells of a ring, 3 to 16.")] = 10,
    tags: Annotated[bool, typer.Option(help="Whether each row says its rule.")] = True,
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

    Small models of ours learn elementary automaton rules one after the other: by a sleep
    (distillation with replay of the model's own samples, under EWC), by parts of it, by plain
    training, and all at once. What an earlier call finished in the folder, with the same code,
    versions and settings, is kept.
    """
    from hybrid_sleep.eval.continual import bench
    from hybrid_sleep.eval.continual.automata import RuleStream
    from hybrid_sleep.eval.continual.methods import METHODS, Training

    def run(**how: Any) -> Any:
        return bench.run(
            RuleStream(tuple(parse_counts("rules", rules, minimum=0)), width, tags),
            methods=parse_names("methods", methods, tuple(METHODS)),
            seeds=parse_counts("seeds", seeds, minimum=0),
            training=Training() if steps is None else Training(steps=steps),
            jobs=jobs,
            minutes=minutes,
            **how,
        )

    measure("continual", run, out)
