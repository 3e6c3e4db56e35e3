"""A run and what it is compared with: tables, words and a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval.measure.statistics import Gap, Seeds, best_depth
from hybrid_sleep.eval.render.lines import seeds_line
from hybrid_sleep.support.markdown import table
from hybrid_sleep.support.plots import GREY, new_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hybrid_sleep.eval.studies.comparison import Comparison

EQUAL = {"compute": "compute", "tokens": "tokens", "both": "compute, tokens", None: ""}


def words(result: Comparison) -> list[str]:
    """What the seeds say about the reference against each variant, as it is."""
    reference, lines = result.reference, []
    for variant in result.measured:
        gap = result.ahead(variant)
        if variant is reference or gap is None:
            continue
        equal = EQUAL[variant.equal].replace(", ", " and ")
        line = (
            (f"At equal {equal}: " if equal else "")
            + f"{reference.name} (evaluated at N = {reference.compared_at}) is "
            + _distance(gap, variant.label)
        )
        hardest = list(result.questions)[-1]
        for kind in (None, *result.kinds) if len(result.questions) > 1 else ():
            on_it = result.ahead(variant, hardest, kind)
            assert on_it is not None
            where = f"{result.task.difficulty} = {hardest}" if kind is None else f"{kind} there"
            line += f"; on {where} {_distance(on_it, 'it')}"
        lines.append(f"{line}.")
    return lines


def _distance(gap: Gap, other: str) -> str:
    if gap.small:
        verdict = "so no difference"
    elif gap.agreed:
        verdict = "with every seed"
    else:
        verdict = "but the seeds do not agree"
    side = "ahead of" if gap.mean >= 0 else "behind"
    return (
        f"{abs(gap.mean):.3f} {side} {other} ({gap.lowest:+.3f} to {gap.highest:+.3f}, seed by "
        f"seed), {verdict}"
    )


def markdown(result: Comparison) -> str:
    """The models and their cost, accuracy by difficulty and by depth, and where it came from."""
    if not result.trials(result.reference.name):
        return f"Not complete ({result.ended}): {result.reference.label} has not been measured.\n"
    task, seeds = result.task, ", ".join(map(str, result.seeds))
    overrides = f" with {', '.join(result.overrides)}" if result.overrides else ""
    lines = [
        *_models(result),
        "",
        f"Accuracy: share of questions, mean over seeds {seeds} with its 95 % interval (Student's "
        f"t), each model evaluated at the N in brackets. Floor (the best guess without memory of "
        f"the past): {result.floor:.3f}; chance: {task.chance:.3f}.{_cost_words(result)}",
        "",
        *(line for kind in (None, *result.kinds) for line in _by_difficulty(result, kind)),
        *_by_depth(result),
        "",
        f"Task: {task}; {result.examples} {result.split} examples of each model. Config: "
        f"{result.config}{overrides}. Steps and {result.clock} seconds are of one training, "
        "all its stages.",
        "",
        *(f"- {line}" for line in words(result)),
        *_auto(result),
        *_changes(result),
        *_rates(result),
    ]
    if result.left_out:
        lines += ["", *(f"- Left out: {reason}." for reason in result.left_out.values())]
    return "\n".join([*lines, *result.footer()]) + "\n"


def _shown(seeds: Seeds) -> str:
    if seeds.interval is None:
        return f"{seeds.mean:.3f}"
    low, high = seeds.interval
    return f"{seeds.mean:.3f} [{low:.3f}, {high:.3f}]"


def _models(result: Comparison) -> list[str]:
    own = result.cost(result.reference)
    costs = {variant.name: result.cost(variant) for variant in result.measured}
    counted = own is not None and all(costs.values())
    equal = any(variant.equal for variant in result.measured)
    head = ["model", *["equal"] * equal, "steps", f"{result.clock} s"]
    head += ["compute", "parameters", "decoding", "memory"] if counted else []
    rows = []
    for variant in result.measured:
        cost, at = costs[variant.name], variant.compared_at
        cells = [variant.label, *[EQUAL[variant.equal]] * equal]
        cells += [f"{result.steps(variant):,.0f}", f"{result.seconds(variant):.0f}"]
        if counted and own and cost:
            cells += [
                f"{cost['training_flops'] / own['training_flops']:.2f}x",
                f"{cost['parameters']:,.0f}",
                f"{cost['wake_flops'] / own['wake_flops']:.2f}x",
                f"{cost['memory_bytes'] / own['memory_bytes']:.2f}x",
            ]
        rows.append([*cells, f"{_shown(result.shares(variant, at))} (N = {at})"])
    return table([*head, "accuracy"], rows, "llr" if equal else "lr")


def _cost_words(result: Comparison) -> str:
    cost = result.cost(result.reference)
    if cost is None:
        return ""
    return (
        " Compute: FLOPs of training; decoding: FLOPs of one more token after the past; memory: "
        f"bytes held then; all relative to {result.reference.label}: {cost['training_flops']:.3g}, "
        f"{cost['wake_flops']:,.0f} and {cost['memory_bytes']:,.0f}."
    )


def _by_difficulty(result: Comparison, kind: str | None) -> list[str]:
    """A row for each variant; of one kind of questions, or of all."""
    levels = list(result.questions)
    if len(levels) < 2:
        return []
    rows = []
    for variant in result.measured:
        equal = f" ({EQUAL[variant.equal]})" if variant.role == "baseline" else ""
        shares = [result.shares(variant, variant.compared_at, level, kind) for level in levels]
        rows.append([variant.label + equal, *(f"{share.mean:.3f}" for share in shares)])
        if kind is None and (tied := result.tied(variant)):
            cells = [f"{tied[level].mean:.3f}" for level in levels]
            rows.append([f"{variant.label}, each at its own N", *cells])
    if kind is None:
        rows.append(["floor", *(f"{result.task.floor[level]:.3f}" for level in levels)])
    of = "" if kind is None else f", {kind}"
    head = [f"accuracy by {result.task.difficulty}{of}", *map(str, levels)]
    return [*table(head, rows, "lr"), ""]


def _by_depth(result: Comparison) -> list[str]:
    """A row for each variant that was measured at the reference's depths, the best in bold."""
    reference = result.reference
    depths, levels = reference.depths, list(result.questions)
    rows = []
    for variant in result.measured:
        if variant.depths != depths:
            continue
        shares = {depth: result.shares(variant, depth) for depth in depths}
        best = best_depth({depth: share.mean for depth, share in shares.items()})
        cells = [f"**{_shown(s)}**" if d == best else _shown(s) for d, s in shares.items()]
        rows.append([variant.label, *cells])
        if variant is reference and len(levels) > 1:
            for level in levels:
                cells = [_shown(result.shares(variant, depth, level)) for depth in depths]
                rows.append([f"{result.task.difficulty} = {level}", *cells])
    return table(["accuracy by depth", *(f"N = {depth}" for depth in depths)], rows, "lr")


