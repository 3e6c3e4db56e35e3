"""Where a number came from: versions, commit, machine. Goes into every results.json."""

from __future__ import annotations

import datetime
import importlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

VERSIONS = ("torch", "transformers", "numpy")


def provenance(device: Any = "cpu") -> dict[str, Any]:
    """Versions, commit, date (UTC), and the hardware behind `device` (a torch device or its name).

    `commit` is None outside a git checkout, and ends in "-dirty" if tracked files were changed.
    """
    import torch

    import hybrid_sleep

    return {
        "hybrid_sleep": hybrid_sleep.__version__,
        "commit": _commit(Path(hybrid_sleep.__file__).resolve().parent.parent),
        "python": platform.python_version(),
        # Unlike the distribution's, a module's version also says how it was built (+cpu, +cu130).
        **{name: importlib.import_module(name).__version__ for name in VERSIONS},
        "device": _device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def check_device(device: str) -> str:
    """`device` if torch can compute on it here; ValueError saying what there is otherwise."""
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = None
    if kind == "cpu" or (kind == "cuda" and torch.cuda.is_available()):
        return device
    found = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    raise ValueError(f"device={device!r}; allowed here: {', '.join(['cpu', *found])}")


def describe(record: dict[str, Any]) -> str:
    """One line of Markdown for a `provenance` record."""
    commit = record["commit"]
    parts = [
        f"hybrid_sleep {record['hybrid_sleep']}" + (f" ({commit})" if commit else ""),
        f"Python {record['python']}",
        *(f"{name} {record[name]}" for name in VERSIONS),
        f"{record['device']}, {record['threads']} threads",
        record["date"],
    ]
    return "; ".join(parts)


def _commit(root: Path) -> str | None:
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changed else commit


def _git(root: Path, *args: str) -> str:
    command = ["git", "-C", str(root), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _device_name(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    affinity = getattr(os, "sched_getaffinity", None)
    return f"{name}, {len(affinity(0)) if affinity else os.cpu_count()} cores"
