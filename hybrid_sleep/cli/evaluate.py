"""`hybrid-sleep tasks` and `hybrid-sleep eval`: tasks in words, and models evaluated on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybrid_sleep.cli.commands import command, command_line, patiently, report
from hybrid_sleep.cli.options import Device
from hybrid_sleep.support.io import sole_writer

tasks = typer.Typer(
    help="Tasks: list them, show one in words.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@tasks.command("list")
@command
def tasks_list() -> None:
    """Every task with its parameters and their defaults."""
    from hybrid_sleep.eval.tasks.show import listing

    typer.echo(listing())


@tasks.command("show")
@command
def tasks_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A task, see tasks list.")],
    params: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Its parameters, such as steps=4."),
    ] = None,
    split: Annotated[str, typer.Option(help="train or test.")] = "test",
    seed: Annotated[int, typer.Option(help="Seed of the examples.")] = 0,
    count: Annotated[int, typer.Option(help="Number of examples.")] = 1,
) -> None:
    """A task in words: its size, its floor, and examples window by window."""
    from hybrid_sleep.eval.tasks.show import show_lines
    from hybrid_sleep.training.parsing import parse_overrides

    lines = show_lines(name, dict(parse_overrides(params or [])), split, seed, count)
    for line in patiently(lines, "still counting what a guess is worth; Ctrl-C ends it"):
        typer.echo(line)


@command
def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A folder with a trained model.")
    ],
    tasks: Annotated[
        str,
        typer.Option(metavar="TASK,TASK", help="lm-eval's tasks, your own, or hybrid_sleep_NAME."),
    ],
    sleep_passes: Annotated[
        str | None,
        typer.Option(metavar="N,N", help="Sleep depths, such as 1,2,4 (default: the config's)."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task, at most.")] = None,
    batch_size: Annotated[str, typer.Option(help="Rows of one forward pass, or auto.")] = "8",
    num_fewshot: Annotated[
        int | None, typer.Option(help="Solved examples before each question.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="A folder with YAML files of your own tasks.")
    ] = None,
    task_params: Annotated[
        str, typer.Option(metavar="YAML", help="Parameters of our tasks: 'rule110: {steps: 4}'.")
    ] = "{}",
    sleep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Overrides the config, such as window=256."),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of our tasks' examples, and of the solved ones.")
    ] = 0,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16...")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/eval"),
) -> None:
    """Accuracy on tasks of lm-evaluation-harness, and on ours in it, at one or more sleep depths.

    What an earlier call finished in the folder, with the same code and settings, is kept.
    """
    from hybrid_sleep.eval.harness import run as harness

    with sole_writer(out):
        result = harness.run(
            checkpoint,
            [name.strip() for name in tasks.split(",")],
            sleep_passes=sleep_passes,
            limit=limit,
            batch_size=batch_size,
            num_fewshot=num_fewshot,
            include_path=include_path,
            task_params=harness.parse_task_params(task_params),
            sleep_options=harness.parse_sleep_options(sleep or []),
            seed=seed,
            device=device,
            dtype=dtype,
            out=out,
            command=command_line(),
            progress=lambda done, total: typer.echo(f"{done} of {total} evaluated", err=True),
        )
        report(result, out)
