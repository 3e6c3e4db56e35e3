"""`hybrid-sleep bench nights`: facts and experience by day, a sleep over both each night."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hybrid_sleep.cli.commands import command, measure
from hybrid_sleep.cli.options import Minutes, Out
from hybrid_sleep.support.lists import parse_counts


@command
def nights(
    nights: Annotated[int, typer.Option(help="Nights in a row.")] = 10,
    facts: Annotated[int, typer.Option(help="Facts learned at wake each day.")] = 2,
    told: Annotated[int, typer.Option(help="Facts told each day, kept as experience.")] = 3,
    seeds: Annotated[
        str, typer.Option(metavar="N,N", help="Of models, which come trained, and facts.")
    ] = "0,1,2",
    jobs: Annotated[
        int, typer.Option(help="Seeds measured at the same time, each in its own process.")
    ] = 1,
    minutes: Minutes = None,
    out: Out = None,
) -> None:
    """What drifts over nights in a row: retention, perplexity, store, disk, time.

    Models of the small world of facts learn a few facts each day and are told others; each night
    is over both, and everything so far is asked again. What an earlier call finished in the folder,
    with the same code, versions and settings, is kept.
    """
    from hybrid_sleep.eval.nights import bench

    def run(**how: Any) -> Any:
        return bench.run(
            nights=nights,
            facts=facts,
            told=told,
            seeds=parse_counts("seeds", seeds, minimum=0),
            jobs=jobs,
            minutes=minutes,
            **how,
        )

    measure("nights", run, out)
