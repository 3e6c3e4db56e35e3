"""One command, `hybrid-sleep`. Every command imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybrid_sleep.cli import evaluate
from hybrid_sleep.cli.bench import bench
from hybrid_sleep.cli.commands import command, command_line, shown
from hybrid_sleep.cli.experience import experience
from hybrid_sleep.cli.facts import facts
from hybrid_sleep.cli.options import Overrides
from hybrid_sleep.support.io import sole_writer
from hybrid_sleep.support.terminal import never_fail_on_characters

app = typer.Typer(
    name="hybrid-sleep",
    help="Language models that sleep: train one, measure it, look at what this machine has.",
    no_args_is_help=True,
    # Joins the lines of a docstring's paragraph again.
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")
app.add_typer(evaluate.tasks, name="tasks")
app.add_typer(facts, name="facts")
app.add_typer(experience, name="experience")


@app.callback()
def _main(
    traceback: Annotated[
        bool, typer.Option(help="Show the whole traceback of an error instead of one line.")
    ] = False,
) -> None:
    shown["traceback"] = traceback
    never_fail_on_characters()


@app.command()
@command
def demo(
    seed: Annotated[int, typer.Option(help="Seed of the weights, the data and the depths.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results (default: out/demo-seedSEED).")
    ] = None,
) -> None:
    """Train a small model on this CPU, then show accuracy against sleep depth.

    Takes under five minutes on two cores. Writes results.json, results.md and accuracy.png.
    """
    from hybrid_sleep.eval.demo import run_demo

    out = out or Path("out") / f"demo-seed{seed}"
    with sole_writer(out):
        run_demo(seed=seed, out=out, command=command_line())


@app.command()
@command
def train(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG", help="A run's YAML file, see configs/runs/ for some."),
    ],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the run's last checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in output_dir.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Train the model of a run config, in one process.

    The same as python -m hybrid_sleep.training, which DeepSpeed's launcher can start.
    """
    from hybrid_sleep import training

    run = training.load_run_config(config, overrides or [])
    result = training.train(run, resume=resume, overwrite=overwrite, progress=not quiet)
    typer.echo(result.report())


app.command("eval")(evaluate.evaluate)


@app.command()
@command
def doctor() -> None:
    """What this machine has, which versions were tested, and what each op runs on here, and why.

    Ends with exit code 1 where a package is missing or too old.
    """
    from hybrid_sleep.cli.doctor import broken, render, report

    rows = report()
    render(rows=rows)
    if broken(rows):
        raise typer.Exit(1)
