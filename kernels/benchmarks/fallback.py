"""The gated delta rule on a CPU against the PyTorch fallback inside transformers.

    python -m hybrid_sleep.kernels.benchmarks.fallback [--out DIR] [--threads 2] [--repeats 7]

Both get the same normalised q and k and the same initial state, and both return the final state.
They run in turn and in alternating order in one process, so what else the machine does meets both;
every ratio is that of a pair. Writes results.json (with every time), results.md and fallback.png.
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hybrid_sleep.kernels.benchmarks.cases import Shape
from hybrid_sleep.kernels.benchmarks.timing import in_turn, spread
from hybrid_sleep.kernels.gated_delta_rule import gated_delta_rule
from hybrid_sleep.support.io import atomic_path, write_json_atomic, write_text_atomic
from hybrid_sleep.support.provenance import provenance
from hybrid_sleep.support.resume import Budget, finished_rows

LEAST_SECONDS = 1.5
# Speedups to reach, as geometric means over the shapes, slower on none of them.
TARGETS = {"forward": 2.0, "forward + backward": 1.5}

SHAPES = tuple(
    Shape(T, B, H, d)
    for T, B in ((24, 128), (75, 32), (256, 8), (2048, 1))
    for H in (4, 8)
    for d in (32, 64, 128)
)


def run(
    shapes: Sequence[Shape] = SHAPES,
    *,
    repeats: int = 7,
    least_seconds: float = LEAST_SECONDS,
    minutes: float | None = None,
    out: Path | None = None,
    command: str | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Time both sides on every shape, forward and forward + backward.

    At least `repeats` pairs of each, more where that takes less than `least_seconds`. A row's
    `ratio` is the median over its pairs of the fallback's time over ours (above 1: ours is faster),
    `error` the largest difference of any result or gradient, relative to its largest value.

    With `out`, results.json is written there after each shape, and shapes that it has from the same
    commit, code, versions and machine are kept. With `minutes` the work stops before they are over,
    and `complete` is False.

    Raises ValueError when `repeats` is below 2 or `minutes` not above 0.
    """
    if repeats < 2:
        raise ValueError(f"repeats={repeats}: must be at least 2")
    budget = Budget(minutes)
    now = provenance("cpu")
    found: dict[Shape, list[dict[str, Any]]] = {}
    for row in finished_rows(out, "fallback", now):
        found.setdefault(Shape(**{name: row[name] for name in Shape._fields}), []).append(row)

    def result() -> dict[str, Any]:
        rows = [row for shape in shapes for row in found.get(shape, [])]
        return {
            "benchmark": "fallback",
            "complete": all(shape in found for shape in shapes),
            "rows": rows,
            "summary": {direction: _summary(rows, direction) for direction in TARGETS},
            "command": command,
            "provenance": now,
        }

    measured = False
    for shape in shapes:
        if shape in found:
            continue
        if measured and budget.over():
            break
        measured = True
        found[shape] = _measure(shape, repeats, least_seconds)
        if out is not None:
            write_json_atomic(out / "results.json", result())
        if progress is not None:
            for row in found[shape]:
                progress(row)
    return result()


def _measure(shape: Shape, repeats: int, least_seconds: float) -> list[dict[str, Any]]:
    rows = []
    sides = _sides(shape)
    error = max(map(_error, *(both() for both in sides["forward + backward"])))
    for direction, (ours, fallback) in sides.items():
        # One run of each does not count.
        ours()
        fallback()
        seconds = in_turn({"ours": ours, "fallback": fallback}, repeats, least_seconds)
        pairs = zip(seconds["ours"], seconds["fallback"], strict=True)
        ratio, quartiles = spread([b / a for a, b in pairs])
        rows.append(
            {
                **shape._asdict(),
                "direction": direction,
                "ratio": ratio,
                "quartiles": quartiles,
                "error": error,
                "ours_seconds": seconds["ours"],
                "fallback_seconds": seconds["fallback"],
            }
        )
    return rows


