"""`hybrid-sleep facts`: facts in the weights of a model, and the folder that remembers them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid_sleep.cli.commands import command
from hybrid_sleep.cli.options import Device
from hybrid_sleep.support.io import (
    read_json,
    read_text,
    sole_writer,
    unreadable,
    write_json_atomic,
)

if TYPE_CHECKING:
    from hybrid_sleep.parametric import Fact, Memory, MemoryOptions, Record, Relation

facts = typer.Typer(
    help="Facts in the weights of a model, learned at once and kept by sleep.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

MODEL, SETTINGS, DATABASE = "model.json", "memory.json", "facts.db"
# Installs from the package registry, where the hub is out of reach.
REAL_MODEL = "smollm2"

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the facts are kept.")]
Subject = Annotated[str, typer.Argument(metavar="SUBJECT", help="Whom or what facts are about.")]
InRelation = Annotated[str | None, typer.Option(help="Only this one, such as 'lives in'.")]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help=f"A folder, a name on the hub, or {REAL_MODEL}; the folder of facts remembers it.",
    ),
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16...; remembered (default: as saved).")
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Options of the memory, such as cap=200; remembered."
    ),
]


@facts.command("learn")
@command
def learn(
    folder: Folder,
    sentences: Annotated[
        list[str] | None,
        typer.Argument(metavar="SENTENCE", help="Such as 'Ada Byron lives in Lisbon.'"),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Facts as export writes them, or sentences, one a line.")
    ] = None,
    relations: Annotated[
        Path | None, typer.Option(help="JSON or YAML: a list of relations and their words.")
    ] = None,
    model: Model = None,
    dtype: Dtype = None,
    changes: Changes = None,
    device: Device = "cpu",
) -> None:
    """Write facts into the weights at once; says what was left out, and why."""
    from hybrid_sleep.parametric import check_facts, parse_fact

    known = _read_relations(relations) if relations else []
    # The words that the folder has are read as well, and all is checked before a model is loaded.
    words = {**_stored_relations(folder), **{r.name.casefold(): r for r in known}}
    found = [parse_fact(sentence, words.values()) for sentence in sentences or ()]
    if file:
        given, own = _read_facts(file, list(words.values()))
        found, known = found + given, [*own, *known]
    if not found:
        raise ValueError("SENTENCE or --file must give a fact, got none")
    check_facts(found)
    with _opened(folder, model, dtype, device, changes) as memory:
        _say(memory.learn(found, known))


@facts.command("sleep")
@command
def sleep(folder: Folder, changes: Changes = None, device: Device = "cpu") -> None:
    """Audit all facts, solve for them together, and keep that if the gate passes.

    Otherwise the weights are what they were, which is said; the exit code is 0 either way.
    """
    with _opened(folder, device=device, changes=changes) as memory:
        with _bars() as progress:
            record = memory.sleep(progress)
        _say(record)
    if record.outcome == "rolled back":
        typer.echo("The gate did not pass: the weights are what they were before this sleep.")


@facts.command("calibrate")
@command
def calibrate(
    folder: Folder,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Probe facts, as for learn.")],
    model: Model = None,
    dtype: Dtype = None,
    changes: Changes = None,
    device: Device = "cpu",
) -> None:
    """Choose the strength of edits on facts that are not learned; a table and a figure of all."""
    probes, words = _read_facts(file, list(_stored_relations(folder).values()))
    with _opened(folder, model, dtype, device, changes) as memory:
        typer.echo(memory.calibrate(probes, words).text())
    typer.echo(f"wrote {folder / 'calibration'}", err=True)


@facts.command("nap")
@command
def nap(folder: Folder, device: Device = "cpu") -> None:
    """Audit the newest facts; the weights stay as they are."""
    with _opened(folder, device=device) as memory:
        _say(memory.nap())


@facts.command("ask")
@command
def ask(
    folder: Folder,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="As a user's turn.")],
    device: Device = "cpu",
) -> None:
    """What the model replies, from its weights alone."""
    with _opened(folder, device=device) as memory:
        typer.echo(memory.recall(question))


@facts.command("forget")
@command
def forget(
    folder: Folder, subject: Subject, relation: InRelation = None, device: Device = "cpu"
) -> None:
    """Take facts out of the weights; what the model said before comes back."""
    _check_known(folder, subject, relation)
    with _opened(folder, device=device) as memory:
        _say(memory.forget(subject, relation))


@facts.command("undo")
@command
def undo(folder: Folder, device: Device = "cpu") -> None:
    """Take the newest commit back, weights and facts; another undo goes further back."""
    with _opened(folder, device=device) as memory:
        _say(memory.undo())


@facts.command("status")
@command
def status(folder: Folder) -> None:
    """Facts by state, commits, the model, and where edits go; loads no model."""
    from hybrid_sleep.parametric.schema import DEGRADED, QUARANTINED
    from hybrid_sleep.parametric.store import FactStore

    with FactStore.open(folder, write=False) as store:
        states: dict[str, int] = {}
        for known in (kept := store.facts()):
            states[known.state] = states.get(known.state, 0) + 1
        history = store.history()
    counts = ", ".join(f"{number} {state}" for state, number in states.items())
    typer.echo(f"facts: {counts or 'none'}")
    for known in kept:
        if known.state in (DEGRADED, QUARANTINED):
            typer.echo(f"  {known.state}: {known.fact}")
    if history:
        last = history[-1]
        typer.echo(f"commits: {len(history)}, the last {last.time}: {last.kind}, {last.status}")
    typer.echo(f"model: {_remembered(folder).get('model', 'not remembered, give --model')}")
    settings = folder / SETTINGS
    if settings.exists():
        layers = read_json(settings).get("layers") or ["not chosen yet"]
        typer.echo(f"layers of the edits: {', '.join(map(str, layers))}")


@facts.command("explain")
@command
def explain(
    folder: Folder,
    subject: Subject,
    relation: InRelation = None,
    today: Annotated[
        bool, typer.Option("--today", help="Load the model, and test every wording now.")
    ] = False,
    device: Device = "cpu",
) -> None:
    """When facts came and from where, what they changed in the weights, how they tested."""
    from hybrid_sleep.parametric.store import FactStore

    ids = _check_known(folder, subject, relation)
    if today:
        with _opened(folder, device=device) as memory:
            told = memory.explain(subject, relation)
    else:
        with FactStore.open(folder, write=False) as store:
            told = [store.explain(number) for number in ids]
    typer.echo("\n\n".join("\n".join(_explained(one)) for one in told))


@facts.command("export")
@command
def export(
    folder: Folder,
    out: Annotated[Path | None, typer.Option(help="A file (default: standard output).")] = None,
) -> None:
    """Facts as JSON Lines, with the words of their relations; loads no model."""
    from hybrid_sleep.parametric.store import FactStore
    from hybrid_sleep.support.io import write_text_atomic

    with FactStore.open(folder, write=False) as store:
        lines = list(store.export_lines())
    if out is None:
        for line in lines:
            typer.echo(line)
    else:
        write_text_atomic(out, "".join(f"{line}\n" for line in lines))
        typer.echo(f"wrote {len(lines)} facts to {out}")


@facts.command("import")
@command
def import_(
    folder: Folder,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Facts as export writes them.")],
    model: Model = None,
    dtype: Dtype = None,
    changes: Changes = None,
    device: Device = "cpu",
) -> None:
    """Take facts in for the next sleep, which writes them; `learn --file` writes them at once."""
    from hybrid_sleep.parametric.exchange import read_lines

    read_lines(file)
    with _opened(folder, model, dtype, device, changes) as memory:
        assert memory.store is not None
        added = memory.store.import_lines(file)
    typer.echo(f"{len(set(added))} facts are known; what is new of them waits for the next sleep")


@facts.command("save")
@command
def save(
    folder: Folder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    device: Device = "cpu",
) -> None:
    """Save the model with its facts, as an ordinary model of transformers."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"OUT must be a new or an empty folder, got {out}")
    with sole_writer(out), _opened(folder, device=device) as memory:
        if memory.options.layers and not all(site.dense for site in memory.sites):
            raise ValueError("model must not be quantised: its facts lie beside the weights")
        model: Any = memory.model
        model.save_pretrained(out)
        memory.tokenizer.save_pretrained(out)
    typer.echo(f"wrote {out}")


