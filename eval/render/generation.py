"""Table and figure of `costs.generation`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybrid_sleep.support.markdown import table
from hybrid_sleep.support.plots import BLUE, GREEN, GREY, ORANGE, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hybrid_sleep.eval.costs.generation import GenerationCost

TIMES = {
    "token": "ms per decoding step (median)",
    "sleep": "ms per sleep",
    "total": "ms per token with its share of the sleep",
}
BYTES = {"cache": "cache, bytes", "process": "process, bytes"}


def markdown(result: GenerationCost) -> str:
    """The last window against a first window."""
    last, per_window, ratio = result.windows, result.per_window, result.ratio
    rows = []
    for name, label in TIMES.items():
        first_value, last_value = (1000 * per_window[key][-1] for key in (f"fresh_{name}", name))
        rows.append([label, f"{first_value:.3f}", f"{last_value:.3f}", f"**{ratio[name]:.3f}**"])
    for name, label in BYTES.items():
        ends = (f"{per_window[name][index]:,.0f}" for index in (0, -1))
        rows.append([label, *ends, f"**{ratio[name]:.3f}**"])
    for name, value in result.trend.items():
        rows.append([f"{TIMES[name]}: trend over all windows", "", "", f"{value:.3f}"])
    config = result.config
    lines = [
        *table(["", "first window", f"window {last}", "ratio"], rows, "lr"),
        "",
        f"Allowed: {result.allowed:.2f}. {last} windows of {result.window} tokens, "
        f"{result.passes} passes a sleep, medians of {result.repeats} runs. For times, the first "
        "window is that of a fresh sequence, generated token by token in lockstep with the window "
        f"it is compared with. Batch 1, {config['num_hidden_layers']} layers of "
        f"{config['hidden_size']}, {result.state_space}, random weights.",
        *result.footer(),
    ]
    return "\n".join(lines) + "\n"


def figure(result: GenerationCost) -> Figure:
    """Cost of each window relative to a first window, and what is allowed."""
    picture, axes = new_figure(f"Generating {result.windows} windows: cost of each")
    per_window = result.per_window
    limit = 100 * result.allowed
    axes.axhline(limit, color=GREY, linestyle=(0, (4, 3)), linewidth=1.6)
    lowest, highest = 80.0, 120.0
    for values, label, colour, marker in (
        (per_window["ratio_token"], "seconds per decoding step", BLUE, "o"),
        (per_window["ratio_total"], "seconds per token with its sleep", ORANGE, "^"),
        ([x / per_window["cache"][0] for x in per_window["cache"]], "cache bytes", GREEN, "s"),
    ):
        axes.plot(
            range(1, result.windows + 1), [100 * value for value in values], color=colour,
            marker=marker, markersize=4, linewidth=1.4, label=label,
        )  # fmt: skip
        lowest, highest = min(lowest, 98 * min(values)), max(highest, 102 * max(values))
    axes.set_ylim(lowest, highest)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
    axes.set_xlabel(f"window (dashed: the {limit:.0f} % allowed)", fontsize=13)
    axes.set_ylabel("of a first window", fontsize=13)
    picture.legend(fontsize=11, frameon=False, loc="outside lower center", ncols=2)
    return picture