def _auto(result: Comparison) -> list[str]:
    head = ["stops when fast weights change by less than", "mean passes", "accuracy"]
    rows = [[f"{x.tolerance:g}", f"{x.passes:.2f}", _shown(x.per_question)] for x in result.auto]
    return ["", *table(head, rows)] if rows else []


def _rates(result: Comparison) -> list[str]:
    """What each multiple of the learning rates gave, the chosen one in bold."""
    rows = []
    for variant in result.measured:
        if variant.name not in result.rates:
            continue
        shares = result.rates[variant.name]
        cells = [
            f"**{x:.3f}**" if rate == variant.rate else f"{x:.3f}" for rate, x in shares.items()
        ]
        rows.append([f"{variant.label} ({EQUAL[variant.equal]})", *cells])
    if not rows:
        return []
    head = ["learning rates of the config times", *(f"{rate:g}" for rate in shares)]
    return ["", "Chosen on validation examples, one more seed:", "", *table(head, rows, "lr")]


def _changes(result: Comparison) -> list[str]:
    """What variants change that were given as text."""
    given = {v.label: v.changes for v in result.variants if isinstance(v.changes, list)}
    if not given:
        return []
    lines = [
        f"- {label}: " + (", ".join(f"`{change}`" for change in changes) or "as it is")
        for label, changes in given.items()
    ]
    return ["", f"Variants of {result.config}:", "", *lines]


