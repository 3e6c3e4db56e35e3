"""Tables and figure of `costs.cost`."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval.costs.break_even import ALTERNATIVES
from hybrid_sleep.eval.costs.cost import DecodeRow, SleepRow
from hybrid_sleep.eval.costs.questions import DepoRow
from hybrid_sleep.support.markdown import table
from hybrid_sleep.support.plots import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    VERMILLION,
    blank,
    dress,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from hybrid_sleep.eval.costs.break_even import Verdict
    from hybrid_sleep.eval.costs.cost import Cost

WAYS = {
    "kept": "KV cache kept",
    "recomputed": "recomputed",
    "recomputed_n1": "recomputed at N = 1",
}
MOST = 10_000  # questions on the axis
LOWEST_TO_HIGHEST = "lowest to highest"


def markdown(result: Cost) -> str:
    """Sleeps, tokens, bytes, break-even, and questions about Depo's cycles, with the method."""
    lines = [_about(result)]
    for heading, kind, section in (
        ("A sleep over one full window", SleepRow, _sleeps),
        ("One decoding step", DecodeRow, _tokens),
        ("Bytes held between two questions", DecodeRow, _bytes),
        ("Questions from which on sleeping costs less", DecodeRow, _break_even),
        ("Depo: one cycle, many questions", DepoRow, _depo),
    ):
        if rows := result.rows_of(kind):
            lines += ["", f"**{heading}**", "", *section(result, rows)]
    return "\n".join([*lines, "", *_method(result), *result.footer()]) + "\n"


def _about(result: Cost) -> str:
    model, config = result.model, result.model.config
    return (
        f"{'Untrained' if model.run is None else model.run['checkpoint']}: "
        f"{model.parameters:,} parameters, {config['num_hidden_layers']} layers of "
        f"{config['hidden_size']}, window {config['window']}, {model.dtype}, batch 1. "
        "These are costs alone: that an answer is cheap does not say that it is right."
    )


def _sleeps(result: Cost, rows: list[SleepRow]) -> list[str]:
    head = ["N", "ms", LOWEST_TO_HIGHEST, "relative to the window's forward pass", "GFLOPs",
            "relative to that pass"]  # fmt: skip
    cells = []
    for row in rows:
        pairs = zip(row.seconds, row.read_seconds, strict=True)
        cells.append(
            [
                row.passes,
                f"{1000 * median(row.seconds):.1f}",
                _range([1000 * x for x in row.seconds], ".1f"),
                f"**{median(sleep / read for sleep, read in pairs):.2f}**",
                f"{row.flops / 1e9:.3f}",
                f"{row.flops / row.read_flops:.2f}",
            ]
        )
    return table(head, cells)


def _tokens(result: Cost, rows: list[DecodeRow]) -> list[str]:
    head = ["windows before", "tokens", "no past, ms", "consolidated, ms", "relative to no past",
            LOWEST_TO_HIGHEST, "KV cache kept, ms", "relative to no past", LOWEST_TO_HIGHEST,
            "of it copying the cache, ms", "MFLOPs, consolidated",
            "MFLOPs, KV cache kept"]  # fmt: skip
    cells = []
    for row in rows:
        token = row.seconds.token
        cells.append(
            [
                row.windows,
                f"{row.past:,}",
                _ms(token["fresh"]),
                *(
                    cell
                    for way in ("slept", "kept")
                    for cell in (
                        _ms(token[way]),
                        f"**{median(row.ratio[way]):.3f}**",
                        _range(row.ratio[way], ".3f"),
                    )
                ),
                _ms(row.seconds.copying),
                *(f"{row.flops.token[way] / 1e6:.2f}" for way in ("slept", "kept")),
            ]
        )
    return table(head, cells)


