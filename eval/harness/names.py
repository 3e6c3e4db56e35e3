"""Whether a task has a name, found in seconds: lm-eval takes a minute to list its own tasks."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path

from hybrid_sleep.eval.harness.tasks import PREFIX, names
from hybrid_sleep.training.schema import alike

_DECLARED = re.compile(rb"^(?:task|group|tag):[ \t]*[\"']?([\w.-]+)", re.MULTILINE)


def check_names(wanted: Sequence[str], include_path: str | os.PathLike | None = None) -> None:
    """Raise ValueError for the first name that is not one of ours and occurs in no task file.

    Files: lm-eval's own and those in `include_path`. A name that occurs in one may still not be a
    task's, which lm-eval knows once it has loaded them all.
    """
    left = [name for name in wanted if name not in names()]
    for name in left:
        if name.startswith(PREFIX):
            raise unknown_task(name)
    folders = [] if include_path is None else [Path(include_path)]
    found = importlib.util.find_spec("lm_eval")
    if found is None:
        return
    folders += [Path(place) / "tasks" for place in found.submodule_search_locations or ()]
    missing = {
        name: re.compile(rb"(?<![\w-])" + re.escape(name.encode()) + rb"(?![\w-])") for name in left
    }
    known: set[str] = set()
    for folder in folders:
        # What a task file includes need not end in .yaml.
        for path in folder.rglob("*yaml*"):
            if not missing:
                return
            content = path.read_bytes() if path.is_file() else b""
            missing = {n: word for n, word in missing.items() if not word.search(content)}
            known |= {match.decode() for match in _DECLARED.findall(content)}
    if missing:
        raise unknown_task(next(iter(missing)), known)


def unknown_task(name: str, known: set[str] = frozenset()) -> ValueError:
    """The error for a name of no task, with similar ones of `known` and of ours."""
    own = names()
    ours = f" (did you mean {PREFIX}{name}?)" if PREFIX + name in own else ""
    return ValueError(
        f"tasks must be among {', '.join(own)}; those in include_path (lm-eval leaves out a file "
        "that it cannot load); and lm-eval's own, which `lm-eval ls tasks` lists; got "
        f"{name!r}{ours or alike(name, sorted(known | set(own)))}"
    )
