"""Results of benchmarks as data: a dataclass a kind, read and written as results.json, and shown.

A result is saved as three files: results.json, and a Markdown table and a figure that are made of
it alone, by the renderer of its kind.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pkgutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from hybrid_sleep.support.io import write_text_atomic
from hybrid_sleep.support.markdown import DONE
from hybrid_sleep.support.markdown import footer as footer_of
from hybrid_sleep.support.plots import save_figure
from hybrid_sleep.support.records import read_records, write_records


class Kind(NamedTuple):
    """Where a kind of result is shown, and what it is read as.

    renderer: module with `markdown(result) -> str` and `figure(result)`. figure: name of the file.
    result: the subclass of `Result`, as "module:name"; without one the renderer gets a dict.
    """

    renderer: str
    figure: str
    result: str | None = None


COSTS, RENDER = "hybrid_sleep.eval.costs", "hybrid_sleep.eval.render"
FACTS = "hybrid_sleep.eval.facts"
STUDIES = "hybrid_sleep.eval.studies"
KINDS = {
    "depth": Kind(
        f"{RENDER}.depth", "accuracy.png", "hybrid_sleep.eval.measure.depth:DepthResult"
    ),
    "demo": Kind(f"{RENDER}.demo", "accuracy.png", "hybrid_sleep.eval.demo:DemoResult"),
    "generation": Kind(
        f"{RENDER}.generation", "generation.png", f"{COSTS}.generation:GenerationCost"
    ),
    "decoding": Kind(f"{RENDER}.decoding", "decoding.png", f"{COSTS}.decoding:DecodingCost"),
    "cost": Kind(f"{RENDER}.cost", "cost.png", f"{COSTS}.cost:Cost"),
    "kernels": Kind("hybrid_sleep.kernels.benchmarks.report", "kernels.png"),
    "base": Kind("hybrid_sleep.kernels.benchmarks.report", "base.png"),
    "fallback": Kind("hybrid_sleep.kernels.benchmarks.report", "fallback.png"),
    "sleep": Kind(f"{RENDER}.sleep_cpu", "sleep.png", f"{COSTS}.sleep_cpu:SleepCost"),
    "sleep_gpu": Kind(f"{RENDER}.sleep_gpu", "sleep.png", f"{COSTS}.sleep_gpu:GpuSleepCost"),
    "training": Kind(f"{RENDER}.training", "training.png", f"{COSTS}.training:TrainingCost"),
    "facts": Kind(f"{RENDER}.facts", "facts.png", f"{FACTS}.bench:FactsResult"),
    "continual": Kind(
        f"{RENDER}.continual",
        "continual.png",
        "hybrid_sleep.eval.continual.bench:ContinualResult",
    ),
    "bridge": Kind(
        f"{RENDER}.bridge", "bridge.png", "hybrid_sleep.eval.bridge.bench:BridgeResult"
    ),
    "nights": Kind(
        f"{RENDER}.nights", "nights.png", "hybrid_sleep.eval.nights.bench:NightsResult"
    ),
    "harness": Kind(
        f"{RENDER}.harness", "accuracy.png", "hybrid_sleep.eval.harness.result:HarnessResult"
    ),
    "map": Kind(f"{RENDER}.depth_map", "map.png", f"{STUDIES}.depth_map:DepthMap"),
    "comparison": Kind(
        f"{RENDER}.comparison", "accuracy.png", f"{STUDIES}.comparison:Comparison"
    ),
}


@dataclass(frozen=True, kw_only=True)
class AnswersRow:
    """A row of a benchmark of answers, which may be of several machines (`collect`'s `anywhere`).

    machine: where it was measured; None: where the result's provenance says.
    """

    machine: str | None = None


@dataclass(kw_only=True)
class Result:
    """What every kind has; a subclass is a dataclass with a `benchmark` and fields of its own.

    provenance: see `support.provenance`. command: what gives this result again. ended: "done", or
    why the work stopped earlier; `continues`: whether the same call would then do the rest.

    Fields hold what was measured or chosen; what follows from them is a property or a method. They
    must come back from JSON as they were: numbers, text, None, lists, dicts (keys may be integers)
    and dataclasses of these, all with type annotations.
    """

    benchmark: ClassVar[str]
    continues: ClassVar[bool] = True
    provenance: dict[str, Any]
    command: str | None = None
    ended: str = field(default=DONE)

    @property
    def complete(self) -> bool:
        """Whether all that was planned has been measured."""
        return self.ended == DONE

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> Self:
        """The result that is in a results.json; ValueError (pydantic's) if it is not one.

        Entries that no field is named after are left out: earlier versions wrote more.
        """
        from pydantic import TypeAdapter

        if "ended" not in content and content.get("complete") is False:
            content = {**content, "ended": "interrupted"}
        return TypeAdapter(cls).validate_python(content)

    def content(self) -> dict[str, Any]:
        """What goes into results.json."""
        return {"benchmark": self.benchmark, **dataclasses.asdict(self)}

    def footer(self, versions: str = "") -> list[str]:
        """The last lines of a results.md; see `support.markdown.footer`."""
        rows: list[Any] = getattr(self, "rows", [])
        machines = Counter(row.machine for row in rows if getattr(row, "machine", None))
        others = [f"{n} of {len(rows)} rows on {name}" for name, n in sorted(machines.items())]
        return footer_of(
            self.provenance,
            self.command,
            self.ended,
            "; ".join([*([versions] if versions else []), *others]),
            continues=self.continues,
        )


def save(result: Result | dict[str, Any], out: str | os.PathLike) -> list[Path]:
    """Write results.json, results.md and the figure into `out`, each atomically; their paths."""
    path = Path(out) / "results.json"
    write_records(path, result.content() if isinstance(result, Result) else result)
    # Made of what the file gives back, so that `render` makes the same.
    return [path, *render(path)]


def render(path: str | os.PathLike) -> list[Path]:
    """Make table and figure beside a results.json anew; their paths.

    Raises OSError or ValueError if the file cannot be read, is damaged, or is not the result of a
    benchmark this version knows.
    """
    path = Path(path)
    content = read_records(path)
    name = content.get("benchmark")
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(
            f"{path}: benchmark must be one of {', '.join(KINDS)}, got {name!r}{_writer(content)}"
        )
    kind = KINDS[name]
    renderer = importlib.import_module(kind.renderer)
    table, figure = path.with_name("results.md"), path.with_name(kind.figure)
    result = content if kind.result is None else _typed(kind.result, content, path)
    try:
        text, picture = renderer.markdown(result), renderer.figure(result)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise _not_shown(path, content, f"{type(error).__name__}: {error}") from error
    write_text_atomic(table, text)
    save_figure(picture, figure)
    return [table, figure]


def read(path: str | os.PathLike, kind: type[Result]) -> Any:
    """The result in `path`, a `kind`; OSError or ValueError, naming the file, if it is none."""
    content = read_records(path)
    if content.get("benchmark") != kind.benchmark:
        found = content.get("benchmark")
        raise ValueError(f"{path}: benchmark must be {kind.benchmark!r}, got {found!r}")
    return _parse(kind, content, path)


def _typed(name: str, content: dict[str, Any], path: Path) -> Result:
    return _parse(pkgutil.resolve_name(name), content, path)


def _parse(kind: type[Result], content: dict[str, Any], path: str | os.PathLike) -> Any:
    from pydantic import ValidationError

    try:
        return kind.from_content(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise _not_shown(path, content, f"{place}: {first['msg']}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise _not_shown(path, content, f"{type(error).__name__}: {error}") from error


def _not_shown(path: str | os.PathLike, content: dict[str, Any], reason: str) -> ValueError:
    return ValueError(
        f"{path} is no result that this version can show ({reason}){_writer(content)}"
    )


def _writer(content: dict[str, Any]) -> str:
    """Which version wrote a result, whose own `bench render` can still show it."""
    record = content.get("provenance")
    if not isinstance(record, dict) or not {"hybrid_sleep", "commit"} <= record.keys():
        return ""
    return f"; it was written by hybrid_sleep {record['hybrid_sleep']} ({record['commit']})"
