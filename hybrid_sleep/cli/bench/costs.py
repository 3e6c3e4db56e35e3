"""`hybrid-sleep bench generation`, `decoding`, `sleep`, `cost` and `train`: time and memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from hybrid_sleep.cli.commands import command, measure
from hybrid_sleep.cli.options import Depths, Device, Minutes, Out, Repeats
from hybrid_sleep.support.lists import parse_counts


@command
def generation(
    windows: Annotated[int, typer.Option(help="Windows to generate.")] = 64,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 64,
    passes: Annotated[int, typer.Option(help="Passes of each sleep.")] = 4,
    repeats: Repeats = 5,
    state_space: Annotated[str, typer.Option(help="gated_deltanet or mamba2.")] = "gated_deltanet",
    device: Device = "cpu",
    out: Out = None,
) -> None:
    """Seconds per token and memory of the last generated window against the first."""
    from hybrid_sleep.eval.costs import generation

    def run(out: Path, **given: Any) -> Any:
        return generation.run(**given)

    measure(
        "generation",
        run,
        out,
        windows=windows,
        window=window,
        passes=passes,
        repeats=repeats,
        state_space=state_space,
        device=device,
    )


@command
def decoding(
    batches: Annotated[str, typer.Option(metavar="N,N", help="Rows decoded together.")] = "1,8",
    windows: Annotated[
        str, typer.Option(metavar="N,N", help="Full windows in the past, such as 0,64.")
    ] = "0,64",
    hidden: Annotated[int, typer.Option(help="Width of the models.")] = 256,
    layers: Annotated[int, typer.Option(help="Layers of the models.")] = 8,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 128,
    passes: Annotated[int, typer.Option(help="Passes of each sleep.")] = 2,
    repeats: Annotated[int, typer.Option(help="Timed tokens of each case.")] = 64,
    device: Device = "cpu",
    minutes: Minutes = None,
    out: Out = None,
) -> None:
    """Milliseconds per token, compiled and not, beside transformers' hybrids of the same dims.

    Before and after many windows; all take their tokens in turn. What an earlier call finished
    in the folder, with the same code, versions and device, is kept.
    """
    from hybrid_sleep.eval.costs import decoding

    _measure(
        "decoding", decoding.run, out, repeats=repeats, device=device, minutes=minutes,
        batches=parse_counts("batches", batches),
        windows=parse_counts("windows", windows, minimum=0),
        hidden=hidden, layers=layers, window=window, passes=passes,
    )  # fmt: skip


@command
def sleep(
    repeats: Repeats = 9,
    device: Device = "cpu",
    minutes: Minutes = None,
    out: Out = None,
) -> None:
    """Time of one sleep of depth N compared with N calls of the model, over window shapes.

    On a CUDA device: sleeps from CUDA graphs, eager ones and calls, and single tokens before and
    after 64 windows. What an earlier call finished in the folder, with the same code, versions and
    device, is kept.
    """
    from hybrid_sleep.eval.costs import sleep_cpu, sleep_gpu

    run = sleep_gpu.run if device.startswith("cuda") else sleep_cpu.run
    _measure("sleep", run, out, repeats=repeats, device=device, minutes=minutes)


@command
def cost(
    model: Annotated[
        Path | None, typer.Option(help="A trained model (default: an untrained one).")
    ] = None,
    depo: Annotated[
        Path | None, typer.Option(help="A model trained on Depo: many questions about one past.")
    ] = None,
    hidden: Annotated[int | None, typer.Option(help="Width of the untrained model.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the untrained model.")] = None,
    window: Annotated[int | None, typer.Option(help="Window of the untrained model.")] = None,
    state_space: Annotated[
        str | None, typer.Option(help="gated_deltanet or mamba2, of the untrained model.")
    ] = None,
    depths: Depths = "1,2,4,8",
    windows: Annotated[
        str, typer.Option(metavar="N,N", help="Windows in the past, such as 1,8,64.")
    ] = "1,8,64",
    question: Annotated[
        int | None, typer.Option(help="Tokens of a question (default: a quarter of the window).")
    ] = None,
    answer: Annotated[
        int | None, typer.Option(help="Tokens of an answer (default: a quarter of the window).")
    ] = None,
    cycles: Annotated[int, typer.Option(help="Cycles of Depo.")] = 50,
    repeats: Repeats = 5,
    device: Device = "cpu",
    minutes: Minutes = None,
    out: Out = None,
) -> None:
    """Time, FLOPs and bytes of sleeps, and from how many questions on one costs less.

    Sleeps by depth; decoding after consolidated windows and with a KV cache that keeps all of them;
    with --depo, many questions answered from the saved fast weights of one sleep. What an earlier
    call finished in the folder, with the same code, versions and device, is kept.
    """
    from hybrid_sleep.eval.costs import cost

    given = {"hidden": hidden, "layers": layers, "window": window, "state_space": state_space}
    _measure(
        "cost",
        cost.run,
        out,
        model=model,
        sizes={name: value for name, value in given.items() if value is not None},
        depo=depo,
        depths=parse_counts("depths", depths),
        windows=parse_counts("windows", windows),
        question=question,
        answer=answer,
        cycles=cycles,
        repeats=repeats,
        device=device,
        minutes=minutes,
    )


@command
def train(
    repeats: Repeats = 5,
    device: Device = "cpu",
    minutes: Minutes = None,
    out: Out = None,
) -> None:
    """Tokens per second and peak memory of a training step, by depth, windows and recomputation.

    Each kind of activation checkpointing and truncation is timed in pairs with keeping everything.
    What an earlier call finished in the folder, with the same code, versions and device, is kept.
    """
    from hybrid_sleep.eval.costs import training

    _measure("train", training.run, out, repeats=repeats, device=device, minutes=minutes)


def _measure(
    name: str,
    run: Callable[..., Any],
    out: Path | None,
    *,
    repeats: int,
    device: str,
    minutes: float | None,
    **given: Any,
) -> None:
    """`measure` with a `run` that takes a `Call` first."""
    from hybrid_sleep.eval.costs.call import Call

    def called(**how: Any) -> Any:
        return run(Call(repeats=repeats, minutes=minutes, **how), **given)

    measure(name, called, out, device=device)
