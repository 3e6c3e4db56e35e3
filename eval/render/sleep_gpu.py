"""Tables and figure of `costs.sleep_gpu`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybrid_sleep.eval.costs.sleep_gpu import TARGET, TARGET_SPEEDUP, WAYS
from hybrid_sleep.support.markdown import table
from hybrid_sleep.support.plots import BLUE, INK, ORANGE, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hybrid_sleep.eval.costs.sleep_gpu import GpuDecodeRow, GpuSleepCost, GpuSleepRow


def markdown(result: GpuSleepCost) -> str:
    """Sleeps, one row a model and depth; then single tokens."""
    head = ["state space", "B", "N", "graph, ms", "eager, ms", "N calls, ms", "graph against calls",
            "quartiles", "eager against calls", "path", "capture, ms", "held, MiB",
            "peak of graph / eager / calls, MiB"]  # fmt: skip
    lines = table(head, map(_sleep_cells, result.sleeps), "lr")
    for windows in dict.fromkeys(row.windows for row in result.decoding):
        rows = [row for row in result.decoding if row.windows == windows]
        head = ["state space", "B", "token with an empty past, ms", f"after {windows} windows, ms",
                "ratio", "quartiles"]  # fmt: skip
        lines += ["", *table(head, map(_decode_cells, rows), "lr")]
    if result.target_met is not None:
        verdict = "met" if result.target_met else "**missed**"
        lines += ["", f"Target: a sleep from graphs at least {TARGET_SPEEDUP:g} times as fast as "
                  f"N calls, B={TARGET['batch']}, N={TARGET['passes']}, "
                  f"{TARGET['state_space']}: {verdict}."]  # fmt: skip
    row = result.rows[0]
    lines += [
        "",
        f"Measured on a GPU: d={row.hidden}, {row.layers} layers (three state-space, one "
        f"attention), heads of {row.head_dim}, {row.dtype}, windows of {row.window} tokens, "
        f"{row.vocabulary} words. Medians of rounds in one process, in rotating order. N = 1 only "
        "evicts. A call returns logits for the whole window and a cache. Held: memory that the "
        "graphs keep between sleeps; peak: on top of what is held.",
        *result.footer(),
    ]
    return "\n".join(lines) + "\n"


def _sleep_cells(row: GpuSleepRow) -> list[str | int]:
    graph, eager = row.speedup["graph"], row.speedup["eager"]
    return [
        row.state_space,
        row.batch,
        row.passes,
        *(f"{1000 * row.seconds[name].median:.2f}" for name in WAYS),
        f"**{graph.median:.2f}x**",
        " to ".join(f"{value:.2f}" for value in graph.quartiles),
        f"{eager.median:.2f}x",
        row.path,
        f"{1000 * row.capture_seconds:.0f}",
        _mib(row.held_bytes),
        " / ".join(_mib(row.peak_bytes[name]) for name in WAYS),
    ]


def _decode_cells(row: GpuDecodeRow) -> list[str | int]:
    return [
        row.state_space,
        row.batch,
        *(f"{1000 * row.seconds[name].median:.2f}" for name in ("before", "after")),
        f"**{row.ratio.median:.3f}**",
        " to ".join(f"{value:.3f}" for value in row.ratio.quartiles),
    ]


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.0f}"


def figure(result: GpuSleepCost) -> Figure:
    """How many times as fast as N calls a sleep is, with and without graphs."""
    rows = sorted(
        (row for row in result.sleeps if row.passes > 1),
        key=lambda row: (row.state_space, row.batch, row.passes),
    )
    picture, axes = new_figure("A sleep of depth N against N calls of the model, on a GPU", 9.6)
    for way, colour, marker, shift in (("graph", BLUE, "o", -0.1), ("eager", ORANGE, "^", 0.1)):
        speedups = [row.speedup[way] for row in rows]
        reach = [[abs(s.median - s.quartiles[end]) for s in speedups] for end in (0, 1)]
        axes.errorbar(
            [place + shift for place in range(len(rows))], [s.median for s in speedups],
            yerr=reach, color=colour, marker=marker, markersize=8, linestyle="none",
            label="sleep from CUDA graphs" if way == "graph" else "eager sleep",
        )  # fmt: skip
    axes.axhline(TARGET_SPEEDUP, color=INK, linewidth=1.6, label="target at B=1, N=4")
    names = [f"{row.state_space}\nB={row.batch} N={row.passes}" for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=7)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("times as fast as N calls", fontsize=13)
    picture.legend(fontsize=11, frameon=False, loc="outside lower center", ncols=3)
    return picture
