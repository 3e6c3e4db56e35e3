"""What this machine has, which versions were tested, and which implementation each op uses here.

`report()` is plain data, ready for JSON; `render(console)` prints it as tables. Optional packages
are looked up without importing them: some of them fail, or take a GPU, on import.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils import is_flash_attn_2_available

import hybrid_sleep
from hybrid_sleep.kernels.common import dispatch
from hybrid_sleep.sleep import compiling, cuda_graphs
from hybrid_sleep.support import versions

# Distribution, import name, and what it is good for here.
OPTIONAL = (
    ("triton", "triton", "the GPU kernels of every op below"),
    ("deepspeed", "deepspeed", "training on several devices"),
    ("datasets", "datasets", "training on data sets of the hub"),
    ("tensorboard", "tensorboard", "curves of a training run"),
    ("lm-eval", "lm_eval", "standard benchmarks"),
    ("peft", "peft", "fine-tuning with adapters"),
    ("scikit-learn", "sklearn", "retrieval, which weight edits are compared with"),
    ("cryptography", "cryptography", "experiences kept until a sleep, encrypted"),
    ("datasketch", "datasketch", "experiences without near-duplicates"),
    ("detect-secrets", "detect_secrets", "experiences without secrets"),
    ("trl", "trl", "fine-tuning on conversations and preferences"),
    ("flash-attn", "flash_attn", "attn_implementation='flash_attention_2'"),
    ("flash-linear-attention", "fla", "gated_delta_rule on a GPU where the Triton kernels decline"),
    ("causal-conv1d", "causal_conv1d", "short_conv on a GPU where the Triton kernels decline"),
    ("mamba-ssm", "mamba_ssm", "ssd without gradients, where the Triton kernels decline"),
)
# Decoding calls an op with one token; prefill, training and sleep with a window of them.
CALLS = (("one token", 1), ("a window", 1024))
TITLES = {
    "machine": "Machine",
    "software": "Packages that are needed",
    "optional": "Optional packages, and what each is for",
    "attention": "Attention implementations (attn_implementation=...)",
    "ops": "Ops: the implementation that is used, why, and why not another",
    "sleep": "How model.sleep() runs its passes",
    "decoding": "How tokens that come one by one are taken in",
    "verdict": "Verdict",
}
# What a container may use, where there is one.
CONTAINER = Path("/sys/fs/cgroup")

Row = dict[str, Any]


def report() -> list[Row]:
    """Everything doctor knows, one row a fact, as plain JSON data.

    Every row has `section` (a key of TITLES), `name`, `value` (what is so), `ok` (False where
    something this package needs is missing, or a version was never tested) and `why`. Rows of the
    section `software` also have `broken`: the package is missing or too old. Those of `ops` have
    `device`, `dtype`, `tokens` and `candidates`: implementation -> why it is not taken, "" for the
    one that is.
    """
    software, optional = list(_software()), list(_optional())
    verdict = _verdict([*software, *optional])
    return [*_machine(), *software, *optional, *_attention(), *_ops(), *_outlooks(), verdict]


def broken(rows: list[Row]) -> bool:
    """Whether a report says that a package that is needed is missing or too old."""
    return any(row.get("broken") for row in rows)


def render(console: Console | None = None, rows: list[Row] | None = None) -> None:
    """Print `rows` (default: a fresh report) to `console` (default: standard output) as tables."""
    console = console or Console()
    rows = report() if rows is None else rows
    for section, title in TITLES.items():
        # Not the table's own title, which is wrapped where the table is narrow.
        console.print(Text(title, style="bold"))
        table = Table(show_header=False)
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
    yield _row("machine", "CPU cores", _cores(), f"torch computes with {threads} threads")
    memory = _memory()
    yield _row("machine", "memory", "unknown" if memory is None else _gib(memory))
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = (
            f"torch is built for {built} but finds no device"
            if built
            else "this build of torch is for CPUs alone; everything but speed works on them"
        )
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
    yield _row("software", "hybrid_sleep", hybrid_sleep.__version__, _installation())
    for name in versions.needed():
        found = platform.python_version() if name == "python" else versions.version(name)
        known = versions.check(name, found)
        why = known.verdict() if found else "this package needs it"
        broken = found is None or known.too_old
        value = found or "not found"
        yield _row("software", name, value, why, ok=known.tested, broken=broken)


def _installation() -> str:
    found = versions.version(versions.DISTRIBUTION)
    return f"from {versions.ROOT}" if found else f"not installed; found in {versions.ROOT}"


def _optional() -> Iterator[Row]:
    for distribution, module, purpose in OPTIONAL:
        if util.find_spec(module) is None:
            yield _row("optional", distribution, "not found", purpose)
            continue
        found = versions.version(distribution)
        known = versions.check(distribution, found)
        why = "; ".join(part for part in (purpose, known.verdict()) if part)
        value = found or "found, version unknown"
        yield _row("optional", distribution, value, why, ok=found is None or known.tested)


def _verdict(rows: list[Row]) -> Row:
    """One row for all versions: which are missing, too old or never tested."""
    bad = [row for row in rows if not row["ok"]]
    what = "missing, too old or never tested" if broken(bad) else "never tested"
    named = ", ".join(f"{row['name']} {row['value']}" for row in bad)
    value = f"{what}: {named}" if bad else "all in their tested ranges"
    others = ", ".join(f"{p.name} {p.version} ({p.last})" for p in versions.not_as_last_tested())
    why = f"other than last tested (in brackets): {others}" if others else ""
    return _row("verdict", "versions", value, why, ok=not bad)


def _attention() -> Iterator[Row]:
    yield _row("attention", "sdpa", "available", "torch's fused attention; the default")
    yield _row("attention", "eager", "available", "plain PyTorch, no fused kernel; slow")
    if is_flash_attn_2_available():
        yield _row("attention", "flash_attention_2", "available", "flash-attn and a GPU are found")
    else:
        why = "needs a GPU and the package flash-attn"
        yield _row("attention", "flash_attention_2", "not available", why)


def _devices() -> list[tuple[str, torch.dtype]]:
    """Where models can run here, and the dtype they usually have there."""
    on_gpu = [("cuda", torch.bfloat16)] if torch.cuda.is_available() else []
    return [("cpu", torch.float32), *on_gpu]


def _outlooks() -> Iterator[Row]:
    for section, outlook in (("sleep", cuda_graphs.outlook), ("decoding", compiling.outlook)):
        for device, _ in _devices():
            path, why = outlook(device)
            yield _row(section, f"on {device}", path, why, device=device)


def _ops() -> Iterator[Row]:
    for device, dtype in _devices():
        for op in dispatch.OPS:
            for label, tokens in CALLS:
                path = dispatch.explain(op, tokens=tokens, device=device, dtype=dtype)
                # Left out is what goes without saying: that another one could run but ranks lower,
                # and that an op has no such implementation.
                implied = ("", "not implemented", f"{path['implementation']} is preferred")
                others = [
                    f"not {name}: {why}"
                    for name, why in path["candidates"].items()
                    if why not in implied
                ]
                yield _row(
                    "ops",
                    f"{op}, {label}, {device}",
                    path["implementation"],
                    "; ".join([path["reason"], *others]),
                    device=device,
                    dtype=path["call"]["dtype"],
                    tokens=tokens,
                    candidates=path["candidates"],
                )
