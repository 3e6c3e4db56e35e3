"""Tables and figure of `cost`, from its results.json alone."""

from __future__ import annotations

from statistics import median
from typing import Any

from hybrid_sleep.eval.benchmarks.break_even import RIVALS, costs_of
from hybrid_sleep.support.provenance import describe

WAYS = {"kept": "all kept", "reread": "reread", "reread_awake": "reread, N = 1"}
MOST = 10_000  # questions on the axis


def markdown(result: dict[str, Any]) -> str:
    """Sleeps, tokens, bytes, break-even, and questions about Depo's cycles, with the method."""
    rows = {what: [row for row in result["rows"] if row["what"] == what]
            for what in ("sleep", "wake", "depo")}  # fmt: skip
    lines = [_about(result)]
    for heading, found, table in (
        ("A sleep over one full window", rows["sleep"], _sleeps),
        ("A token awake", rows["wake"], _tokens),
        ("Bytes between two questions", rows["wake"], _bytes),
        ("Questions until a sleep has paid for itself", rows["wake"], _break_even),
        ("Depo: one cycle, many questions", rows["depo"], _depo),
    ):
        if found:
            lines += ["", f"**{heading}**", "", *table(result, found)]
    if not result["complete"]:
        lines += ["", f"Not complete ({result['ended']}); the same command goes on."]
    lines += ["", _method(result), "", describe(result["provenance"])]
    if result["command"]:
        lines += ["", f"`{result['command']}`"]
    return "\n".join(lines) + "\n"


def _about(result: dict[str, Any]) -> str:
    model, config = result["model"], result["model"]["config"]
    name = model["name"]
    return (
        f"{'Untrained' if name == 'untrained' else name['checkpoint']}: "
        f"{model['parameters']:,} parameters, {config['num_hidden_layers']} layers of "
        f"{config['hidden_size']}, window {config['window']}, {model['dtype']}, batch 1. "
        "These are costs alone: that an answer is cheap does not say that it is right."
    )


