"""The one look of all figures: palette, axes, PNG.

Colours are Okabe and Ito's, told apart in every common colour blindness; shapes and line styles
differ as well. Type is sized for a figure shown at half a page's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, SKY, ORANGE, VERMILLION, GREEN = "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73"
PURPLE = "#CC79A7"
INK, GREY, PALE = "#222222", "#6E6E6E", "#DDDDDD"
STYLES = (
    (BLUE, "o", "-"),
    (VERMILLION, "D", "--"),
    (GREEN, "s", "-."),
    (ORANGE, "^", ":"),
    (SKY, "v", "-"),
    (INK, "P", "--"),
    (GREY, "X", "-."),
    (PURPLE, "*", ":"),
)

DPI = 110


def blank(width: float, height: float) -> Figure:
    """A figure of so many inches without axes, and without pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def new_figure(title: str, width: float = 6.4, height: float = 4.2) -> tuple[Figure, Axes]:
    """An empty figure of one panel in the house style."""
    figure = blank(width, height)
    return figure, dress(figure.add_subplot(), title)


def new_panels(
    titles: Sequence[str], width: float = 6.4, height: float = 3.0
) -> tuple[Figure, list[Axes]]:
    """Empty panels one above the other, each `height` high, in the house style."""
    figure = blank(width, height * len(titles) + 0.6)
    panels = figure.subplots(len(titles), squeeze=False)[:, 0]
    return figure, [dress(axes, title) for axes, title in zip(panels, titles, strict=True)]


def dress(axes: Axes, title: str) -> Axes:
    """`axes` in the house style, with its title."""
    axes.set_title(title, fontsize=14, color=INK, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(labelsize=12, colors=INK)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def save_figure(figure: Figure, path: Any) -> None:
    """Write `figure` as PNG, atomically, without a date: the same result gives the same file."""
    from hybrid_sleep.support.io import atomic_path

    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})
