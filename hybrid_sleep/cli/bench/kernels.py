"""`hybrid-sleep bench kernels` and `compiled`: the ops by themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from hybrid_sleep.cli.commands import CONTINUES, command, command_line, show
from hybrid_sleep.cli.options import Device, Minutes, Out, Repeats
from hybrid_sleep.support.io import sole_writer


@command
def kernels(
    ops: Annotated[
        str | None,
        typer.Option(metavar="OP,OP", help="Default: gated_delta_rule on a CPU, all on a GPU."),
    ] = None,
    device: Device = "cpu",
    base: Annotated[
        str | None,
        typer.Option(
            metavar="REV", help="Compare with this commit instead of other implementations."
        ),
    ] = None,
    repeats: Repeats = 7,
    minutes: Minutes = None,
    out: Out = None,
) -> None:
    """Time of the kernels beside that of other implementations of the same ops.

    On a CPU the gated delta rule beside the fallback inside transformers; on a GPU every op beside
    every implementation that is installed, and its share of the roofline. What an earlier call
    finished in the folder, with the same code, versions and device, is kept.
    """
    import torch

    from hybrid_sleep.kernels.benchmarks import base as comparison
    from hybrid_sleep.kernels.benchmarks import fallback, suite
    from hybrid_sleep.kernels.benchmarks.ops import chosen as chosen_ops
    from hybrid_sleep.support.progress import progress_bar
    from hybrid_sleep.support.provenance import check_device

    kind = torch.device(check_device(device)).type
    chosen = chosen_ops(ops or ("gated_delta_rule" if kind == "cpu" else None))
    if kind == "cpu" and base is None and ops not in (None, "gated_delta_rule"):
        raise ValueError(f"ops must be gated_delta_rule on a CPU without --base, got {ops!r}")
    suffixes = ["" if kind == "cpu" else f"-{kind}", "-base" if base else ""]
    out = out or Path("out") / "".join(["bench-kernels", *suffixes])
    run: Callable[..., dict[str, Any]]
    if base is not None:
        shapes = fallback.SHAPES if kind == "cpu" else None
        run = partial(comparison.run, base, chosen, device=device, shapes=shapes)
    elif kind == "cpu":
        run = fallback.run
    else:
        run = partial(suite.run, chosen, device=device)
    measured = 0
    with sole_writer(out):
        with progress_bar("kernels") as progress:

            def step(done: int, total: int) -> None:
                nonlocal measured
                measured += 1
                progress(done, total)

            try:
                result = run(
                    repeats=repeats,
                    minutes=minutes,
                    out=out,
                    command=command_line(),
                    progress=step,
                )
            except KeyboardInterrupt:
                kept = f"{out / 'results.json'} holds what was finished; the same call continues"
                raise KeyboardInterrupt(kept if measured else "nothing was finished") from None
        show(result, out)
    if not result["complete"]:
        typer.echo(CONTINUES, err=True)
    elif not measured:
        file = out / "results.json"
        typer.echo(f"everything was there already; remove {file} to measure again", err=True)


@command
def compiled(
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="OP", help="Default: all of them.")
    ] = None,
    out: Out = None,
) -> None:
    """What the Triton kernels compile to for compute capability 9.0, without a GPU."""
    from hybrid_sleep.kernels.benchmarks import compiled as compilation

    out = out or Path("out/bench-compiled")
    with sole_writer(out):
        result = compilation.run(
            ops or tuple(compilation.INPUTS),
            command=command_line(),
            progress=lambda row: typer.echo(row, err=True),
        )
        paths = compilation.save(result, out)
    typer.echo(paths[1].read_text(encoding="utf-8"))
    typer.echo("wrote " + ", ".join(map(str, paths)), err=True)
    if broken := [row for row in result["rows"] if row["wrong"]]:
        raise ValueError(f"{len(broken)} of {len(result['rows'])} break a limit: see {paths[1]}")
