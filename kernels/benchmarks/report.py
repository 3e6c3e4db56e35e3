"""Results of `suite` and `base`: results.json, and a table and a figure from it alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybrid_sleep.kernels.benchmarks.contenders import OURS
from hybrid_sleep.support.io import atomic_path, write_json_atomic, write_text_atomic
from hybrid_sleep.support.provenance import describe

FIGURES = {"kernels": "kernels.png", "base": "base.png"}
INK, GREY, PALE = "#222222", "#6E6E6E", "#DDDDDD"
# Colour and marker: ours, the peer with kernels of its own, the fallback in PyTorch.
STYLES = {
    "triton": ("#0072B2", "o"),
    "chunked": ("#56B4E9", "s"),
    "transformers": ("#E69F00", "^"),
}
PEER_STYLE = ("#D55E00", "D")


def save(result: dict[str, Any], out: Path) -> list[Path]:
    """Write results.json, results.md and the figure into `out`, each atomically; their paths."""
    paths = [out / "results.json", out / "results.md", out / FIGURES[result["benchmark"]]]
    write_json_atomic(paths[0], result)
    write_text_atomic(paths[1], markdown(result))
    with atomic_path(paths[2]) as partial:
        figure(result).savefig(partial, format="png", metadata={"Software": None})
    return paths


def markdown(result: dict[str, Any]) -> str:
    """The table of a result of either kind, with what it was measured with."""
    lines = _suite(result) if result["benchmark"] == "kernels" else _base(result)
    if not result["complete"]:
        lines += ["", "**Incomplete**: the same command goes on where this stopped."]
    lines += ["", _where(result["provenance"])]
    if result["command"]:
        lines += ["", f"`{result['command']}`"]
    return "\n".join(lines) + "\n"


def figure(result: dict[str, Any]) -> Any:
    """The figure of a result of either kind."""
    return _suite_figure(result) if result["benchmark"] == "kernels" else _base_figure(result)


def _where(record: dict[str, Any]) -> str:
    packages = [f"{name} {version}" for name, version in record["packages"].items()]
    return "; ".join([describe(record), *packages, f"code {record['source']}"])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Markdown; the first `left` columns and the last are text, the rest numbers."""
    ruler = ["---"] * left + ["---:"] * (len(head) - left - 1) + ["---"]
    return [f"| {' | '.join(cells)} |" for cells in (head, ruler, *rows)]


def _shape(row: dict[str, Any]) -> str:
    return " ".join(f"{name}={row[name]}" for name in "BTHd")


def _between(quartiles: Sequence[float], form: str) -> str:
    return " to ".join(format(x, form) for x in quartiles)


def _suite(result: dict[str, Any]) -> list[str]:
    rows = []
    for target in result["targets"]:
        ratio = target["ratio"]
        said = "not measured" if ratio is None else f"**{ratio:.2f}x**"
        reached = {True: "yes", False: "**no**", None: target["reason"]}[target["reached"]]
        cells = [target["op"], _shape(target), target["direction"], target["peer"]]
        rows.append([*cells, f"{target['target']}x", said, reached])
    head = ["op", "shape", "direction", "against", "target", "speedup", "reached"]
    lines = _table(head, rows, left=4)
    head = [
        "direction",
        "shape",
        "contender",
        "ms",
        "quartiles",
        "million tokens/s",
        "of the roofline",
        "ours is faster by",
        "why not",
    ]
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        rows = [
            _contender(row, name)
            for row in result["rows"]
            if row["op"] == op
            for name in row["contenders"]
        ]
        lines += ["", f"**{op}**", "", *_table(head, rows, left=3)]
    return lines + ["", *_explain(result["rows"])]


