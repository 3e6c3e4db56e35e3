"""What this machine has, and which path each op takes on it and why.

`report()` is plain data, ready for JSON; `render(console)` prints it as tables. Optional packages
are looked up without importing them: some of them fail, or take a GPU, on import.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils import is_flash_attn_2_available

import hybrid_sleep
from hybrid_sleep.capture import outlook
from hybrid_sleep.kernels import dispatch

DISTRIBUTION = "hybrid-sleep"
REQUIRED = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "matplotlib",
)
# Distribution, import name, and what it is good for here.
OPTIONAL = (
    ("triton", "triton", "the GPU kernels of every op below"),
    ("deepspeed", "deepspeed", "training on several devices"),
    ("lm-eval", "lm_eval", "standard benchmarks"),
    ("flash-attn", "flash_attn", "attn_implementation='flash_attention_2'"),
    ("flash-linear-attention", "fla", "gated_delta_rule on a GPU where the Triton kernels decline"),
    ("causal-conv1d", "causal_conv1d", "short_conv, likewise"),
    ("mamba-ssm", "mamba_ssm", "ssd without gradients, likewise"),
)
# One token is generation; a window of them is reading, training and sleep.
CALLS = (("one token", 1), ("a window", 1024))
TITLES = {
    "machine": "Machine",
    "software": "Software",
    "optional": "Optional packages (looked up, not imported)",
    "attention": "Attention implementations",
    "ops": "Ops: the path each call takes, and why",
    "sleep": "Sleep: how model.sleep runs its passes, and why",
}
# What a container may use, where there is one.
CONTAINER = Path("/sys/fs/cgroup")

Row = dict[str, Any]


def report() -> list[Row]:
    """Everything doctor knows, one row a fact, as plain JSON data.

    Every row has `section` (a key of TITLES), `name`, `value` (what is so), `ok` (False where
    something this package needs is missing or out of range) and `why`. Rows of the section `ops`
    also have `device`, `dtype`, `tokens` and `candidates`: implementation -> why it is not taken,
    "" for the one that is.
    """
    return [*_machine(), *_software(), *_optional(), *_attention(), *_ops(), *_sleep()]


def render(console: Console | None = None, rows: list[Row] | None = None) -> None:
    """Print `rows` (default: a fresh report) to `console` (default: standard output) as tables."""
    console = console or Console()
    rows = report() if rows is None else rows
    for section, title in TITLES.items():
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
        for style in ("", "", "dim"):
            table.add_column(overflow="fold", style=style)
        for row in rows:
            if row["section"] == section:
                cells = (Text(str(row[key])) for key in ("name", "value", "why"))
                table.add_row(*cells, style="" if row["ok"] else "bold red")
        console.print(table)


def _row(section: str, name: str, value: Any, why: str = "", ok: bool = True, **more: Any) -> Row:
    return {"section": section, "name": name, "value": value, "ok": ok, "why": why, **more}


def _machine() -> Iterator[Row]:
    yield _row("machine", "system", f"{platform.system()} {platform.machine()}")
    threads = torch.get_num_threads()
    yield _row("machine", "CPU cores", _cores(), f"torch uses {threads} threads")
    memory = _memory()
    yield _row("machine", "memory", "unknown" if memory is None else _gib(memory))
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = f"torch is built for {built} but finds no device" if built else "torch is a CPU build"
        yield _row("machine", "GPU", "none", why)
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        why = f"{_gib(device.total_memory)}, compute capability {device.major}.{device.minor}"
        yield _row("machine", f"GPU {index}", device.name, why)


def _cores() -> int:
    """Cores this process may use: the machine's, or its container's share where that is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = _container("cpu.max")
    return min(cores or 1, math.ceil(share[0] / share[1])) if len(share) == 2 else cores or 1


def _memory() -> int | None:
    """Bytes this process may use: the machine's memory, or its container's where that is less."""
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):
        return None
    return min([machine, *_container("memory.max")])


def _container(name: str) -> list[int]:
    """The numbers in a container's limit file; none without a container or a limit."""
    file = CONTAINER / name
    words = file.read_text().split() if file.is_file() else []
    return [int(word) for word in words] if all(word.isdecimal() for word in words) else []


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _software() -> Iterator[Row]:
    wanted = _requirements()
    yield _row("software", "hybrid_sleep", hybrid_sleep.__version__, _installation())
    yield _in_range("python", platform.python_version(), wanted.get("python"))
    for name in REQUIRED:
        yield _in_range(name, _version(name), wanted.get(name))


def _requirements() -> dict[str, Requirement]:
    """What this package asks of others, by name; empty where it is not installed."""
    try:
        about = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return {}
    python = f"python{about.get('Requires-Python') or ''}"
    lines = [python, *(about.get_all("Requires-Dist") or [])]
    wanted = [Requirement(line) for line in lines]
    return {line.name: line for line in wanted if "extra" not in str(line.marker)}


def _installation() -> str:
    folder = Path(hybrid_sleep.__file__).resolve().parents[1]
    return f"from {folder}" if _version(DISTRIBUTION) else f"not installed; found in {folder}"


def _in_range(name: str, version: str | None, wanted: Requirement | None) -> Row:
    if version is None:
        return _row("software", name, "not found", "this package needs it", ok=False)
    if wanted is None or not wanted.specifier:
        return _row("software", name, version)
    inside = wanted.specifier.contains(version, prereleases=True)
    why = f"needs {wanted.specifier}"
    return _row("software", name, version, why if inside else f"out of range: {why}", ok=inside)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _optional() -> Iterator[Row]:
    for distribution, module, purpose in OPTIONAL:
        found = util.find_spec(module) is not None
        version = _version(distribution) or "found, version unknown"
        yield _row("optional", distribution, version if found else "not found", purpose)


def _attention() -> Iterator[Row]:
    yield _row("attention", "sdpa", "available", "torch's fused attention; the default")
    yield _row("attention", "eager", "available", "written out, no fused kernel")
    if is_flash_attn_2_available():
        yield _row("attention", "flash_attention_2", "available", "flash-attn and a GPU are here")
    else:
        why = "needs a GPU and the package flash-attn"
        yield _row("attention", "flash_attention_2", "not available", why)


def _devices() -> list[tuple[str, torch.dtype]]:
    """Where models can lie here, and the dtype they usually have there."""
    on_gpu = [("cuda", torch.bfloat16)] if torch.cuda.is_available() else []
    return [("cpu", torch.float32), *on_gpu]


def _sleep() -> Iterator[Row]:
    for device, _ in _devices():
        path, why = outlook(device)
        yield _row("sleep", f"a sleep on {device}", path, why, device=device)


def _ops() -> Iterator[Row]:
    for device, dtype in _devices():
        for op in dispatch.OPS:
            for label, tokens in CALLS:
                path = dispatch.explain(op, tokens=tokens, device=device, dtype=dtype)
                # That another path could run but ranks lower is implied by the one taken.
                others = [
                    f"{name}: {why}"
                    for name, why in path["candidates"].items()
                    if why and why != f"{path['implementation']} is preferred"
                ]
                yield _row(
                    "ops",
                    f"{op} of {label} on {device}",
                    path["implementation"],
                    "; ".join([path["reason"], *others]),
                    device=device,
                    dtype=path["call"]["dtype"],
                    tokens=tokens,
                    candidates=path["candidates"],
                )