# The folder and its model


@contextmanager
def _opened(
    folder: Path,
    model: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    changes: list[str] | None = None,
) -> Iterator[Memory]:
    """The memory in `folder`, in the model that it remembers or that is given now."""
    from hybrid_sleep.parametric import Memory
    from hybrid_sleep.parametric.store import FactStore

    kept = _remembered(folder)
    wanted: dict[str, Any] = {
        "model": _absolute(model) if model else kept.get("model"),
        "dtype": dtype or kept.get("dtype") or "auto",
    }
    if wanted["model"] is None:
        raise ValueError(f"--model must be given at the first learn: {folder} remembers no model")
    if (folder / DATABASE).exists():
        # What another writer or a damaged store refuses need not wait until a model is loaded.
        FactStore.open(folder).close()
    options = _options(folder, changes)
    network, tokenizer = _load(wanted["model"], wanted["dtype"], device)
    with Memory.open(folder, network, tokenizer, options=options) as memory:
        # Only now: a model with other weights than those of the facts was refused.
        if wanted != kept:
            write_json_atomic(folder / MODEL, wanted)
        if options is not None:
            write_json_atomic(folder / SETTINGS, memory.options.to_dict())
        yield memory


def _remembered(folder: Path) -> dict[str, Any]:
    path = folder / MODEL
    return read_json(path) if path.exists() else {}