def _sleeps(result: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    energy = ["joules"] * (result["energy"] is not None)
    lines = _head("N", "ms", "lowest to highest", "of reading the window", "GFLOPs",
                  "of reading it", *energy)  # fmt: skip
    for row in rows:
        pairs = zip(row["seconds"], row["read_seconds"], strict=True)
        lines.append(
            _line(
                row["passes"],
                f"{1000 * median(row['seconds']):.1f}",
                _range([1000 * x for x in row["seconds"]], ".1f"),
                f"**{median(sleep / read for sleep, read in pairs):.2f}**",
                f"{row['flops'] / 1e9:.3f}",
                f"{row['flops'] / row['read_flops']:.2f}",
                *(f"{row[name]:.3g}" for name in energy),
            )
        )
    return lines


def _tokens(result: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    ways = {"slept": "slept over", "kept": "all kept"}
    energy = ways if result["energy"] is not None else {}
    lines = _head("windows before", "tokens", "fresh, ms", "slept over, ms", "to fresh",
                  "lowest to highest", "all kept, ms", "to fresh", "lowest to highest",
                  "of it copying, ms", *(f"MFLOPs {words}" for words in ways.values()),
                  *(f"joules {words}" for words in energy.values()))  # fmt: skip
    for row in rows:
        token = row["seconds"]["token"]
        lines.append(
            _line(
                row["windows"],
                f"{row['past']:,}",
                _ms(token["fresh"]),
                _ms(token["slept"]),
                f"**{median(row['ratio']['slept']):.3f}**",
                _range(row["ratio"]["slept"], ".3f"),
                _ms(token["kept"]),
                f"**{median(row['ratio']['kept']):.3f}**",
                _range(row["ratio"]["kept"], ".3f"),
                _ms(row["seconds"]["copying"]["kept"]),
                *(f"{row['flops']['token'][name] / 1e6:.2f}" for name in ways),
                *(f"{row['joules']['token'][name]:.3g}" for name in energy),
            )
        )
    return lines


def _bytes(result: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    model = result["model"]
    lines = _head("windows before", "fast weights", "all kept", "times as many",
                  "an open window adds")  # fmt: skip
    for row in rows:
        held = row["bytes"]
        lines.append(
            _line(
                row["windows"],
                f"{held['saved']:,}",
                f"{held['kept']:,}",
                f"**{held['kept'] / held['saved']:.1f}**",
                f"{held['window']:,}",
            )
        )
    per_token = model["kv_bytes_per_token"]
    if per_token:
        even = -(-model["fast_weight_bytes"] // per_token)
        lines += ["", f"{per_token:,} bytes of keys and values a token: from {even:,} tokens on "
                  "they are more than the fast weights."]  # fmt: skip
    return lines


def _break_even(result: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    units = {"flops": "FLOPs", "seconds": "seconds"}
    if result["energy"] is not None:
        units["joules"] = "joules"
    columns = []
    for rival in RIVALS:
        for unit, words in units.items():
            columns.append(f"{rival}: {words}")
            columns += ["lowest to highest"] * (unit == "seconds")
    lines = _head("windows before", "N", *columns)
    found = {(b["windows"], b["passes"], b["rival"], b["unit"]): b for b in result["break_even"]}
    for windows, passes in dict.fromkeys(key[:2] for key in found):
        cells = []
        for rival in RIVALS:
            for unit in units:
                verdict = found[windows, passes, rival, unit]
                cells.append(f"**{words_of(verdict)}**")
                if unit == "seconds":
                    cells.append(_tally(verdict, "range"))
        lines.append(_line(windows, passes, *cells))
    return lines


def _depo(result: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    depo, last = result["depo"], rows[-1]
    hops = list(last["by_hops"])
    depths = ", ".join(map(str, depo["trained_depths"]))
    steps = [f"{hop} step{'s' * (hop != '1')}" for hop in hops]
    lines = [
        f"{depo['checkpoint']}: {depo['parameters']:,} parameters, one seed, trained at depths "
        f"{depths}. {depo['cycles']} test cycles of {depo['task']['nodes']} nodes and "
        f"{depo['cycle_tokens']} tokens, every start and number of steps: {last['questions']} "
        "questions a depth. Floor, the nodes known but not their order: "
        f"**{depo['floor']:.3f}**. Last columns: whether fast weights say what one forward over "
        "cycle and question says.",
        "",
        *_head("N", "right", "95 % interval", *steps, "same answers", "logits differ by at most"),
    ]
    for row in rows:
        low, high = row["interval"]
        lines.append(
            _line(
                row["passes"],
                f"**{row['accuracy']:.3f}**",
                f"{low:.3f} to {high:.3f}",
                *(f"{row['by_hops'][hop]:.3f}" for hop in hops),
                f"{row['identical']} of {row['questions']}",
                f"{row['logit_difference']:.1g}",
            )
        )
    lines += ["", "Milliseconds, medians over the cycles:", ""]
    lines += _head("N", "read and sleep", "a question, fast weights saved",
                   *(f"a question, {way}" for way in WAYS.values()))  # fmt: skip
    for row in rows:
        taken = [row["once_seconds"]["saved"], *(row["seconds"][way] for way in ("saved", *WAYS))]
        lines.append(_line(row["passes"], *(f"{1000 * x['median']:.2f}" for x in taken)))
    lines += ["", "Questions until a sleep has paid for itself, middle cycle and quartiles:", ""]
    lines += _head("N", *(f"{way}: {unit}" for way in WAYS.values()
                          for unit in ("FLOPs", "seconds", "cycles")))  # fmt: skip
    for row in rows:
        cells = []
        for way in WAYS:
            cells.append(f"**{words_of(row['flops']['break_even'][way])}**")
            cells.append(f"**{words_of(row['break_even'][way])}**")
            cells.append(_tally(row["break_even"][way], "quartiles"))
        lines.append(_line(row["passes"], *cells))
    return [
        *lines,
        "",
        f"Between two questions {last['bytes']['saved']:,} bytes of fast weights, or "
        f"{last['bytes']['kept']:,} of everything kept. On disk {last['file']['bytes']:,} bytes, "
        f"{1000 * last['file']['save_seconds']:.1f} ms to save and "
        f"{1000 * last['file']['load_seconds']:.1f} ms to load (on the wall; both make sure that "
        "the weights are those of the cache).",
    ]


def words_of(verdict: dict[str, Any]) -> str:
    """A verdict of `break_even`: `always`, `never`, `from 12`, `up to 7`."""
    count = verdict["questions"]
    return verdict["pays"] if count is None else f"{verdict['pays']} {count:,}"


def _tally(verdict: dict[str, Any], which: str) -> str:
    """The numbers of several verdicts, and how many have none: `3 to 5; never in 2`."""
    kinds = [f"{kind} in {n}" for kind, n in verdict["kinds"].items() if kind != "from"]
    numbers = verdict[which]
    if numbers is None:
        return "; ".join(kinds)
    low, high = (f"{x:,.0f}" for x in numbers)
    return "; ".join([low if low == high else f"{low} to {high}", *kinds])


def _method(result: dict[str, Any]) -> str:
    on_cpu = result["clock"] == "cpu_seconds"
    energy = result["energy"]
    return (
        f"Medians of {result['repeats']} rounds in which all that is compared takes turns in one "
        "process; times are "
        + ("one thread's processor time" if on_cpu else "on the wall, the device synchronised")
        + ". Tokens are timed one by one from the middle of a window on, ratios taken token by "
        "token. fresh: no window lies behind. slept over: all of the past is, fast weights are "
        "all that is left of it. all kept: the same backbone as one long window, read in one "
        "forward without sleep, its keys and values all there; each forward copies them to append "
        "to them, which a server that reserves memory need not, so that copying is left out of the "
        "questions. The sleeper too copies the keys of its open window, and that is counted. A "
        f"question is {result['question']} tokens in one forward, its answer {result['answer']} "
        "tokens, one forward each. A sleep has paid for itself when reading, sleeping and that "
        "many questions cost no more than the same with the rival: keeping reads once and keeps "
        "all, rereading keeps nothing and reads all of it again, without sleep, for each question. "
        "Against rereading with the same sleeps it pays from 2 questions on by construction. Shown "
        "is the middle one of the verdicts of all rounds. "
        "FLOPs: 2 a multiply-add of products, attention over visible pairs and recurrences "
        "(eval/flops.py). Energy: "
        + (f"{energy}, idle draw and other work included." if energy else "not reported by this "
           "device.")
    )  # fmt: skip


def figure(result: dict[str, Any]) -> Any:
    """A token by what lies behind it, and the whole cost of a number of questions."""
    from matplotlib.figure import Figure

    from hybrid_sleep.eval.plots import GREY, INK, PALE

    picture = Figure(figsize=(6.4, 7.6), dpi=200, layout="constrained")
    rows = [row for row in result["rows"] if row["what"] == "wake"]
    if not rows:
        return picture
    panels = picture.subplots(2, 1)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(labelsize=12, colors=INK)
        axes.grid(axis="y", color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
    _draw_tokens(panels[0], rows)
    _draw_questions(panels[1], rows[-1], result)
    return picture


def _draw_tokens(axes: Any, rows: list[dict[str, Any]]) -> None:
    from hybrid_sleep.eval.plots import BLUE, GREY, INK, ORANGE, VERMILLION

    axes.axhline(1, color=GREY, linestyle=(0, (4, 3)), linewidth=1.6)
    for name, label, colour, marker, dash in (
        ("kept", "all kept", VERMILLION, "^", "-"),
        ("reserved", "all kept, nothing copied", ORANGE, "s", (0, (5, 1.5))),
        ("slept", "slept over", BLUE, "o", "-"),
    ):
        ratios = [row["ratio"][name] for row in rows]
        middle = [median(values) for values in ratios]
        low = [m - min(values) for m, values in zip(middle, ratios, strict=True)]
        high = [max(values) - m for m, values in zip(middle, ratios, strict=True)]
        axes.errorbar(
            range(len(rows)), middle, yerr=[low, high], color=colour, marker=marker,
            linestyle=dash, markersize=8, linewidth=2.2, capsize=4, label=label,
        )  # fmt: skip
    axes.set_title("Time of a token; with no past: 100 %", fontsize=14, color=INK, loc="left")
    axes.set_ylim(bottom=0)
    axes.set_xlim(-0.3, len(rows) - 0.7)
    axes.set_xticks(range(len(rows)), [f"{row['windows']} ({row['past']:,})" for row in rows])
    axes.set_xlabel("windows (tokens) of the past; bars: lowest to highest", fontsize=13)
    axes.yaxis.set_major_formatter(_percent)
    axes.legend(fontsize=12, frameon=False, loc="upper left")


def _draw_questions(axes: Any, row: dict[str, Any], result: dict[str, Any]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    from hybrid_sleep.eval.plots import BLUE, GREEN, GREY, INK, SKY

    counts = [10 ** (power / 16) for power in range(16 * (len(str(MOST)) - 1) + 1)]
    depths = sorted(int(depth) for depth in row["flops"]["read"])
    sleeps = [depth for depth in depths if depth > 1][:: max(1, len(depths) - 2)]
    lines = [("reread", "read again each time", GREEN, (0, (1.5, 1.5)), depths[0])]
    for depth, colour, dash in zip(sleeps, (SKY, BLUE), ("-", (0, (6, 1.2))), strict=False):
        lines.append(("sleep", f"sleep once, N = {depth}", colour, dash, depth))
    axes.axhline(1, color=GREY, linestyle=(0, (4, 3)), linewidth=1.6)
    lowest, highest = 0.9, 1.1
    for kind, label, colour, dash, depth in lines:
        costs = [costs_of(row, "seconds", str(depth), result["answer"], number)
                 for number in range(len(row["seconds"]["read_kept"]))]  # fmt: skip
        shares = [[_total(kind, cost, count) / _total("keep", cost, count) for cost in costs]
                  for count in counts]  # fmt: skip
        axes.plot(counts, [median(x) for x in shares], color=colour, linestyle=dash,
                  linewidth=2.4, label=label)  # fmt: skip
        low, high = [min(x) for x in shares], [max(x) for x in shares]
        axes.fill_between(counts, low, high, color=colour, alpha=0.25, linewidth=0)
        lowest, highest = min(lowest, *low), max(highest, *high)
    axes.set_title(f"Questions about {row['past']:,} tokens; keeping all: 100 %",
                   fontsize=14, color=INK, loc="left")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(1, MOST)
    axes.set_ylim(lowest / 1.1, highest * 1.1)
    ticks = [2.0**power for power in range(-10, 20) if lowest / 1.1 <= 2.0**power <= highest * 1.1]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(_percent)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel(
        f"questions of {result['question']} tokens, answers of {result['answer']}; "
        "bands: lowest to highest", fontsize=12,
    )  # fmt: skip
    axes.legend(fontsize=12, frameon=False, loc="best")


def _percent(value: float, _: Any) -> str:
    return f"{100 * value:.3g} %"


def _total(kind: str, cost: dict[str, float], count: float) -> float:
    if kind == "sleep":
        return cost["read"] + count * cost["ask"]
    if kind == "keep":
        return cost["read_kept"] + count * cost["ask_kept"]
    return count * (cost["read_kept"] + cost["ask_kept"])


def _head(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", "|" + "---:|" * len(names)]


def _line(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _range(values: list[float], form: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}"


def _ms(seconds: list[float]) -> str:
    return f"{1000 * median(seconds):.2f}"