def _contender(row: dict[str, Any], name: str) -> list[str]:
    entry = row["contenders"][name]
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
    said = [
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
        said.append(
            "Each call starts from a cold L2 cache. The roofline is the longer of the least bytes "
            f"at {low['bandwidth'] / 1e12:.2f} to {high['bandwidth'] / 1e12:.2f} TB/s and the "
            f"least flops at {low['rate'] / 1e12:.0f} to {high['rate'] / 1e12:.0f} TFLOP/s, both "
            "measured in these runs."
        )
    else:
        said.append("**Measured on a CPU: nothing here says how fast a GPU is.**")
    return [" ".join(said)]


def _base(result: dict[str, Any]) -> list[str]:
    rows = []
    for row in result["rows"]:
        first = [row["op"], row["direction"], _shape(row), row["dtype"]]
        if row["reason"]:
            rows.append([*first, "", "", "", "", row["reason"]])
            continue
        here, there = (sorted(row[name]) for name in ("seconds", "base_seconds"))
        ours, before = row["paths"]
        rows.append(
            [
                *first,
                f"{1000 * here[len(here) // 2]:.3f}",
                f"{1000 * there[len(there) // 2]:.3f}",
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
        *_table(head, rows, left=4),
        "",
        "Medians of rounds, each a few calls of either side, in alternating order, one process a "
        "side. Above 1 this tree is faster.",
    ]


def _new_figure(title: str, panels: int, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    picture = Figure(figsize=(7.2, height * panels + 1.0), dpi=200, layout="constrained")
    picture.suptitle(title, fontsize=14, color=INK, x=0.01, ha="left")
    found = list(picture.subplots(panels, 1, squeeze=False)[:, 0])
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(labelsize=10, colors=INK)
        axes.set_axisbelow(True)
    return picture, found


def _suite_figure(result: dict[str, Any]) -> Any:
    """Milliseconds of every contender, over the roofline where there is one."""
    ops = list(dict.fromkeys(row["op"] for row in result["rows"])) or ["nothing measured"]
    kinds = dict.fromkeys(f"{row['dtype']}, d={row['d']}" for row in result["rows"])
    title = ", ".join([result["provenance"]["device"], *kinds])
    picture, panels = _new_figure(title, len(ops), 2.9)
    labelled: set[str] = set()
    for axes, op in zip(panels, ops, strict=True):
        rows = [row for row in result["rows"] if row["op"] == op]
        for place, row in enumerate(rows):
            timed = {n: x for n, x in row["contenders"].items() if "median" in x}
            for index, (name, entry) in enumerate(timed.items()):
                colour, marker = STYLES.get(name, PEER_STYLE)
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
                    1000 * row["floor_seconds"], place - 0.35, place + 0.35, color=INK,
                    linewidth=2, label=None if "roofline" in labelled else "roofline",
                )  # fmt: skip
                labelled.add("roofline")
        axes.set_title(op, fontsize=12, color=INK, loc="left")
        axes.set_yscale("log")
        axes.set_ylabel("ms", fontsize=11)
        axes.set_xlim(-0.6, max(1, len(rows)) - 0.4)
        axes.grid(axis="y", color=PALE, linewidth=0.8)
        labels = []
        for row in rows:
            direction = row["direction"].replace("+ ", "+\n")
            labels.append(f"{direction}\nT={row['T']}\nB={row['B']} H={row['H']}")
        axes.set_xticks(range(len(rows)), labels, fontsize=8)
    if labelled:
        picture.legend(fontsize=10, frameon=False, loc="outside lower center", ncols=4)
    return picture


def _base_figure(result: dict[str, Any]) -> Any:
    """How much faster this tree is, one point a shape, with its quartiles."""
    rows = [row for row in result["rows"] if row["reason"] is None]
    kinds = list(dict.fromkeys((row["op"], row["direction"]) for row in rows))
    picture, (axes,) = _new_figure(
        f"This tree against {result['revision']}", 1, 1.2 + 0.5 * max(1, len(kinds))
    )
    for line, kind in enumerate(kinds):
        points = [row for row in rows if (row["op"], row["direction"]) == kind]
        for index, row in enumerate(points):
            low, high = row["quartiles"]
            axes.errorbar(
                [row["ratio"]], [line + 0.6 * ((index + 0.5) / len(points) - 0.5)],
                xerr=[[row["ratio"] - low], [high - row["ratio"]]], color=STYLES["triton"][0],
                marker="o", markersize=4, linestyle="none", elinewidth=0.8,
            )  # fmt: skip
    axes.axvline(1, color=INK, linewidth=1.6)
    axes.set_yticks(range(len(kinds)), [f"{op}\n{direction}" for op, direction in kinds])
    axes.set_ylim(max(1, len(kinds)) - 0.5, -0.5)
    axes.grid(axis="x", color=PALE, linewidth=0.8)
    axes.set_xlabel("times faster than the base (points: shapes; bars: quartiles)", fontsize=11)
    return picture
