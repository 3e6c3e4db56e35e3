"""A run beside its baselines, as tables, in words and as a figure, from its results.json alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval.baselines import REFERENCE
from hybrid_sleep.eval.plots import GREY, STYLES
from hybrid_sleep.support.provenance import describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EQUAL = {"compute": "compute", "tokens": "tokens", "both": "compute, tokens"}
CLEAR = 0.02  # of questions right: less than this is called no difference


def words(result: dict[str, Any]) -> list[str]:
    """What the seeds say about the reference against each baseline, as it is."""
    variants = result["variants"]
    if REFERENCE not in variants:
        return []
    at = variants[REFERENCE]["asked"]
    lines = []
    for name, variant in variants.items():
        if name == REFERENCE or variant["ahead"] is None:
            continue
        gap, low, high = variant["ahead"]
        equal = variant["equal"].replace("both", "compute and tokens")
        if max(-low, high) < CLEAR:
            verdict = "so no difference"
        elif low > 0 or high < 0:
            verdict = "with every seed"
        else:
            verdict = "but the seeds do not agree"
        side = "ahead of" if gap >= 0 else "behind"
        lines.append(
            f"At equal {equal}: sleep (asked at N = {at}) is {abs(gap):.3f} {side} "
            f"{variant['label']} ({low:+.3f} to {high:+.3f}, seed by seed), {verdict}."
        )
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The models and their cost, accuracy by difficulty and by depth, and where it came from."""
    variants, task = result["variants"], result["task"]
    if REFERENCE not in variants:
        return f"Not complete ({result['ended']}): the sleeping model has not been measured.\n"
    reference = variants[REFERENCE]
    params = ", ".join(f"{name}={value}" for name, value in task["params"].items())
    floor, chance = result["floor_per_question"], result["floor"]["chance"]
    seeds = ", ".join(map(str, result["seeds"]))
    lines = [
        *_models(result, reference),
        "",
        f"Right: share of questions right, mean over seeds {seeds} with its 95 % interval "
        "(Student's t), each model asked at the N in brackets. Compute: FLOPs of training, "
        "awake: FLOPs of one more token after the past was read, memory: bytes held then, all "
        f"against the sleeping model's {reference['cost']['training_flops']:.3g}, "
        f"{reference['cost']['wake_flops']:,.0f} and {reference['cost']['memory_bytes']:,.0f}. "
        f"Without memory of the past: {floor:.3f}; chance: {chance:.3f}.",
        "",
        *_by_difficulty(result),
        "",
        *_by_depth(result, reference),
        "",
        f"Task: {task['name']} ({params}); {result['examples']} test examples of each model. "
        f"Reference: {result['config']}"
        + (f" with {', '.join(result['overrides'])}" if result["overrides"] else "")
        + f"; a training took {reference['seconds']:.0f} {result['clock']} seconds.",
        "",
        *(f"- {line}" for line in words(result)),
    ]
    if "adaptive" in result:
        lines += ["", *_adaptive(result)]
    if result["left_out"]:
        lines += ["", *(f"- Left out: {reason}" for reason in result["left_out"].values())]
    if not result["complete"]:
        lines += ["", f"Not complete ({result['ended']}); the same call goes on."]
    lines += ["", describe(result["provenance"])]
    if result["command"]:
        lines += ["", f"`{result['command']}`"]
    return "\n".join(lines) + "\n"


def _share(of: dict[str, Any]) -> str:
    if of["interval"] is None:
        return f"{of['mean']:.3f}"
    low, high = of["interval"]
    return f"{of['mean']:.3f} [{low:.3f}, {high:.3f}]"