def _bytes(result: Cost, rows: list[DecodeRow]) -> list[str]:
    model = result.model
    head = ["windows before", "fast weights", "KV cache kept", "times as many",
            "an open window adds"]  # fmt: skip
    cells = [
        [
            row.windows,
            f"{row.bytes['saved']:,}",
            f"{row.bytes['kept']:,}",
            f"**{row.bytes['kept'] / row.bytes['saved']:.1f}**",
            f"{row.bytes['window']:,}",
        ]
        for row in rows
    ]
    lines = table(head, cells)
    if per_token := model.kv_bytes_per_token:
        even = -(-model.fast_weight_bytes // per_token)
        lines += ["", f"{per_token:,} bytes of keys and values a token: from {even:,} tokens on "
                  "they are more than the fast weights."]  # fmt: skip
    return lines


def _break_even(result: Cost, rows: list[DecodeRow]) -> list[str]:
    head = ["windows before", "N"]
    for way in ALTERNATIVES:
        head += [f"{way}: FLOPs", f"{way}: seconds", LOWEST_TO_HIGHEST]
    cells = []
    for row in rows:
        for depth in row.depths:
            line = [str(row.windows), str(depth)]
            for way in ALTERNATIVES:
                counted, timed = (row.break_even(u, depth, way) for u in ("flops", "seconds"))
                line += [f"**{counted}**", f"**{timed}**", _tally(timed, timed.range)]
            cells.append(line)
    return table(head, cells)


def _depo(result: Cost, rows: list[DepoRow]) -> list[str]:
    depo, last = result.depo, rows[-1]
    assert depo is not None
    depths = ", ".join(map(str, depo.run["trained_depths"]))
    steps = [f"{hop} step{'s' * (hop != 1)}" for hop in last.by_hops]
    head = ["N", "accuracy", "95 % interval", *steps, "same answers", "logits differ by at most"]
    lines = [
        f"{depo.run['checkpoint']}: {depo.parameters:,} parameters, one seed, trained at depths "
        f"{depths}. {depo.cycles} test cycles of {depo.task['nodes']} nodes and "
        f"{depo.cycle_tokens} tokens, every start and number of steps: {last.questions} questions "
        f"a depth. Floor, the nodes known but not their order: **{depo.floor:.3f}**. Last columns: "
        "answers from saved fast weights compared with those of one forward pass over cycle and "
        "question.",
        "",
        *table(
            head,
            [
                [
                    row.passes,
                    f"**{row.accuracy:.3f}**",
                    f"{row.interval[0]:.3f} to {row.interval[1]:.3f}",
                    *(f"{share:.3f}" for share in row.by_hops.values()),
                    f"{row.identical} of {row.questions}",
                    f"{row.logit_difference:.1g}",
                ]
                for row in rows
            ],
        ),
        "",
        "Milliseconds, medians over the cycles:",
        "",
    ]
    head = ["N", "prefill and sleeps", "a question, fast weights saved",
            *(f"a question, {way}" for way in WAYS.values())]  # fmt: skip
    cells = []
    for row in rows:
        taken = [row.once_seconds["saved"], *(row.seconds[way] for way in ("saved", *WAYS))]
        cells.append([row.passes, *(f"{1000 * x.median:.2f}" for x in taken)])
    lines += table(head, cells)
    lines += ["", "Questions from which on sleeping costs less, middle cycle and quartiles:", ""]
    head = ["N", *(f"{way}: {unit}" for way in WAYS.values()
                   for unit in ("FLOPs", "seconds", "cycles"))]  # fmt: skip
    tallies: list[list[str]] = []
    for row in rows:
        line = [str(row.passes)]
        for way in WAYS:
            timed = row.break_even[way]
            line += [f"**{row.flops.break_even(way)}**", f"**{timed}**"]
            line += [_tally(timed, timed.quartiles)]
        tallies.append(line)
    return [
        *lines,
        *table(head, tallies),
        "",
        f"Between two questions {last.bytes['saved']:,} bytes of fast weights, or "
        f"{last.bytes['kept']:,} with the KV cache kept. On disk {last.file.bytes:,} bytes, "
        f"{1000 * last.file.save_seconds:.1f} ms to save and "
        f"{1000 * last.file.load_seconds:.1f} ms to load (elapsed time; both check that the "
        "weights are those of the cache).",
    ]


def _tally(verdict: Verdict, numbers: Sequence[float] | None) -> str:
    """Two numbers of several verdicts, and how many have none: `3 to 5; never in 2`."""
    counts = verdict.kinds or {}
    kinds = [f"{kind} in {count}" for kind, count in counts.items() if kind != "from"]
    if numbers is None:
        return "; ".join(kinds)
    low, high = (f"{x:,.0f}" for x in numbers)
    return "; ".join([low if low == high else f"{low} to {high}", *kinds])


def _method(result: Cost) -> list[str]:
    clock = (
        "one thread's processor time"
        if result.clock == "cpu_seconds"
        else "elapsed time, with all work of the device finished"
    )
    lines = [
        f"- Times are medians of {result.repeats} rounds, in {clock}. In each round everything "
        "that is compared runs once, in one process and in rotating order.",
        "- Decoding steps are timed one by one from the middle of a window on. Ratios are taken "
        "token by token.",
        "- *No past*: the sequence starts with this window. *Consolidated*: every window of the "
        "past was followed by a sleep, and only fast weights are left of it. *KV cache kept*: the "
        "same model with one long window; it prefills the past without sleep and keeps all keys "
        "and values.",
        "- A forward pass copies the kept cache to append to it. A server that reserves memory "
        "need not, so this time is left out of the questions. The sleeping model also copies the "
        "keys of its open window; that time is counted.",
        f"- A question is one forward pass over {result.question} tokens; its answer is "
        f"{result.answer} tokens with one forward pass each.",
        "- *Keeping* prefills the past once and keeps its KV cache. *Recomputing* keeps nothing "
        "and prefills the past again for each question, without sleep. Sleeping costs less from "
        "the number of questions on where prefill, sleeps and questions together cost at most as "
        "much as the alternative. The number is the middle one of the rounds.",
        "- FLOPs: 2 for each multiply-add of products, attention over visible pairs and "
        "recurrences (eval/measure/flops.py).",
    ]
    if result.depo is not None:
        lines.insert(-1, "- Recomputing with the same sleeps costs more from 2 questions on by "
                     "construction.")  # fmt: skip
    return lines


def figure(result: Cost) -> Figure:
    """A decoding step by the length of the past, and the whole cost of a number of questions."""
    picture = blank(6.4, 7.6)
    rows = result.rows_of(DecodeRow)
    if not rows:
        return picture
    top, bottom = picture.subplots(2, 1)
    _draw_tokens(dress(top, "Time of a decoding step; with no past: 100 %"), rows)
    title = f"Questions about {rows[-1].past:,} tokens; KV cache kept: 100 %"
    _draw_questions(dress(bottom, title), rows[-1])
    return picture


def _draw_tokens(axes: Any, rows: list[DecodeRow]) -> None:
    axes.axhline(1, color=GREY, linestyle=(0, (4, 3)), linewidth=1.6)
    for name, label, colour, marker, dash in (
        ("kept", "KV cache kept", VERMILLION, "^", "-"),
        ("reserved", "KV cache kept, not copied", ORANGE, "s", (0, (5, 1.5))),
        ("slept", "consolidated", BLUE, "o", "-"),
    ):
        ratios = [row.ratio[name] for row in rows]
        middle = [median(values) for values in ratios]
        low = [m - min(values) for m, values in zip(middle, ratios, strict=True)]
        high = [max(values) - m for m, values in zip(middle, ratios, strict=True)]
        axes.errorbar(
            range(len(rows)), middle, yerr=[low, high], color=colour, marker=marker,
            linestyle=dash, markersize=8, linewidth=2.2, capsize=4, label=label,
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_xlim(-0.3, len(rows) - 0.7)
    axes.set_xticks(range(len(rows)), [f"{row.windows} ({row.past:,})" for row in rows])
    axes.set_xlabel("windows (tokens) of the past; bars: lowest to highest", fontsize=13)
    axes.yaxis.set_major_formatter(_percent)
    axes.legend(fontsize=12, frameon=False, loc="upper left")


def _draw_questions(axes: Any, row: DecodeRow) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    counts = [10 ** (power / 16) for power in range(16 * (len(str(MOST)) - 1) + 1)]
    depths = row.depths
    sleeps = [depth for depth in depths if depth > 1][:: max(1, len(depths) - 2)]
    lines: list[tuple[str, str, str, Any, int]] = [
        ("recomputing", "recomputed each time", GREEN, (0, (1.5, 1.5)), depths[0])
    ]
    solid_dashed: tuple[Any, ...] = ("-", (0, (6, 1.2)))
    for depth, colour, dash in zip(sleeps, (SKY, BLUE), solid_dashed, strict=False):
        lines.append(("sleep", f"sleep once, N = {depth}", colour, dash, depth))
    axes.axhline(1, color=GREY, linestyle=(0, (4, 3)), linewidth=1.6)
    lowest, highest = 0.9, 1.1
    for kind, label, colour, dash, depth in lines:
        prices = row.prices("seconds", depth)
        shares = [[price.total(kind, count) / price.total("keeping", count) for price in prices]
                  for count in counts]  # fmt: skip
        axes.plot(counts, [median(x) for x in shares], color=colour, linestyle=dash,
                  linewidth=2.4, label=label)  # fmt: skip
        low, high = [min(x) for x in shares], [max(x) for x in shares]
        axes.fill_between(counts, low, high, color=colour, alpha=0.25, linewidth=0)
        lowest, highest = min(lowest, *low), max(highest, *high)
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
        f"questions of {row.question} tokens, answers of {row.answer}; "
        "bands: lowest to highest", fontsize=12,
    )  # fmt: skip
    axes.legend(fontsize=12, frameon=False, loc="best")


def _percent(value: float, _: Any) -> str:
    return f"{100 * value:.3g} %"


def _range(values: list[float], form: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}"


def _ms(seconds: list[float]) -> str:
    return f"{1000 * median(seconds):.2f}"
