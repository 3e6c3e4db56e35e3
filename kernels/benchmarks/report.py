"""Results of `fallback`, `suite` and `base` as a table and a figure, made of results.json alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from hybrid_sleep.kernels.benchmarks.ops import OURS
from hybrid_sleep.support import plots
from hybrid_sleep.support.markdown import footer, table

# Colour and marker: ours, the fallback in PyTorch, and a package with kernels of its own.
STYLES = {
    "triton": (plots.BLUE, "o"),
    "chunked": (plots.SKY, "s"),
    "transformers": (plots.ORANGE, "^"),
}
PACKAGE_STYLE = (plots.VERMILLION, "D")
# Of each direction on a CPU: colour, marker, and how far its points are moved aside.
DIRECTIONS = {
    "forward": (plots.BLUE, "o", -0.16),
    "forward + backward": (plots.ORANGE, "^", 0.16),
}


def markdown(result: dict[str, Any]) -> str:
    """The tables of a result of any of the three kinds, with where its numbers come from."""
    return "\n".join([*_PARTS[result["benchmark"]][0](result), *_footer(result)]) + "\n"


def figure(result: dict[str, Any]) -> Any:
    """The figure of a result of any of the three kinds."""
    return _PARTS[result["benchmark"]][1](result)


def _footer(result: dict[str, Any]) -> list[str]:
    record = result["provenance"]
    packages = [f"{name} {version}" for name, version in record.get("packages", {}).items()]
    ended = result.get("ended", "done" if result.get("complete", True) else "interrupted")
    return footer(record, result["command"], ended, "; ".join(packages))


def _shape(row: dict[str, Any]) -> str:
    return " ".join(f"{name}={row[name]}" for name in "BTHd")


def _between(quartiles: Sequence[float], form: str) -> str:
    return " to ".join(format(x, form) for x in quartiles)


def _fallback(result: dict[str, Any]) -> list[str]:
    """The summary of each direction, then one row a shape."""
    lines = table(
        ["", "geometric mean", "least", "target", "reached"],
        [
            [
                direction,
                f"**{summary['geometric_mean']:.2f}x**",
                f"{summary['least']:.2f}x",
                f"{summary['target']:.1f}x, none below 1x",
                "yes" if summary["reached"] else "**no**",
            ]
            for direction, summary in result["summary"].items()
        ],
        align="lrrrl",
    )
    directions = list(result["summary"])
    head = ["T", "B", "H", "d"]
    for direction in directions:
        head += [f"{direction}, ms", "fallback, ms", "speedup", "quartiles"]
    by_shape: dict[tuple, dict[str, dict]] = {}
    for row in result["rows"]:
        by_shape.setdefault(tuple(row[name] for name in "TBHd"), {})[row["direction"]] = row
    rows = []
    for shape, measured in by_shape.items():
        cells = list(map(str, shape))
        for direction in directions:
            cells += _fallback_cells(measured.get(direction))
        rows.append(cells)
    lines += ["", *table(head, rows)]
    if not result["rows"]:
        return [*lines, "", "Nothing was measured."]
    fewest, most = (pick(len(row["ours_seconds"]) for row in result["rows"]) for pick in (min, max))
    return [
        *lines,
        "",
        f"Medians of {fewest} to {most} pairs in one process, in alternating order, float32, with "
        "an initial state and a final one. The results of both, gradients included, differ by at "
        f"most {max(row['error'] for row in result['rows']):.0e}, relatively.",
    ]


def _fallback_cells(row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return [""] * 4
    return [
        f"{1000 * median(row['ours_seconds']):.2f}",
        f"{1000 * median(row['fallback_seconds']):.2f}",
        f"**{row['ratio']:.2f}x**",
        _between(row["quartiles"], ".2f"),
    ]


def _fallback_figure(result: dict[str, Any]) -> Any:
    """The speedup on every shape, both directions, and the line of equal speed."""
    picture, axes = plots.new_figure("Gated delta rule on a CPU against transformers")
    windows = list(dict.fromkeys((row["T"], row["B"]) for row in result["rows"]))
    dims = sorted({row["d"] for row in result["rows"]})
    for direction, summary in result["summary"].items():
        colour, marker, shift = DIRECTIONS[direction]
        rows = [row for row in result["rows"] if row["direction"] == direction]
        places = [
            windows.index((row["T"], row["B"])) + shift + 0.09 * (dims.index(row["d"]) - 1)
            for row in rows
        ]
        axes.plot(
            places, [row["ratio"] for row in rows], color=colour, marker=marker, markersize=7,
            linestyle="none", alpha=0.8,
            label=f"{direction} (geometric mean {summary['geometric_mean']:.1f}x)",
        )  # fmt: skip
    axes.axhline(1, color=plots.INK, linewidth=2)
    axes.set_yscale("log")
    ticks = [1, 2, 4, 8, 16]
    axes.set_yticks(ticks, [f"{tick}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0.8, max([10, *(1.3 * row["ratio"] for row in result["rows"])]))
    axes.set_xticks(range(len(windows)), [f"T = {T}\nB = {B}" for T, B in windows])
    axes.set_ylabel("speedup", fontsize=13)
    heads = sorted({row["H"] for row in result["rows"]})
    axes.set_xlabel(
        f"d = {', '.join(map(str, dims))} from the left, H = {' and '.join(map(str, heads))}",
        fontsize=11,
    )
    if result["summary"]:
        picture.legend(fontsize=11, frameon=False, loc="outside lower center", ncols=1)
    return picture


def _suite(result: dict[str, Any]) -> list[str]:
    rows = []
    for target in result["targets"]:
        ratio = target["ratio"]
        speedup = "not measured" if ratio is None else f"**{ratio:.2f}x**"
        reached = {True: "yes", False: "**no**", None: target["reason"]}[target["reached"]]
        cells = [target["op"], _shape(target), target["direction"], target["baseline"]]
        rows.append([*cells, f"{target['target']}x", speedup, reached])
    head = ["op", "shape", "direction", "against", "target", "speedup", "reached"]
    lines = table(head, rows, align="llllrrl")
    head = [
        "direction",
        "shape",
        "implementation",
        "ms",
        "quartiles",
        "million tokens/s",
        "of the roofline",
        "ours is faster by",
        "why not",
    ]
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        rows = [
            _implementation_cells(row, name)
            for row in result["rows"]
            if row["op"] == op
            for name in row["implementations"]
        ]
        lines += ["", f"**{op}**", "", *table(head, rows, align="lllrrrrrl")]
    return lines + ["", *_explain(result["rows"])]


def _implementation_cells(row: dict[str, Any], name: str) -> list[str]:
    entry = row["implementations"][name]
    first = [row["direction"], _shape(row), name]
    if "median" not in entry:
        wrong = entry["warning"] and f"**wrong here**: {entry['warning']}"
        return [*first, "", "", "", "", "", wrong or entry["reason"] or ""]
    faster = row["speedups"].get(name)
    return [
        *first,
        f"{1000 * entry['median']:.3f}",
        _between([1000 * x for x in entry["quartiles"]], ".3f"),
        f"{entry['tokens_per_second'] / 1e6:.1f}",
        "" if entry["share"] is None else f"{100 * entry['share']:.0f} %",
        f"**{faster['ratio']:.2f}x** ({_between(faster['quartiles'], '.2f')})" if faster else "",
        "",
    ]


def _explain(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["Nothing was measured."]
    dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in rows))
    sentences = [
        f"Medians over calls in one process, in alternating order, {dtypes}, with an initial state "
        "and a final one, after a check against the fp64 reference on the same device. Ours is the "
        f"first of {', '.join(OURS)} that has a figure.",
    ]
    measured = [row["limits"] for row in rows if row["limits"] is not None]
    if measured:
        low, high = (
            {name: pick(limits[name] for limits in measured) for name in ("bandwidth", "rate")}
            for pick in (min, max)
        )
        sentences.append(
            "Each call starts from a cold L2 cache. The roofline is the longer of the least bytes "
            f"at {low['bandwidth'] / 1e12:.2f} to {high['bandwidth'] / 1e12:.2f} TB/s and the "
            f"least flops at {low['rate'] / 1e12:.0f} to {high['rate'] / 1e12:.0f} TFLOP/s, both "
            "measured in these runs."
        )
    else:
        sentences.append("**Measured on a CPU: nothing here says how fast a GPU is.**")
    return [" ".join(sentences)]


def _suite_figure(result: dict[str, Any]) -> Any:
    """Milliseconds of every implementation, over the roofline where there is one."""
    ops = list(dict.fromkeys(row["op"] for row in result["rows"])) or ["nothing measured"]
    kinds = dict.fromkeys(f"{row['dtype']}, d={row['d']}" for row in result["rows"])
    picture, panels = _panels(", ".join([result["provenance"]["device"], *kinds]), ops, 2.9)
    labelled: set[str] = set()
    for axes, op in zip(panels, ops, strict=True):
        rows = [row for row in result["rows"] if row["op"] == op]
        for place, row in enumerate(rows):
            timed = {n: x for n, x in row["implementations"].items() if "median" in x}
            for index, (name, entry) in enumerate(timed.items()):
                colour, marker = STYLES.get(name, PACKAGE_STYLE)
                middle = 1000 * entry["median"]
                low, high = (1000 * x for x in entry["quartiles"])
                axes.errorbar(
                    [place + 0.14 * (index - (len(timed) - 1) / 2)], [middle],
                    yerr=[[middle - low], [high - middle]], color=colour, marker=marker,
                    markersize=6, linestyle="none", label=None if name in labelled else name,
                )  # fmt: skip
                labelled.add(name)
            if row["floor_seconds"] is not None:
                axes.hlines(
                    1000 * row["floor_seconds"], place - 0.35, place + 0.35, color=plots.INK,
                    linewidth=2, label=None if "roofline" in labelled else "roofline",
                )  # fmt: skip
                labelled.add("roofline")
        axes.set_yscale("log")
        axes.set_ylabel("ms", fontsize=11)
        axes.set_xlim(-0.6, max(1, len(rows)) - 0.4)
        labels = []
        for row in rows:
            direction = row["direction"].replace("+ ", "+\n")
            labels.append(f"{direction}\nT={row['T']}\nB={row['B']} H={row['H']}")
        axes.set_xticks(range(len(rows)), labels, fontsize=8)
    if labelled:
        picture.legend(fontsize=10, frameon=False, loc="outside lower center", ncols=4)
    return picture


def _panels(title: str, names: Sequence[str], height: float) -> tuple[Any, list[Any]]:
    picture, panels = plots.new_panels(names, width=7.2, height=height)
    picture.suptitle(title, fontsize=14, color=plots.INK, x=0.01, ha="left")
    for axes in panels:
        axes.tick_params(labelsize=10)
    return picture, panels


def _base(result: dict[str, Any]) -> list[str]:
    rows = []
    for row in result["rows"]:
        first = [row["op"], row["direction"], _shape(row), row["dtype"]]
        if row["reason"]:
            rows.append([*first, "", "", "", "", row["reason"]])
            continue
        ours, before = row["paths"]
        rows.append(
            [
                *first,
                f"{1000 * median(row['seconds']):.3f}",
                f"{1000 * median(row['base_seconds']):.3f}",
                f"**{row['ratio']:.2f}x**",
                _between(row["quartiles"], ".2f"),
                ours if ours == before else f"{ours}, before {before}",
            ]
        )
    head = [
        "op",
        "direction",
        "shape",
        "dtype",
        "now, ms",
        "base, ms",
        "faster by",
        "quartiles",
        "path",
    ]
    return [
        f"This tree against {result['revision']} ({result['provenance']['base'][:12]}).",
        "",
        *table(head, rows, align="llllrrrrl"),
        "",
        "Medians of rounds, each a few calls in either tree, in alternating order, one process a "
        "tree. Above 1 this tree is faster.",
    ]


def _base_figure(result: dict[str, Any]) -> Any:
    """How much faster this tree is, one point a shape, with its quartiles."""
    rows = [row for row in result["rows"] if row["reason"] is None]
    kinds = list(dict.fromkeys((row["op"], row["direction"]) for row in rows))
    title = f"This tree against {result['revision']}"
    picture, (axes,) = _panels(title, [""], 1.6 + 0.5 * max(1, len(kinds)))
    for line, kind in enumerate(kinds):
        points = [row for row in rows if (row["op"], row["direction"]) == kind]
        for index, row in enumerate(points):
            low, high = row["quartiles"]
            axes.errorbar(
                [row["ratio"]], [line + 0.6 * ((index + 0.5) / len(points) - 0.5)],
                xerr=[[row["ratio"] - low], [high - row["ratio"]]], color=plots.BLUE,
                marker="o", markersize=4, linestyle="none", elinewidth=0.8,
            )  # fmt: skip
    axes.axvline(1, color=plots.INK, linewidth=1.6)
    axes.set_yticks(range(len(kinds)), [f"{op}\n{direction}" for op, direction in kinds])
    axes.set_ylim(max(1, len(kinds)) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.grid(axis="x", color=plots.PALE, linewidth=0.8)
    axes.set_xlabel("times faster than the base (points: shapes; bars: quartiles)", fontsize=11)
    return picture


_PARTS: dict[str, tuple[Callable[[dict[str, Any]], list[str]], Callable[[dict[str, Any]], Any]]] = {
    "fallback": (_fallback, _fallback_figure),
    "kernels": (_suite, _suite_figure),
    "base": (_base, _base_figure),
}