def _summary(rows: list[dict[str, Any]], direction: str) -> dict[str, float | bool]:
    ratios = [row["ratio"] for row in rows if row["direction"] == direction]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    target = TARGETS[direction]
    reached = mean >= target and min(ratios) >= 1
    return {"geometric_mean": mean, "least": min(ratios), "target": target, "reached": reached}


def _sides(shape: Shape) -> dict[str, tuple[Callable, Callable]]:
    """For each direction, ours and the fallback, as functions that return what they computed."""
    from transformers.models.qwen3_next import modeling_qwen3_next

    # Under the decorator that would prefer an optional package, if one is installed.
    peer = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)
    T, B, H, d = shape
    drawn = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=drawn)

    inputs = [
        normalize(draw(B, T, H, d), dim=-1),
        normalize(draw(B, T, H, d), dim=-1),
        draw(B, T, H, d),
        -draw(B, T, H).abs() / 2,
        draw(B, T, H).sigmoid(),
        draw(B, H, d, d),
    ]
    slopes = [draw(B, T, H, d), draw(B, H, d, d)]
    inputs = [x.requires_grad_() for x in inputs]

    def ours(q, k, v, g, beta, state):
        return gated_delta_rule(q, k, v, g, beta, initial_state=state)

    def fallback(q, k, v, g, beta, state):
        return peer(q, k, v, g, beta, initial_state=state, output_final_state=True)

    def forward(side: Callable) -> Callable:
        def work():
            with torch.no_grad():
                return side(*inputs)

        return work

    def both_ways(side: Callable) -> Callable:
        def work():
            results = side(*inputs)
            return [*results, *torch.autograd.grad(results, inputs, slopes)]

        return work

    return {
        "forward": (forward(ours), forward(fallback)),
        "forward + backward": (both_ways(ours), both_ways(fallback)),
    }