def figure(result: Comparison) -> Figure:
    """With baselines the reference against depth, and all against difficulty: a panel for each kind
    of questions, or for all alike.

    Without, one panel: every variant against depth; of the reference alone, each difficulty.
    """
    if any(variant.role == "baseline" for variant in result.variants):
        return _with_baselines(result)
    if len(result.variants) == 1:
        picture, (axes,) = new_panels([f"{result.task.name}: {_EVERY_DEPTH}"], height=3.9)
        _against_depth(axes, result)
        return picture
    names = [variant for variant in result.measured if variant.depths == result.reference.depths]
    picture, (axes,) = new_panels([f"{result.task.name}: {len(names)} variants"], height=3.9)
    depths = result.reference.depths
    for index, variant in enumerate(names):
        shares = [result.shares(variant, depth) for depth in depths]
        seeds_line(axes, depths, shares, index, len(names), variant.label)
    if names:
        _depth_axis(axes, depths)
        _dress(axes, result)
    return picture


def _with_baselines(result: Comparison) -> Figure:
    task, reference = result.task, result.reference
    kinds: list[str | None] = [*(result.kinds if result.rows else ())] or [None]
    bought = [
        "and what the same compute buys" + ("" if kind is None else f": {kind}") for kind in kinds
    ]
    picture, (top, *others) = new_panels(
        [f"{task.name}: {_EVERY_DEPTH}", *bought], height=3.9
    )
    if not result.trials(reference.name):
        return picture
    _against_depth(top, result)
    for axes, kind in zip(others, kinds, strict=True):
        _against_difficulty(axes, result, kind)
    picture.set_size_inches(8.6, picture.get_size_inches()[1])
    return picture


def _against_depth(axes: Axes, result: Comparison) -> None:
    """The reference against depth, a line for each difficulty."""
    reference, levels = result.reference, list(result.questions) if result.rows else []
    for index, level in enumerate(levels):
        shares = [result.shares(reference, depth, level) for depth in reference.depths]
        label = f"{result.task.difficulty} = {level}"
        seeds_line(axes, reference.depths, shares, index, len(levels), label)
    if levels:
        _depth_axis(axes, reference.depths)
        _dress(axes, result)


def _against_difficulty(axes: Axes, result: Comparison, kind: str | None) -> None:
    """A line for each model of the reference's compute, on one kind of questions or on all."""
    task, reference, levels = result.task, result.reference, list(result.questions)
    shown = [x for x in result.measured if x.role != "ablation" and x.equal != "tokens"]
    for index, variant in enumerate(shown):
        at = variant.compared_at
        shares = [result.shares(variant, at, level, kind) for level in levels]
        label = f"sleep, N = {at}" if variant is reference else variant.label
        seeds_line(axes, list(range(len(levels))), shares, index, len(shown), label)
    if len(levels) > 1:
        floors = [task.floor[level] for level in levels]
        axes.plot(range(len(levels)), floors, **_FLOOR)
    axes.set_xticks(range(len(levels)), map(str, levels))
    axes.set_xlabel(f"{task.difficulty} (bars: lowest to highest seed)", fontsize=13)
    _dress(axes, result, line=len(levels) == 1)


_EVERY_DEPTH = "one model, evaluated at every depth"
_FLOOR: dict[str, Any] = {
    "color": GREY, "linestyle": (0, (4, 3)), "linewidth": 1.6, "label": "floor",
}  # fmt: skip


def _depth_axis(axes: Axes, depths: list[int]) -> None:
    axes.set_xticks(depths)
    axes.set_xlabel("sleep depth N (passes over each window)", fontsize=13)


def _dress(axes: Axes, result: Comparison, line: bool = True) -> None:
    if line:
        axes.axhline(result.floor, **_FLOOR)
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_ylabel("accuracy on questions", fontsize=13)
    axes.legend(fontsize=10, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
