"""`hybrid-sleep bench bridge`: fast weights into slow ones, by a sleep and beside it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hybrid_sleep.cli.commands import command, measure
from hybrid_sleep.cli.options import Minutes, Out
from hybrid_sleep.support.lists import parse_counts, parse_names


@command
def bridge(
    days: Annotated[int, typer.Option(help="Texts, each slept over and then learned.")] = 3,
    pairs: Annotated[int, typer.Option(help="Keys and values that a text says.")] = 4,
    vocab_size: Annotated[int, typer.Option(help="Tokens; half of them are values.")] = 32,
    passes: Annotated[int, typer.Option(help="Depth of the sleep over a text.")] = 2,
    arms: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME",
            help="All or some of none, fine-tuning, sleep, unguarded, own-text.",
        ),
    ] = "all",
    seeds: Annotated[str, typer.Option(metavar="N,N", help="Of models and texts.")] = "0,1,2",
    split: Annotated[str, typer.Option(help="Of the texts: test, or train to choose on.")] = "test",
    steps: Annotated[int | None, typer.Option(help="Training steps of a model.")] = None,
    jobs: Annotated[
        int, typer.Option(help="Seeds measured at the same time, each in its own process.")
    ] = 1,
    minutes: Minutes = None,
    out: Out = None,
) -> None:
    """What is left, in the weights alone, of texts that a model slept over and whose cache is gone.

    Small models of ours are trained to answer from windows that they slept over. Each text is then
    learned in a sleep over its cache, with and without EWC and prompts, beside no sleep and plain
    training on the text. What an earlier call finished in the folder, with the same code, versions
    and settings, is kept.
    """
    from hybrid_sleep.eval.bridge import bench
    from hybrid_sleep.eval.bridge.arms import ARMS
    from hybrid_sleep.eval.bridge.model import Training
    from hybrid_sleep.eval.bridge.texts import Texts

    def run(**how: Any) -> Any:
        return bench.run(
            texts=Texts(vocab_size, pairs),
            days=days,
            passes=passes,
            arms=parse_names("arms", arms, tuple(ARMS)),
            seeds=parse_counts("seeds", seeds, minimum=0),
            split=split,
            training=Training() if steps is None else Training(steps=steps),
            jobs=jobs,
            minutes=minutes,
            **how,
        )

    measure("bridge", run, out)
