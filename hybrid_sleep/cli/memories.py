"""A memory in a folder as a command opens it: with the model that the folder remembers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid_sleep.support.io import read_json, read_text, unreadable, write_json_atomic

if TYPE_CHECKING:
    from hybrid_sleep.parametric import Memory, MemoryOptions, Record

MODEL, SETTINGS, DATABASE = "model.json", "memory.json", "facts.db"
# Installs from the package registry, where the hub is out of reach.
REAL_MODEL = "smollm2"

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the facts are kept.")]
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


OptionsFile = Annotated[
    Path | None,
    typer.Option(
        "--options", metavar="FILE",
        help="YAML with options of the memory, see configs/sleep/; remembered. --set overrides it.",
    ),
]  # fmt: skip


@contextmanager
def opened(
    folder: Path,
    model: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    changes: list[str] | None = None,
    file: Path | None = None,
) -> Iterator[Memory]:
    """The memory in `folder`, in the model that it remembers or that is given now.

    changes: of its options, as `--set` has them; they override those in `file`.
    """
    from hybrid_sleep.parametric import Memory
    from hybrid_sleep.parametric.store import FactStore

    kept = remembered(folder)
    wanted: dict[str, Any] = {
        "model": _absolute(model) if model else kept.get("model"),
        "dtype": dtype or kept.get("dtype") or "auto",
    }
    if wanted["model"] is None:
        raise ValueError(f"--model must be given at the first learn: {folder} remembers no model")
    if (folder / DATABASE).exists():
        # What another writer or a damaged store refuses need not wait until a model is loaded.
        FactStore.open(folder).close()
    options = given_options(folder, changes, file)
    network, tokenizer = _load(wanted["model"], wanted["dtype"], device)
    with Memory.open(folder, network, tokenizer, options=options) as memory:
        # Only now: a model with other weights than those of the facts was refused.
        if wanted != kept:
            write_json_atomic(folder / MODEL, wanted)
        if options is not None:
            write_json_atomic(folder / SETTINGS, memory.options.to_dict())
        yield memory


def remembered(folder: Path) -> dict[str, Any]:
    """What the folder says of its model; empty where it says nothing."""
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


def given_options(
    folder: Path, changes: list[str] | None, file: Path | None
) -> MemoryOptions | None:
    """The options of the folder, or the defaults, with those of `file` and then `changes`; None
    without either."""
    from hybrid_sleep.parametric.options import changed_options, chosen_options
    from hybrid_sleep.training.parsing import parse_overrides, parse_yaml

    if not changes and file is None:
        return None
    options = chosen_options(folder / SETTINGS, None)
    if file is not None:
        try:
            content = parse_yaml(read_text(file)) or {}
            if not isinstance(content, dict):
                raise ValueError("it must be names and values of options")
            options = changed_options(options, content)
        except ValueError as error:
            raise unreadable(file, error) from error
    given = parse_overrides(changes or [], example="wake.weight=400")
    return changed_options(options, dict(given))


def say(record: Record) -> None:
    """Show a record."""
    typer.echo(str(record))


@contextmanager
def bars() -> Iterator[Any]:
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
