"""On a CUDA device: sleeps from CUDA graphs, eager sleeps and calls of the model, side by side.

The model is that of DESIGN.md section 5: d = 1024, 24 layers (three state-space layers, then one
of attention), 8 heads of 128, bf16, windows of 2048 tokens. Everything is timed on the clock of the
wall, launches included, in turn and in rotating order, and compared within each round.

Rows of kind "sleep" are about one sleep of depth N; rows of kind "wake" about one token, with a
fresh cache and with one that has slept through 64 windows, both filled alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from hybrid_sleep.eval.benchmarks.generation import synchronise
from hybrid_sleep.eval.benchmarks.models import untrained
from hybrid_sleep.support.provenance import check_device, describe, provenance
from hybrid_sleep.support.resume import Row, collect
from hybrid_sleep.validation import check_count

SIZE = {
    "hidden": 1024,
    "layers": 24,
    "window": 2048,
    "head_dim": 128,
    "vocabulary": 32_768,
    "dtype": "bfloat16",
}
PASSES = (4, 2, 8, 1)
BATCHES = (1, 16)
WINDOWS = 64
TOKENS = 64
TARGET = {"state_space": "gated_deltanet", "batch": 1, "passes": 4, "speedup": 3.0}
WAYS = ("graph", "eager", "calls")


def wanted_rows() -> list[Row]:
    """What each row is about, the one with the target first."""
    rows = []
    for state_space in ("gated_deltanet", "mamba2"):
        for batch in BATCHES:
            names = {"state_space": state_space, "batch": batch, **SIZE}
            rows += [{"kind": "sleep", **names, "passes": depth} for depth in PASSES]
            rows.append({"kind": "wake", **names, "passes": 4, "windows": WINDOWS})
    return rows


def run(
    *,
    repeats: int = 9,
    device: str = "cuda",
    minutes: float | None = None,
    out: Path | None = None,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure every row that `out` does not have; see `resume.collect` for `minutes` and `out`.

    Raises ValueError where `device` is no CUDA device: nothing here is ever estimated.
    """
    import torch

    if torch.device(check_device(device)).type != "cuda":
        raise ValueError(f"device={device!r}: these are measurements of a GPU; allowed: cuda")
    check_count("repeats", repeats, 2)
    result = {
        "benchmark": "sleep",
        "measured_on": "cuda",
        "repeats": repeats,
        "rows": [],
        "command": command,
        "provenance": provenance(device),
    }
    bench = Bench(device, repeats)
    return collect(
        result, wanted_rows(), bench.measure, finish=judge,
        minutes=minutes, out=out, progress=progress,
    )  # fmt: skip


def judge(result: dict[str, Any]) -> None:
    """Say whether the target is met, if its row was measured, and from graphs."""
    result.pop("target", None)
    asked = {"kind": "sleep", **{k: v for k, v in TARGET.items() if k != "speedup"}}
    for row in result["rows"]:
        if all(row.get(name) == value for name, value in asked.items()):
            from_graph = row["path"].startswith("cuda graph")
            met = from_graph and row["speedup"]["graph"]["median"] >= TARGET["speedup"]
            result["target"] = {**TARGET, "met": met}