def _error(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach(), wanted.detach()
    return float((found - wanted).abs().max() / wanted.abs().max())


def markdown(result: dict[str, Any]) -> str:
    """The summary of each direction, then one row a shape."""
    lines = ["| | geometric mean | least | target | reached |", "|---|---:|---:|---:|---|"]
    for direction, summary in result["summary"].items():
        cells = [
            direction,
            f"**{summary['geometric_mean']:.2f}x**",
            f"{summary['least']:.2f}x",
            f"{summary['target']:.1f}x, none below 1x",
            "yes" if summary["reached"] else "**no**",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    directions = list(result["summary"])
    head = ["T", "B", "H", "d"]
    for direction in directions:
        head += [f"{direction}, ms", "fallback, ms", "speedup", "quartiles"]
    lines += ["", f"| {' | '.join(head)} |", "|" + "---:|" * len(head)]
    by_shape: dict[tuple, dict[str, dict]] = {}
    for row in result["rows"]:
        by_shape.setdefault(tuple(row[name] for name in "TBHd"), {})[row["direction"]] = row
    for shape, rows in by_shape.items():
        cells = [str(number) for number in shape]
        for row in (rows[direction] for direction in directions):
            cells += [
                f"{1000 * median(row['ours_seconds']):.2f}",
                f"{1000 * median(row['fallback_seconds']):.2f}",
                f"**{row['ratio']:.2f}x**",
                " to ".join(f"{ratio:.2f}" for ratio in row["quartiles"]),
            ]
        lines.append(f"| {' | '.join(cells)} |")
    fewest, most = (pick(len(row["ours_seconds"]) for row in result["rows"]) for pick in (min, max))
    record = result["provenance"]
    versions = [
        f"{name} {record[name]}" for name in ("hybrid_sleep", "python", "torch", "transformers")
    ]
    lines += [
        "",
        f"Medians of {fewest} to {most} pairs in one process, in alternating order, float32, with "
        "an initial state and a final one. The results of the two sides, gradients included, "
        f"differ by at most {max(row['error'] for row in result['rows']):.0e}, relatively.",
        "",
        f"{'; '.join(versions)}; commit {record['commit']}; {record['device']}, "
        f"{record['threads']} threads; {record['date']}",
    ]
    if not result.get("complete", True):
        lines += ["", "**Incomplete**: the same command goes on where this stopped."]
    if result["command"]:
        lines += ["", f"`{result['command']}`"]
    return "\n".join(lines) + "\n"


def figure(result: dict[str, Any]) -> Any:
    """The speedup on every shape, both directions, over the line of equal speed."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(6.4, 4.2), dpi=200, layout="constrained")
    axes = picture.add_subplot()
    axes.set_title("Gated delta rule on a CPU against transformers", fontsize=14, loc="left")
    windows = list(dict.fromkeys((row["T"], row["B"]) for row in result["rows"]))
    dims = sorted({row["d"] for row in result["rows"]})
    styles = {"forward": ("#0072B2", "o", -0.16), "forward + backward": ("#E69F00", "^", 0.16)}
    for direction, (colour, marker, shift) in styles.items():
        rows = [row for row in result["rows"] if row["direction"] == direction]
        places = [
            windows.index((row["T"], row["B"])) + shift + 0.09 * (dims.index(row["d"]) - 1)
            for row in rows
        ]
        mean = result["summary"][direction]["geometric_mean"]
        axes.plot(
            places, [row["ratio"] for row in rows], color=colour, marker=marker, markersize=7,
            linestyle="none", alpha=0.8, label=f"{direction} (geometric mean {mean:.1f}x)",
        )  # fmt: skip
    axes.axhline(1, color="#222222", linewidth=2)
    axes.set_yscale("log")
    ticks = [1, 2, 4, 8, 16]
    axes.set_yticks(ticks, [f"{tick}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0.8, max(10, 1.3 * max(row["ratio"] for row in result["rows"])))
    axes.set_xticks(range(len(windows)), [f"T = {T}\nB = {B}" for T, B in windows])
    axes.set_ylabel("speedup", fontsize=13)
    heads = sorted({row["H"] for row in result["rows"]})
    axes.set_xlabel(
        f"d = {', '.join(map(str, dims))} from the left, H = {' and '.join(map(str, heads))}",
        fontsize=11,
    )
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    picture.legend(fontsize=11, frameon=False, loc="outside lower center", ncols=1)
    return picture


def save(result: dict[str, Any], out: Path) -> list[Path]:
    """Write results.json, results.md and fallback.png into `out`, each atomically; their paths."""
    paths = [out / "results.json", out / "results.md", out / "fallback.png"]
    write_json_atomic(paths[0], result)
    write_text_atomic(paths[1], markdown(result))
    with atomic_path(paths[2]) as partial:
        figure(result).savefig(partial, format="png", metadata={"Software": None})
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/bench-fallback"))
    parser.add_argument("--threads", type=int, default=2, help="of torch [default: 2]")
    parser.add_argument("--repeats", type=int, default=7, help="pairs at least [default: 7]")
    options = parser.parse_args(arguments)
    for name in ("threads", "repeats"):
        if getattr(options, name) < (least := {"threads": 1, "repeats": 2}[name]):
            parser.error(f"--{name}: must be at least {least}")
    torch.set_num_threads(options.threads)

    def show(row: dict[str, Any]) -> None:
        shape = " ".join(f"{name}={row[name]}" for name in "TBHd")
        print(f"{shape} {row['direction']}: {row['ratio']:.2f}x", file=sys.stderr, flush=True)

    # The folder's name alone where it is absolute: where it lies says nothing about the numbers.
    out = options.out.name if options.out.is_absolute() else options.out
    command = (
        "python -m hybrid_sleep.kernels.benchmarks.fallback "
        f"--threads {options.threads} --repeats {options.repeats} --out {out}"
    )
    result = run(repeats=options.repeats, out=options.out, command=command, progress=show)
    paths = save(result, options.out)
    print(paths[1].read_text(encoding="utf-8"))
    print("wrote", ", ".join(map(str, paths)), file=sys.stderr)


if __name__ == "__main__":
    main()