def _models(result: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    head = ["model", "equal", "steps", "compute", "parameters", "awake", "memory", "right"]
    lines = [f"| {' | '.join(head)} |", "|:---|:---|" + "---:|" * (len(head) - 2)]
    own = reference["cost"]
    for variant in result["variants"].values():
        cost, at = variant["cost"], variant["asked"]
        cells = [
            variant["label"],
            EQUAL[variant["equal"]],
            f"{cost['steps']:,.0f}",
            f"{cost['training_flops'] / own['training_flops']:.2f}x",
            f"{cost['parameters']:,.0f}",
            f"{cost['wake_flops'] / own['wake_flops']:.2f}x",
            f"{cost['memory_bytes'] / own['memory_bytes']:.2f}x",
            f"{_share(variant['per_question'][at])} (N = {at})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _by_difficulty(result: dict[str, Any]) -> list[str]:
    levels = list(next(iter(result["rows"]))["questions"])
    name = result["task"]["difficulty"]
    head = [f"right, by {name}", *levels]
    lines = [f"| {' | '.join(head)} |", "|:---|" + "---:|" * len(levels)]
    for variant in result["variants"].values():
        by_level = variant["by_difficulty"][variant["asked"]]
        equal = f" ({EQUAL[variant['equal']]})" if variant["role"] == "baseline" else ""
        cells = [variant["label"] + equal, *(f"{by_level[level]['mean']:.3f}" for level in levels)]
        lines.append(f"| {' | '.join(cells)} |")
        if "tied" in variant:
            shares = [f"{variant['tied'][level]['mean']:.3f}" for level in levels]
            lines.append(f"| {variant['label']}, asked at its own N | {' | '.join(shares)} |")
    floors = result["floor"]["by_difficulty"]
    return [*lines, f"| without memory | {' | '.join(f'{floors[x]:.3f}' for x in levels)} |"]


def _by_depth(result: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    depths = list(reference["per_question"])
    head = ["sleep", *(f"N = {depth}" for depth in depths)]
    lines = [f"| {' | '.join(head)} |", "|:---|" + "---:|" * len(depths)]
    rows = {"all": {depth: reference["per_question"][depth] for depth in depths}}
    for level in next(iter(reference["by_difficulty"].values())):
        rows[f"{result['task']['difficulty']} = {level}"] = {
            depth: reference["by_difficulty"][depth][level] for depth in depths
        }
    for name, shares in rows.items():
        lines.append(f"| {name} | {' | '.join(_share(shares[d]) for d in depths)} |")
    return lines


def _adaptive(result: dict[str, Any]) -> list[str]:
    lines = [
        "| stops when fast weights change by less than | mean passes | right |",
        "|---:|---:|---:|",
    ]
    for cell in result["adaptive"]:
        lines.append(
            f"| {cell['tolerance']:g} | {cell['passes']:.2f} | {_share(cell['per_question'])} |"
        )
    return lines


def figure(result: dict[str, Any]) -> Figure:
    """Two panels: accuracy against depth, by difficulty; against difficulty, beside baselines."""
    from hybrid_sleep.eval.plots import new_panels

    task, variants = result["task"], result["variants"]
    kind = task["difficulty"]
    figure, (top, bottom) = new_panels(
        [f"{task['name']}: one model, asked at every depth", "beside the same compute at N = 1"],
        height=3.9,
    )
    if REFERENCE not in variants:
        return figure
    reference = variants[REFERENCE]
    levels = list(next(iter(reference["by_difficulty"].values())))
    depths = list(reference["by_difficulty"])
    for index, level in enumerate(levels):
        shares = [reference["by_difficulty"][depth][level] for depth in depths]
        places = [int(depth) for depth in depths]
        _line(top, places, shares, index, len(levels), f"{kind} = {level}")
    top.set_xticks([int(depth) for depth in depths])
    top.set_xlabel("sleep depth N (passes over each window)", fontsize=13)
    shown = [
        variant for variant in variants.values()
        if variant["role"] != "ablation" and variant["equal"] != "tokens"
    ]  # fmt: skip
    for index, variant in enumerate(shown):
        by_level = variant["by_difficulty"][variant["asked"]]
        shares = [by_level[level] for level in levels]
        label = "sleep, N = " + variant["asked"] if variant is reference else variant["label"]
        _line(bottom, list(range(len(levels))), shares, index, len(shown), label)
    floors = [result["floor"]["by_difficulty"][level] for level in levels]
    for axes in (top, bottom):
        if axes is bottom and len(levels) > 1:
            axes.plot(
                range(len(levels)), floors, color=GREY, linestyle=(0, (4, 3)), linewidth=1.6,
                label="without memory",
            )  # fmt: skip
        else:
            axes.axhline(
                result["floor_per_question"], color=GREY, linestyle=(0, (4, 3)), linewidth=1.6,
                label="without memory",
            )  # fmt: skip
        axes.set_ylim(0, 1.04)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.set_ylabel("questions right", fontsize=13)
        axes.legend(fontsize=10, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    bottom.set_xticks(range(len(levels)), levels)
    bottom.set_xlabel(f"{kind} (bars: lowest to highest seed)", fontsize=13)
    figure.set_size_inches(8.6, figure.get_size_inches()[1])
    return figure


def _line(
    axes: Any, places: list[int], shares: list[dict[str, Any]], index: int, of: int, label: str
) -> None:
    """Means with bars from the lowest seed to the highest, beside those of the other lines."""
    color, marker, line = STYLES[index % len(STYLES)]
    shift = 0.05 * (index - (of - 1) / 2)
    means = [share["mean"] for share in shares]
    axes.errorbar(
        [place + shift for place in places], means,
        yerr=[
            [value - min(share["seeds"]) for value, share in zip(means, shares, strict=True)],
            [max(share["seeds"]) - value for value, share in zip(means, shares, strict=True)],
        ],
        color=color, marker=marker, linestyle=line, markersize=7, linewidth=2, capsize=3,
        label=label,
    )  # fmt: skip