class Bench:
    """Measures rows on one device; the last model is kept for the rows that share it."""

    def __init__(self, device: Any, repeats: int):
        self.device, self.repeats = device, repeats
        self._key: Any = None
        self._model: Any = None

    def measure(self, names: Row) -> Row:
        """The measurements of one row."""
        import torch

        sizes = {k: v for k, v in names.items() if k not in ("kind", "batch", "passes", "windows")}
        if self._key != sizes:
            self._model, self._key = None, sizes
            self._model = untrained(device=self.device, **sizes, layer_types=_pattern(sizes))
        with torch.no_grad():
            if names["kind"] == "sleep":
                return self._sleep(names)
            return self._wake(names)

    def _ids(self, batch: int, tokens: int, seed: int = 0) -> Any:
        import torch

        drawn = torch.Generator().manual_seed(seed)
        shape = (batch, tokens)
        model = self._model
        return torch.randint(model.config.vocab_size, shape, generator=drawn).to(model.device)

    def _sleep(self, names: Row) -> Row:
        model, depth = self._model, names["passes"]
        ids = self._ids(names["batch"], names["window"])
        full = model(input_ids=ids, logits_to_keep=1).cache
        engine = model.model.engine

        def graph() -> Any:
            return model.sleep(full.copy(), passes=depth)

        def eager() -> Any:
            model.model.engine = None
            try:
                return model.sleep(full.copy(), passes=depth)
            finally:
                model.model.engine = engine

        def calls() -> None:
            for _ in range(depth):
                model(input_ids=ids)

        works = dict(zip(WAYS, (graph, eager, calls), strict=True))
        engine.forget()
        held = self._reserved()
        first = [self._timed(graph) for _ in range(2)]
        held = None if held is None else self._reserved() - held
        peaks = {name: self._peak(work) for name, work in works.items()}
        seconds = self._rounds(works)
        row = {
            "path": graph().path,
            "rounds": len(seconds["graph"]),
            "seconds": {name: _spread(values) for name, values in seconds.items()},
            "speedup": {
                name: _spread([a / b for a, b in zip(seconds["calls"], seconds[name], strict=True)])
                for name in ("graph", "eager")
            },
            "capture_seconds": first[1],
            "held_bytes": held,
            "peak_bytes": peaks,
        }
        engine.forget()
        return row

    def _wake(self, names: Row) -> Row:
        """Both caches get the same half window, then one token each in turn."""
        model, batch, window = self._model, names["batch"], names["window"]
        slept = None
        for number in range(names["windows"]):
            ids = self._ids(batch, window, number)
            slept = model(
                input_ids=ids, cache=slept, logits_to_keep=1,
                sleep_passes=names["passes"],
            ).cache  # fmt: skip
        model.sleep(slept, passes=names["passes"])
        half = self._ids(batch, max(1, window // 2), names["windows"])
        caches = {
            "before": model(input_ids=half, logits_to_keep=1).cache,
            "after": model(
                input_ids=half, cache=slept, logits_to_keep=1
            ).cache,
        }
        sleeps = int(caches["after"].sleeps[0])
        if sleeps != names["windows"]:
            raise RuntimeError(f"{sleeps} sleeps happened where {names['windows']} should have")
        token = self._ids(batch, 1)
        room = window - caches["before"].counts.max().item()

        def one(name: str) -> Callable[[], Any]:
            return lambda: model(input_ids=token, cache=caches[name])

        works = {name: one(name) for name in caches}
        # The window has to stay open: no token may bring a sleep with it.
        seconds = self._rounds(works, rounds=min(TOKENS, room - 1), least_seconds=0.0)
        ratios = [b / a for a, b in zip(seconds["before"], seconds["after"], strict=True)]
        model.model.engine.forget()
        return {
            "rounds": len(ratios),
            "seconds": {name: _spread(values) for name, values in seconds.items()},
            "ratio": _spread(ratios),
            "cache_bytes": {name: cache.nbytes() for name, cache in caches.items()},
        }

    def _timed(self, work: Callable[[], Any]) -> float:
        synchronise(self._model.device)
        began = time.perf_counter()
        work()
        synchronise(self._model.device)
        return time.perf_counter() - began

    def _rounds(
        self,
        works: Mapping[str, Callable[[], Any]],
        rounds: int | None = None,
        least_seconds: float = 3.0,
    ) -> dict[str, list[float]]:
        """Seconds of each, round by round; the first round warms up and is not kept."""
        for work in works.values():
            work()
        names, seconds = list(works), {name: [] for name in works}
        began, done = time.perf_counter(), 0
        rounds = self.repeats if rounds is None else rounds
        while done < rounds or time.perf_counter() < began + least_seconds:
            turn = done % len(names)
            for name in names[turn:] + names[:turn]:
                seconds[name].append(self._timed(works[name]))
            done += 1
        return seconds

    def _peak(self, work: Callable[[], Any]) -> int | None:
        """Bytes that `work` needs beside what is held when it starts; None on a CPU."""
        import torch

        if self._model.device.type != "cuda":
            return None
        device = self._model.device
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    def _reserved(self) -> int | None:
        import torch

        if self._model.device.type != "cuda":
            return None
        torch.cuda.synchronize(self._model.device)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self._model.device)


def _pattern(sizes: Row) -> list[str]:
    """Three state-space layers, then one of attention, and so on."""
    return [
        "full_attention" if i % 4 == 3 else "linear_attention" for i in range(sizes["layers"])
    ]


def _spread(values: list[float]) -> dict[str, Any]:
    low, _, high = quantiles(values, n=4, method="inclusive")
    return {"median": median(values), "quartiles": [low, high]}


def markdown(result: dict[str, Any]) -> str:
    """Sleeps, one row a model and depth; then single tokens."""
    head = ["state space", "B", "N", "graph, ms", "eager, ms", "N calls, ms", "graph against calls",
            "quartiles", "eager against calls", "path", "capture, ms", "held, MiB",
            "peak of graph / eager / calls, MiB"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for row in (row for row in result["rows"] if row["kind"] == "sleep"):
        fast, slow = (row["speedup"][name] for name in ("graph", "eager"))
        cells = [
            row["state_space"],
            str(row["batch"]),
            str(row["passes"]),
            *(f"{1000 * row['seconds'][name]['median']:.2f}" for name in WAYS),
            f"**{fast['median']:.2f}x**",
            " to ".join(f"{value:.2f}" for value in fast["quartiles"]),
            f"{slow['median']:.2f}x",
            row["path"],
            f"{1000 * row['capture_seconds']:.0f}",
            _mib(row["held_bytes"]),
            " / ".join(_mib(row["peak_bytes"][name]) for name in WAYS),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    wake = [row for row in result["rows"] if row["kind"] == "wake"]
    if wake:
        lines += ["", "| state space | B | token with a fresh cache, ms | after 64 windows, ms | "
                  "ratio | quartiles |", "|---|" + "---:|" * 5]  # fmt: skip
    for row in wake:
        before, after = (1000 * row["seconds"][name]["median"] for name in ("before", "after"))
        quartiles_ = " to ".join(f"{value:.3f}" for value in row["ratio"]["quartiles"])
        lines.append(
            f"| {row['state_space']} | {row['batch']} | {before:.2f} | {after:.2f} | "
            f"**{row['ratio']['median']:.3f}** | {quartiles_} |"
        )
    if "target" in result:
        target, verdict = result["target"], "met" if result["target"]["met"] else "**missed**"
        lines += ["", f"Target: a sleep from graphs at least {target['speedup']:g} times as fast "
                  f"as N calls, B={target['batch']}, N={target['passes']}, "
                  f"{target['state_space']}: {verdict}."]  # fmt: skip
    if not result["complete"]:
        lines += ["", f"Not complete ({result['ended']}); the same command goes on."]
    lines += [
        "",
        f"Measured on a GPU: d={SIZE['hidden']}, {SIZE['layers']} layers (three state-space, one "
        f"attention), heads of {SIZE['head_dim']}, {SIZE['dtype']}, windows of {SIZE['window']} "
        f"tokens, {SIZE['vocabulary']} words. Medians of rounds in one process, in rotating "
        "order. N = 1 only evicts. A call returns logits for the whole window and a cache. Held: "
        "memory that the graphs keep between sleeps; peak: on top of what is held.",
        "",
        describe(result["provenance"]),
    ]
    if result["command"]:
        lines += ["", f"`{result['command']}`"]
    return "\n".join(lines) + "\n"


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.0f}"


def figure(result: dict[str, Any]) -> Any:
    """How many times as fast as N calls a sleep is, with and without graphs."""
    from hybrid_sleep.eval.plots import BLUE, INK, ORANGE, new_figure

    rows = [row for row in result["rows"] if row["kind"] == "sleep" and row["passes"] > 1]
    rows.sort(key=lambda row: (row["state_space"], row["batch"], row["passes"]))
    picture, axes = new_figure("A sleep of depth N against N calls of the model, on a GPU", 9.6)
    for way, colour, marker, shift in (("graph", BLUE, "o", -0.1), ("eager", ORANGE, "^", 0.1)):
        middle = [row["speedup"][way]["median"] for row in rows]
        ends = [row["speedup"][way]["quartiles"] for row in rows]
        reach = [[abs(m - end[k]) for m, end in zip(middle, ends, strict=True)] for k in (0, 1)]
        axes.errorbar(
            [place + shift for place in range(len(rows))], middle, yerr=reach, color=colour,
            marker=marker, markersize=8, linestyle="none",
            label="sleep from CUDA graphs" if way == "graph" else "eager sleep",
        )  # fmt: skip
    axes.axhline(TARGET["speedup"], color=INK, linewidth=1.6, label="target at B=1, N=4")
    names = [f"{row['state_space']}\nB={row['batch']} N={row['passes']}" for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=7)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("times as fast as N calls", fontsize=13)
    picture.legend(fontsize=11, frameon=False, loc="outside lower center", ncols=3)
    return picture
