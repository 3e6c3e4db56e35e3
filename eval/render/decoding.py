"""Table and figure of `costs.decoding`."""

from __future__ import annotations

from math import floor, log10, nan
from typing import TYPE_CHECKING

from hybrid_sleep.eval.costs.decoding import REFERENCE, TURN
from hybrid_sleep.support.markdown import table
from hybrid_sleep.support.plots import BLUE, GREY, ORANGE, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hybrid_sleep.eval.costs.decoding import DecodingCost, DecodingRow


def markdown(result: DecodingCost) -> str:
    """One row a batch, past and model."""
    head = ["rows", "windows before", "model", "ms per token", "quartiles", "tokens/s",
            "reference is faster by", "prompt, s", "3 tokens more, s", "cache, bytes"]  # fmt: skip
    cells, broken = [], []
    for row in result.rows:
        for name, cost in row.costs.items():
            if cost.token is None or cost.ratio is None:
                broken.append(f"{name} with {row.batch} rows {cost.path}")
                continue
            low, high = (1000 * x for x in cost.token.quartiles)
            cells.append([
                row.batch, row.windows, name,
                f"{1000 * cost.token.median:.2f}", f"{low:.2f} to {high:.2f}",
                f"{row.batch / cost.token.median:,.0f}",
                "" if name == REFERENCE else f"**{cost.ratio.median:.2f}x**",
                f"{cost.prompt_seconds:.2f}", f"{cost.first_seconds:.1f}",
                f"{cost.cache_bytes:,}",
            ])  # fmt: skip
    sizes = ", ".join(f"{name} {count:,}" for name, count in result.parameters.items())
    lines = [
        *table(head, cells, "rrlr"),
        "",
        f"Reference: {REFERENCE}. {result.repeats} tokens each, {TURN} in turn; medians, and the "
        f"median of the ratios token by token. {result.layers} layers of {result.hidden}, windows "
        f"of {result.window} tokens, N = {result.passes}; parameters: {sizes}; random weights. "
        "transformers' models keep the whole past. A token is a forward pass over the cache and "
        "the argmax of its logits; what is compiled is compiled in the first tokens behind the "
        "prompt.",
        *([""] if broken else []),
        *(f"- {line}." for line in broken),
        *result.footer(),
    ]
    return "\n".join(lines) + "\n"


def figure(result: DecodingCost) -> Figure:
    """Milliseconds per token of each model, by batch and past."""
    picture, axes = new_figure("One more token")
    names = list(dict.fromkeys(name for row in result.rows for name in row.costs))
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        times = [_milliseconds(row, name) for row in result.rows]
        own = name.startswith("hybrid_sleep")
        colour = BLUE if own else (ORANGE if name.startswith("olmo") else GREY)
        axes.bar(
            [i + (place - (len(names) - 1) / 2) * width for i in range(len(times))], times,
            width=0.9 * width, color=colour, alpha=1.0 if "compiled" in name else 0.55, label=name,
        )  # fmt: skip
    axes.set_yscale("log")
    least = min(x for row in result.rows for name in names if (x := _milliseconds(row, name)) > 0)
    axes.set_ylim(bottom=10 ** floor(log10(least)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xticks(range(len(result.rows)), [_label(row) for row in result.rows])
    axes.set_ylabel("ms per token", fontsize=13)
    picture.legend(fontsize=10, frameon=False, loc="outside lower center", ncols=2)
    return picture


def _milliseconds(row: DecodingRow, name: str) -> float:
    cost = row.costs.get(name)
    return nan if cost is None or cost.token is None else 1000 * cost.token.median


def _label(row: DecodingRow) -> str:
    rows = f"{row.batch} row{'s' * (row.batch > 1)}"
    return f"{rows}\n" + (f"after {row.windows}\nwindows" if row.windows else "no past")
