"""`hybrid-sleep bench`: one command a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybrid_sleep.cli.bench import accuracy, bridge, continual, costs, facts, kernels, nights
from hybrid_sleep.cli.commands import command

bench = typer.Typer(
    help="Benchmarks: each writes results.json, a Markdown table and a figure.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@command
def render(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="RESULTS_JSON", help="results.json files of any benchmark."),
    ],
) -> None:
    """Rebuild the table and the figure beside each results.json, from it alone."""
    from hybrid_sleep.eval import results as files

    for path in results:
        for written in files.render(path):
            typer.echo(f"wrote {written}")


for _name, _run in {
    "depth": accuracy.depth,
    "map": accuracy.depth_map,
    "ablate": accuracy.ablate,
    "facts": facts.facts,
    "continual": continual.continual,
    "bridge": bridge.bridge,
    "nights": nights.nights,
    "generation": costs.generation,
    "decoding": costs.decoding,
    "sleep": costs.sleep,
    "cost": costs.cost,
    "train": costs.train,
    "kernels": kernels.kernels,
    "compiled": kernels.compiled,
    "render": render,
}.items():
    bench.command(_name)(_run)
