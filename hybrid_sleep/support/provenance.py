"""Where a number came from: versions, commit, machine. Goes into every results.json."""

from __future__ import annotations

import ast
import datetime
import functools
import hashlib
import importlib
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

VERSIONS = ("torch", "transformers", "numpy")
# Kernels come from these; those that are not installed are not named.
KERNEL_PACKAGES = ("triton", "flash-linear-attention", "fla-core", "mamba-ssm", "causal-conv1d")
# On these times depend, and answers only by rounding.
MACHINE = ("device", "threads")
# What only shows numbers cannot change one: modules, and packages with all that is in them.
PRESENTATION = (
    "cli",
    "eval.render",
    "eval.results",
    "eval.tasks.show",
    "kernels.benchmarks.report",
    "support.markdown",
    "support.plots",
    "support.progress",
    "support.records",
    "support.terminal",
    "training.plots",
)


def provenance(device: Any = "cpu") -> dict[str, Any]:
    """Versions, commit, date (UTC), and the hardware behind `device` (a torch device or its name).

    `commit` is None outside a git checkout, and ends in "-dirty" if tracked files were changed.
    `source` is the `fingerprint` of the code, `packages` the versions of kernel packages.
    """
    import torch

    import hybrid_sleep

    return {
        "hybrid_sleep": hybrid_sleep.__version__,
        "commit": _commit(Path(hybrid_sleep.__file__).resolve().parent.parent),
        "python": platform.python_version(),
        # Unlike the distribution's, a module's version also says how it was built (+cpu, +cu130).
        **{name: importlib.import_module(name).__version__ for name in VERSIONS},
        "packages": {name: version for name in KERNEL_PACKAGES if (version := _version(name))},
        "source": fingerprint(),
        "device": _device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@functools.cache
def fingerprint() -> str:
    """12 hex digits that tell apart two states of the code that can give different numbers.

    All code of the package but `PRESENTATION`; comments, docstrings and layout do not count. A
    commit's name says less, as files may have changed since, and more, as most commits change no
    number.
    """
    return fingerprint_of(_folders())


def fingerprint_of(folders: Mapping[str, Path]) -> str:
    """`fingerprint` of the modules in `folders`, by what they are imported as: "" and, below it,
    "kernels", "training" and "eval", wherever they lie."""
    digest = hashlib.sha256()
    for name, path in sorted(_modules(folders)):
        tree = ast.parse(path.read_bytes(), str(path))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if ast.get_docstring(node, clean=False) is not None:
                    del node.body[0]
        digest.update(f"{name}: {ast.dump(tree)}\n".encode())
    return digest.hexdigest()[:12]


def _modules(
    folders: Mapping[str, Path], left_out: tuple[str, ...] = PRESENTATION
) -> Iterator[tuple[str, Path]]:
    """Dotted names within this package, and the files, of all modules but those `left_out`."""
    for top, folder in folders.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            # Installed, the other folders lie inside this package's own.
            if not top and parts[0] in folders:
                continue
            name = ".".join([top, *parts]).strip(".").removesuffix(".__init__")
            if not any(f"{name}.".startswith(f"{shown}.") for shown in left_out):
                yield name, path


def _folders() -> dict[str, Path]:
    package = __name__.partition(".")[0]
    found = {}
    for top in ("", "kernels", "training", "eval"):
        (place,) = importlib.import_module(f"{package}.{top}".rstrip(".")).__path__
        found[top] = Path(place).resolve()
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


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
        machine(record),
        record["date"],
    ]
    return "; ".join(parts)


def machine(record: dict[str, Any]) -> str:
    """The machine of a `provenance` record, in words."""
    return f"{record['device']}, {record['threads']} threads"


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