def _absolute(model: str) -> str:
    """A folder as it is found from everywhere; other names as they are."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_dir() else model


def _load(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """The model and its tokenizer; ValueError or OSError, naming it, if that fails."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import hybrid_sleep.modeling  # noqa: F401  so that the Auto classes know our models

    kind = getattr(torch, dtype, None)
    if dtype != "auto" and not isinstance(kind, torch.dtype):
        raise ValueError(f"dtype must be auto or a floating type of torch, got {dtype!r}")
    try:
        device_ = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be one of torch, got {device!r}") from error
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    source: str | Path = name
    if name == REAL_MODEL:
        from hybrid_sleep.support.real_models import real_model

        try:
            source = real_model()
        except ModuleNotFoundError as error:
            raise ValueError(str(error)) from error
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype="auto" if dtype == "auto" else kind, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"model must be a causal one of transformers, got {name}: {reason}"
        ) from error
    return model.eval().to(device_), tokenizer


def _options(folder: Path, changes: list[str] | None) -> MemoryOptions | None:
    """The options of the folder, or the defaults, with `changes`; None without any."""
    from hybrid_sleep.parametric import MemoryOptions
    from hybrid_sleep.parametric.options import chosen_options
    from hybrid_sleep.training.parsing import parse_overrides

    if not changes:
        return None
    content = chosen_options(folder / SETTINGS, None).to_dict()
    for key, value in parse_overrides(changes, example="wake.weight=400"):
        *above, last = key.split(".")
        part: Any = content
        for name in above:
            part = part.get(name) if isinstance(part, dict) else None
        if not isinstance(part, dict) or last not in part or isinstance(part[last], dict):
            raise ValueError(f"--set must name an option of the memory, got {key!r}")
        part[last] = value
    try:
        return MemoryOptions.from_dict(content)
    except TypeError as error:
        raise ValueError(f"--set must give values of the right kind: {error}") from error


# Facts and relations that a user wrote


def _stored_relations(folder: Path) -> dict[str, Relation]:
    from hybrid_sleep.parametric.store import FactStore

    if not (folder / DATABASE).exists():
        return {}
    with FactStore.open(folder, write=False) as store:
        names = {known.fact.key[1] for known in store.facts()}
        return {name: store.relation(name) for name in sorted(names)}


def _read_relations(path: Path) -> list[Relation]:
    from hybrid_sleep.parametric import Relation
    from hybrid_sleep.training.parsing import parse_yaml

    try:
        content = parse_yaml(read_text(path))
        if not isinstance(content, list) or not all(isinstance(x, dict) for x in content):
            raise ValueError("it must be a list of relations, each with name and statements")
        return [Relation.from_dict(one) for one in content]
    except (ValueError, TypeError) as error:
        raise unreadable(path, error) from error


def _read_facts(path: Path, known: list[Relation]) -> tuple[list[Fact], list[Relation]]:
    """Facts and their relations, of JSON Lines or of sentences, one a line."""
    from hybrid_sleep.parametric import parse_fact
    from hybrid_sleep.parametric.exchange import read_lines

    text = read_text(path)
    if text.lstrip().startswith("{"):
        found, relations, _ = read_lines(path)
        return found, relations
    facts = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                facts.append(parse_fact(line.strip(), known))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    return facts, []


def _check_known(folder: Path, subject: str, relation: str | None) -> list[int]:
    """Ids of the facts about `subject`; ValueError if there is none."""
    from hybrid_sleep.parametric.store import FactStore

    with FactStore.open(folder, write=False) as store:
        ids = [known.id for known in store.find(subject, relation)]
    if not ids:
        what = subject if relation is None else f"{subject} {relation}"
        raise ValueError(f"SUBJECT must be of a fact in {folder}, got {what!r}")
    return ids


# What is shown


def _say(record: Record) -> None:
    typer.echo(str(record))


@contextmanager
def _bars() -> Iterator[Any]:
    """A bar for each step of a sleep, in turn."""
    from hybrid_sleep.support.progress import progress_bar

    with ExitStack() as bar:
        shown: dict[str, Any] = {}

        def update(step: str, done: int, total: int) -> None:
            if step not in shown:
                bar.pop_all().close()
                shown[step] = bar.enter_context(progress_bar(step))
            shown[step](done, total)

        yield update


def _explained(told: dict[str, Any]) -> Iterator[str]:
    yield f"{told['subject']} {told['relation']} {told['object']}"
    yield f"  {told['state']}, version {told['version']}, since {told['created']}"
    if told["source"] is not None:
        yield f"  from: {' '.join(told['source'].split())}"
    for other in told["versions"]:
        if other["id"] != told["id"]:
            yield f"  version before or after: {other['object']}, {other['state']}"
    for commit in told["commits"]:
        yield (
            f"  commit {commit['id']}, {commit['kind']} at {commit['time']}: "
            f"{commit['before']} -> {commit['after']}"
        )
    for edit in told["edits"]:
        figures = {k: v for k, v in edit.items() if k not in ("commit", "site")}
        yield f"  edit of commit {edit['commit']} at {edit['site']}: {_figures(figures)}"
    if told["audit"]:
        yield f"  audit at {told['audit']['time']}: {_figures(told['audit']['results'])}"
    if "today" in told:
        yield f"  today: {_figures(told['today'])}"


def _figures(values: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_figure(value)}" for name, value in values.items())


def _figure(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else json.dumps(value)
