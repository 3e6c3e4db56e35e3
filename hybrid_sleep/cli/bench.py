"""`hybrid-sleep bench`: one command a benchmark; those of accuracy are in `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hybrid_sleep.cli.commands import command, command_line, measure, report
from hybrid_sleep.support.io import sole_writer

bench = typer.Typer(
    help="Benchmarks: each writes results.json, a Markdown table and a figure.",
    no_args_is_help=True,
)


@bench.command("generation")
@command
def bench_generation(
    windows: Annotated[int, typer.Option(help="Windows to generate.")] = 64,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 64,
    passes: Annotated[int, typer.Option(help="Passes of each sleep.")] = 4,
    repeats: Annotated[int, typer.Option(help="Runs, of which medians are taken.")] = 5,
    state_space: Annotated[str, typer.Option(help="gated_deltanet or mamba2.")] = "gated_deltanet",
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path(
        "out/bench-generation"
    ),
) -> None:
    """Seconds per token and memory of the last generated window against the first."""
    from hybrid_sleep.eval.benchmarks import generation
    from hybrid_sleep.eval.progress import progress_bar

    with sole_writer(out):
        with progress_bar("generate") as progress:
            result = generation.run(
                windows=windows,
                window=window,
                passes=passes,
                repeats=repeats,
                state_space=state_space,
                device=device,
                command=command_line(),
                progress=progress,
            )
        report(result, out)


@bench.command("sleep")
@command
def bench_sleep(
    repeats: Annotated[int, typer.Option(help="Paired runs of each shape and depth.")] = 9,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    minutes: Annotated[
        float | None, typer.Option(help="Stop before these are over; the same call goes on.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results (default: out/bench-sleep[-cuda]).")
    ] = None,
) -> None:
    """One sleep of depth N against N calls of the model, over window shapes.

    On a CUDA device: sleeps from CUDA graphs, eager ones and calls, and single tokens before and
    after 64 windows. What an earlier call finished in the folder, with the same code, versions and
    device, is kept.
    """
    from hybrid_sleep.eval.benchmarks import sleep

    out = out or Path("out") / ("bench-sleep-cuda" if device.startswith("cuda") else "bench-sleep")
    measure(
        "sleep",
        sleep.run,
        out,
        repeats=repeats,
        device=device,
        minutes=minutes,
    )


@bench.command("cost")
@command
def bench_cost(
    model: Annotated[
        Path | None, typer.Option(help="A trained model (default: an untrained one).")
    ] = None,
    depo: Annotated[
        Path | None, typer.Option(help="A model trained on Depo, to be asked many questions.")
    ] = None,
    hidden: Annotated[int | None, typer.Option(help="Width of the untrained model.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the untrained model.")] = None,
    window: Annotated[int | None, typer.Option(help="Window of the untrained model.")] = None,
    state_space: Annotated[
        str | None, typer.Option(help="gated_deltanet or mamba2, of the untrained model.")
    ] = None,
    depths: Annotated[str, typer.Option(help="Sleep depths, such as 1-4 or 1,2,4.")] = "1,2,4,8",
    windows: Annotated[str, typer.Option(help="Windows of the past, such as 1,8,64.")] = "1,8,64",
    question: Annotated[
        int | None, typer.Option(help="Tokens of a question (default: a quarter of the window).")
    ] = None,
    answer: Annotated[
        int | None, typer.Option(help="Tokens of an answer (default: a quarter of the window).")
    ] = None,
    cycles: Annotated[int, typer.Option(help="Cycles of Depo to ask about.")] = 50,
    repeats: Annotated[int, typer.Option(help="Rounds in turn, of which medians are taken.")] = 5,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    minutes: Annotated[
        float | None, typer.Option(help="Stop before these are over; the same call goes on.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results (default: out/bench-cost[-cuda]).")
    ] = None,
) -> None:
    """Time, FLOPs, bytes and energy of sleeps, and how many questions pay for one.

    Sleeps by depth; tokens awake behind slept windows and behind a KV cache that keeps all; with
    --depo, many questions answered from the saved fast weights of one sleep. What an earlier call
    finished in the folder, with the same code, versions and device, is kept.
    """
    from hybrid_sleep.eval.benchmarks import cost
    from hybrid_sleep.eval.depth import parse_depths

    out = out or Path("out") / ("bench-cost-cuda" if device.startswith("cuda") else "bench-cost")
    given = {"hidden": hidden, "layers": layers, "window": window, "state_space": state_space}
    measure(
        "cost",
        cost.run,
        out,
        model=model,
        sizes={name: value for name, value in given.items() if value is not None},
        depo=depo,
        depths=parse_depths(depths),
        windows=cost.parse_windows(windows),
        question=question,
        answer=answer,
        cycles=cycles,
        repeats=repeats,
        device=device,
        minutes=minutes,
    )


@bench.command("train")
@command
def bench_train(
    repeats: Annotated[int, typer.Option(help="Timed steps of each option, in pairs.")] = 5,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    minutes: Annotated[
        float | None, typer.Option(help="Stop before these are over; the same call goes on.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results (default: out/bench-train[-cuda]).")
    ] = None,
) -> None:
    """A training step: tokens per second and peak memory against depth, windows, recomputing.

    Each way of activation checkpointing and truncation against keeping everything, in pairs. What
    an earlier call finished in the folder, with the same code, versions and device, is kept.
    """
    from hybrid_sleep.eval.benchmarks import training

    out = out or Path("out") / ("bench-train-cuda" if device.startswith("cuda") else "bench-train")
    measure(
        "train",
        training.run,
        out,
        repeats=repeats,
        device=device,
        minutes=minutes,
    )


@bench.command("kernels")
@command
def bench_kernels(
    ops: Annotated[
        str | None,
        typer.Option(metavar="OP,OP", help="Default: gated_delta_rule on a CPU, all on a GPU."),
    ] = None,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    base: Annotated[
        str | None,
        typer.Option(metavar="REV", help="Compare with this commit instead of with peers."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Rounds of each shape and direction at least.")] = 7,
    minutes: Annotated[
        float | None, typer.Option(help="Stop before these are over; the same call goes on.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results (default: out/bench-kernels[-cuda][-base])."),
    ] = None,
) -> None:
    """Kernels against their peers, in one run.

    On a CPU the gated delta rule against the fallback inside transformers; on a GPU every op
    against every peer there is, and the share of the roofline. What an earlier call finished in the
    folder, with the same code, versions and device, is kept.
    """
    import torch

    from hybrid_sleep.eval.progress import progress_bar
    from hybrid_sleep.kernels.benchmarks import base as comparison
    from hybrid_sleep.kernels.benchmarks import contenders, fallback, report, suite
    from hybrid_sleep.support.provenance import check_device

    kind = torch.device(check_device(device)).type
    chosen = contenders.chosen(ops or ("gated_delta_rule" if kind == "cpu" else None))
    if kind == "cpu" and base is None and ops not in (None, "gated_delta_rule"):
        raise ValueError(f"ops={ops!r}: on a CPU, without base, it must be gated_delta_rule")
    suffixes = ["" if kind == "cpu" else f"-{kind}", "-base" if base else ""]
    out = out or Path("out") / "".join(["bench-kernels", *suffixes])
    options = {"repeats": repeats, "minutes": minutes, "out": out, "command": command_line()}
    measured = 0
    with sole_writer(out):
        with progress_bar("kernels") as progress:

            def step(done: int, total: int) -> None:
                nonlocal measured
                measured += 1
                progress(done, total)

            def row_done(row: dict[str, Any]) -> None:
                step(measured + 1, len(fallback.SHAPES) * len(fallback.TARGETS))

            try:
                if base is not None:
                    shapes = fallback.SHAPES if kind == "cpu" else None
                    result = comparison.run(
                        base, chosen, device=device, shapes=shapes, progress=step, **options
                    )
                elif kind == "cpu":
                    result = fallback.run(progress=row_done, **options)
                else:
                    result = suite.run(chosen, device=device, progress=step, **options)
            except KeyboardInterrupt:
                kept = f"{out / 'results.json'} holds what was finished, and the same call goes on"
                raise KeyboardInterrupt(kept if measured else "nothing was finished") from None
        save = fallback.save if result["benchmark"] == "fallback" else report.save
        paths = save(result, out)
    typer.echo(paths[1].read_text(encoding="utf-8"))
    typer.echo("wrote " + ", ".join(str(path) for path in paths), err=True)
    if not result["complete"]:
        typer.echo("the time is up; the same call goes on", err=True)
    elif not measured:
        typer.echo(f"everything was there already; remove {paths[0]} to measure again", err=True)


@bench.command("compiled")
@command
def bench_compiled(
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="OP", help="Default: all of them.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/bench-compiled"),
) -> None:
    """What the Triton kernels compile to for compute capability 9.0, without a GPU."""
    from hybrid_sleep.kernels.benchmarks import compiled

    with sole_writer(out):
        result = compiled.run(
            ops or tuple(compiled.INPUTS),
            command=command_line(),
            progress=lambda row: typer.echo(row, err=True),
        )
        paths = compiled.save(result, out)
    typer.echo(paths[1].read_text(encoding="utf-8"))
    typer.echo("wrote " + ", ".join(map(str, paths)), err=True)
    if broken := [row for row in result["rows"] if row["wrong"]]:
        raise ValueError(f"{len(broken)} of {len(result['rows'])} break a limit: see {paths[1]}")


@bench.command("render")
@command
def bench_render(
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
