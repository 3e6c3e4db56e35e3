"""`hybrid-sleep facts`: facts in the weights of a model, and the folder that remembers them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid_sleep.cli.commands import command
from hybrid_sleep.cli.memories import (
    DATABASE,
    SETTINGS,
    Changes,
    Dtype,
    Folder,
    Model,
    OptionsFile,
    bars,
    opened,
    remembered,
    say,
)
from hybrid_sleep.cli.options import Device
from hybrid_sleep.support.io import (
    read_json,
    read_text,
    sole_writer,
    unreadable,
)

if TYPE_CHECKING:
    from hybrid_sleep.parametric import Fact, Relation

facts = typer.Typer(
    help="Facts in the weights of a model, learned at once and kept by sleep.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Subject = Annotated[str, typer.Argument(metavar="SUBJECT", help="Whom or what facts are about.")]
InRelation = Annotated[str | None, typer.Option(help="Only this one, such as 'lives in'.")]


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
    options: OptionsFile = None,
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
    with opened(folder, model, dtype, device, changes, options) as memory:
        say(memory.learn(found, known))


@facts.command("sleep")
@command
def sleep(
    folder: Folder,
    changes: Changes = None,
    options: OptionsFile = None,
    device: Device = "cpu",
) -> None:
    """Audit all facts, solve for them together, and keep that if the gate passes.

    Otherwise the weights are what they were, which is said; the exit code is 0 either way.
    """
    with opened(folder, device=device, changes=changes, file=options) as memory:
        with bars() as progress:
            record = memory.sleep(progress)
        say(record)
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
    options: OptionsFile = None,
    device: Device = "cpu",
) -> None:
    """Choose the strength of edits on facts that are not learned; a table and a figure of all."""
    probes, words = _read_facts(file, list(_stored_relations(folder).values()))
    with opened(folder, model, dtype, device, changes, options) as memory:
        typer.echo(memory.calibrate(probes, words).text())
    typer.echo(f"wrote {folder / 'calibration'}", err=True)


@facts.command("nap")
@command
def nap(folder: Folder, device: Device = "cpu") -> None:
    """Audit the newest facts; the weights stay as they are."""
    with opened(folder, device=device) as memory:
        say(memory.nap())


@facts.command("ask")
@command
def ask(
    folder: Folder,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="As a user's turn.")],
    device: Device = "cpu",
) -> None:
    """What the model replies, from its weights alone."""
    with opened(folder, device=device) as memory:
        typer.echo(memory.recall(question))


@facts.command("forget")
@command
def forget(
    folder: Folder, subject: Subject, relation: InRelation = None, device: Device = "cpu"
) -> None:
    """Take facts out of the weights; what the model said before comes back."""
    _check_known(folder, subject, relation)
    with opened(folder, device=device) as memory:
        say(memory.forget(subject, relation))


@facts.command("undo")
@command
def undo(folder: Folder, device: Device = "cpu") -> None:
    """Take the newest commit back, weights and facts; another undo goes further back."""
    with opened(folder, device=device) as memory:
        say(memory.undo())


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
    typer.echo(f"model: {remembered(folder).get('model', 'not remembered, give --model')}")
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
        with opened(folder, device=device) as memory:
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
    options: OptionsFile = None,
    device: Device = "cpu",
) -> None:
    """Take facts in for the next sleep, which writes them; `learn --file` writes them at once."""
    from hybrid_sleep.parametric.exchange import read_lines

    read_lines(file)
    with opened(folder, model, dtype, device, changes, options) as memory:
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
    with sole_writer(out), opened(folder, device=device) as memory:
        if memory.options.layers and not all(site.dense for site in memory.sites):
            raise ValueError("model must not be quantised: its facts lie beside the weights")
        model: Any = memory.model
        model.save_pretrained(out)
        memory.tokenizer.save_pretrained(out)
    typer.echo(f"wrote {out}")


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
