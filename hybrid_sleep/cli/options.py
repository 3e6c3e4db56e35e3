"""Arguments and options that several commands share, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A run's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to it, such as train.steps=100."),
]
Seeds = Annotated[str, typer.Option(metavar="N,N", help="Seeds, such as 0,1,2.")]
Depths = Annotated[str, typer.Option(metavar="N,N", help="Sleep depths, such as 1-4 or 1,2,4.")]
Count = Annotated[int, typer.Option(help="Test examples of each model and depth.")]
Jobs = Annotated[int, typer.Option(help="Trainings at the same time, each in its own process.")]
Device = Annotated[str, typer.Option(help="A torch device, such as cpu or cuda.")]
Repeats = Annotated[int, typer.Option(help="Timed runs of each case, of which medians are taken.")]
Minutes = Annotated[
    float | None,
    typer.Option(help="Stop before so many minutes are over; the same call continues."),
]
Out = Annotated[
    Path | None, typer.Option(help="Folder for the results (default: a folder in out/).")
]
