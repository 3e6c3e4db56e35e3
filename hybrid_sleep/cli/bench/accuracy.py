"""`hybrid-sleep bench depth`, `map` and `ablate`: accuracy of models, compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from hybrid_sleep.cli.commands import command, command_line, measure, report
from hybrid_sleep.cli.options import Config, Count, Depths, Jobs, Minutes, Out, Overrides, Seeds
from hybrid_sleep.support.io import sole_writer
from hybrid_sleep.support.lists import parse_counts, parse_multiples, parse_names

CONFIG_SUFFIXES = (".yaml", ".yml")
ABLATIONS = (
    "state_space, eviction, loop, schedule, attention, depth, difficulty, forgetting, adaptive"
)


@command
def depth(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT... | CONFIG [KEY=VALUE]...",
            help="Trained models (several are taken as seeds of one recipe), or a run's YAML file.",
        ),
    ],
    depths: Annotated[
        str | None,
        typer.Option(
            metavar="N,N",
            help="Sleep depths, such as 1-8 or 1,2,4 (default: 1-8; of a CONFIG, up to its own).",
        ),
    ] = None,
    count: Count = 2000,
    out: Out = None,
    seed: Annotated[
        int | None, typer.Option(help="CHECKPOINT: which test examples (default: 0).")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="CHECKPOINT: examples in one forward (default: 250).")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="CHECKPOINT: a torch device (default: cpu).")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="CHECKPOINT: results.json of a model trained at one depth, to compare."),
    ] = None,
    gradients: Annotated[
        bool | None,
        typer.Option("--gradients", help="CHECKPOINT: also how large they are at each pass."),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="N,N", help="CONFIG: seeds, at least three (default: 0,1,2)."),
    ] = None,
    baselines: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME",
            help="CONFIG: all, none or some of once, repeated, h_carried, S_carried, untied, "
            "deeper, wider, looped, full_cache (default: all).",
        ),
    ] = None,
    ablate: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME",
            help=f"CONFIG: all, none or some of {ABLATIONS} (default: none).",
        ),
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(
            metavar="X,X",
            help="CONFIG: multiples of its learning rates, such as 0.5,1,2, of which every model "
            "gets the best on validation examples (default: all have the config's).",
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="CONFIG: trainings at the same time (default: 1).")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="CONFIG: stop before so many are over; the same call continues."),
    ] = None,
) -> None:
    """Accuracy and cost by sleep depth and difficulty, with floor, chance and intervals.

    Of trained models, on the task of the run.yaml beside their weights. Or of a run's YAML file:
    the run and every baseline are trained with each seed, at equal compute and at equal tokens. The
    baselines sleep once (N = 1) and train for longer, see each window N times, have more layers,
    are wider, loop their layers in decoding, or keep the whole KV cache; or they sleep as deep, but
    hand on hidden states or fast weights alone.
    """
    of_models = {"seed": seed, "batch_size": batch_size, "device": device, "baseline": baseline,
                 "gradients": gradients}  # fmt: skip
    of_config = {
        "seeds": seeds,
        "baselines": baselines,
        "ablate": ablate,
        "rates": rates,
        "jobs": jobs,
        "minutes": minutes,
    }
    from_config = Path(source[0]).suffix in CONFIG_SUFFIXES
    for name, value in (of_models if from_config else of_config).items():
        if value is not None:
            kind = "trained models" if from_config else "a run's YAML file"
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must come with {kind}, got {value} with {source[0]!r}")
    if from_config:
        from hybrid_sleep.eval.studies import comparison
        from hybrid_sleep.eval.studies.baselines import BASELINES

        call = {"config": source[0], "overrides": source[1:], "count": count, "minutes": minutes}
        call["seeds"] = "0,1,2" if seeds is None else seeds
        call["jobs"] = 1 if jobs is None else jobs
        _study(
            "depth",
            comparison.run,
            out,
            call,
            depths=None if depths is None else parse_counts("depths", depths),
            baselines=parse_names("baselines", baselines or "all", tuple(BASELINES)),
            ablations=_ablations(ablate or "none"),
            rates=[] if rates is None else parse_multiples("rates", rates),
        )
    else:
        from hybrid_sleep.eval.measure.checkpoints import bench_checkpoints

        levels = parse_counts("depths", "1-8" if depths is None else depths)
        given: dict[str, Any] = {k: v for k, v in of_models.items() if v is not None}
        out = out or Path("out/bench-depth")
        with sole_writer(out):
            result = bench_checkpoints(source, levels, count=count, command=command_line(), **given)
            report(result, out)


@command
def depth_map(
    config: Config,
    overrides: Overrides = None,
    vary: Annotated[
        str, typer.Option(metavar="KEY=[VALUE,...]", help="What makes the task harder.")
    ] = "task.params.steps=[2,4,6]",
    depths: Depths = "1,2,4",
    compute: Annotated[
        str,
        typer.Option(metavar="X,X", help="Multiples of the FLOPs that the config's own run takes."),
    ] = "1,3",
    seeds: Seeds = "0,1,2",
    count: Count = 2000,
    jobs: Jobs = 1,
    minutes: Minutes = None,
    out: Out = None,
) -> None:
    """Where depth wins: difficulty x sleep depth x compute, one model trained for each.

    Models of one compute take the same FLOPs to train; parameters and the cost of decoding a token
    are the same for all. Results in the folder from the same code are kept.
    """
    from hybrid_sleep.eval.studies import depth_map

    call = {"config": config, "overrides": overrides or [], "seeds": seeds, "count": count,
            "jobs": jobs, "minutes": minutes}  # fmt: skip
    _study(
        "map",
        depth_map.run,
        out,
        call,
        vary=vary,
        depths=parse_counts("depths", depths),
        compute=parse_multiples("compute", compute),
    )


@command
def ablate(
    config: Config,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to all; {seed} is the seed."),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:KEY=VALUE,...", help="The others are compared with the first one."
        ),
    ] = None,
    ablate: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME",
            help=f"Decisions to change one at a time: all or some of {ABLATIONS} (default: all, or "
            "none with --variant).",
        ),
    ] = None,
    seeds: Seeds = "0,1,2",
    depths: Depths = "1-4",
    count: Count = 2000,
    jobs: Jobs = 1,
    minutes: Minutes = None,
    out: Out = None,
) -> None:
    """Train variants of a run with several seeds: accuracy by sleep depth, seed against seed.

    Models go to output_dir/NAME/seedSEED. Results in the folder from the same code are kept.
    """
    from hybrid_sleep.eval.studies import comparison
    from hybrid_sleep.eval.studies.variants import parse_variants

    call = {"config": config, "overrides": overrides or [], "seeds": seeds, "count": count,
            "jobs": jobs, "minutes": minutes}  # fmt: skip
    _study(
        "ablate",
        comparison.run,
        out,
        call,
        depths=parse_counts("depths", depths),
        ablations=_ablations(ablate or ("none" if variant else "all")),
        variants=parse_variants(variant) if variant else None,
    )


def _ablations(text: str) -> list[str] | str:
    """Names from text; of "all" a study leaves out those that would change nothing."""
    from hybrid_sleep.eval.studies.comparison import ABLATION_NAMES

    return text if text == "all" else parse_names("ablations", text, ABLATION_NAMES)


def _study(
    name: str,
    study: Callable[..., Any],
    out: Path | None,
    call: dict[str, Any],
    **given: Any,
) -> None:
    """Run a study of trials with what is given, and report its result."""
    from hybrid_sleep.eval.trials import Call

    call["seeds"] = parse_counts("seeds", call["seeds"], minimum=0)

    def run(**how: Any) -> Any:
        return study(Call(**call, **how), **given)

    measure(name, run, out)
