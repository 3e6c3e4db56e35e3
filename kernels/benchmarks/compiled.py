"""What the Triton kernels compile to for a GPU that is not here: shared memory, registers, spills.

    python -m hybrid_sleep.kernels.benchmarks.compiled [--ops OP ...] [--quick] [--out DIR]

Every launch of every op is recorded instead of run, forward, backward, state only and decoding, and
compiled for compute capability 9.0 in each configuration that tuning may choose. Needs the package
triton and no GPU, and must not run in Triton's interpreter. Writes results.json, a line a
configuration, and results.md.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybrid_sleep.kernels.common.triton_paths import LARGEST_FP32_KEY
from hybrid_sleep.support.io import write_text_atomic
from hybrid_sleep.support.markdown import footer, table
from hybrid_sleep.support.provenance import provenance
from hybrid_sleep.support.records import write_records
from hybrid_sleep.validation import check_choice

CAPABILITY = 90
# Bytes of shared memory that one program may have on compute capability 9.0.
SHARED = 227 * 1024
# Bytes of registers that may spill to memory, by dtype: float32 products take three of TF32, each
# with operands of their own in registers, and are not what a fast run uses. Nor are keys of so many
# dimensions that Mamba-2's gradients of them cannot all stay in registers.
SPILLS = {"bfloat16": 128, "float32": 512}
LARGE_KEY, SPILLS_OF_LARGE_KEYS = 128, 1024
# K and V: the benchmarks', the default config's, small ones, and the largest.
DIMS = ((128, 128), (64, 128), (64, 64), (32, 32), (256, 256))


class Call(NamedTuple):
    """One call of an op whose launches are compiled; `tokens` 1 is a step of decoding."""

    op: str
    dtype: torch.dtype
    K: int
    V: int
    tokens: int = 2048
    heads: int = 8
    grad: bool = False
    mask: bool = False
    output: bool = True


def calls(op: str, dims: Sequence[tuple[int, int]] = DIMS) -> Iterator[Call]:
    """The calls of `op` that together launch each of its kernels in each of its forms."""
    for dtype in (torch.bfloat16, torch.float32):
        for K, V in dims:
            if K > LARGEST_FP32_KEY and dtype != torch.bfloat16:
                continue
            # Few heads are scanned in segments, many in a single one.
            yield Call(op, dtype, K, V, grad=True)
            if op in RULES:
                yield Call(op, dtype, K, V, heads=64)
            if op in STEPS:
                yield Call(op, dtype, K, V, tokens=1)
        K, V = dims[0]
        yield Call(op, dtype, K, V, mask=True, grad=True)
        if op in RULES:
            yield Call(op, dtype, K, V, output=False)
            yield Call(op, dtype, K, V, tokens=20)


def _ones(call: Call, *shape: int, fp32: bool = False) -> Tensor:
    dtype = torch.float32 if fp32 else call.dtype
    return torch.ones(shape, dtype=dtype, requires_grad=call.grad)


def _rule(call: Call, beta: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    T, H = call.tokens, call.heads
    inputs = {name: _ones(call, 1, T, H, call.K) for name in ("q", "k")}
    inputs |= {"v": _ones(call, 1, T, H, call.V), "g": _ones(call, 1, T, H, fp32=True)}
    if beta:
        inputs["beta"] = _ones(call, 1, T, H, fp32=True)
    inputs["initial_state"] = _ones(call, 1, H, call.K, call.V, fp32=True)
    return inputs, {"output": call.output}


def _mixer(call: Call, names: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    T, H, keys = call.tokens, call.heads, call.heads * call.K
    both = keys + H * call.V
    shapes = {
        "q": (1, T, keys), "kv": (1, T, both), "a": (1, T, H), "b": (1, T, H), "skip": (H,),
        "q_weight": (keys, 4), "kv_weight": (both, 4), "A_log": (H,), "dt_bias": (H,),
        "q_tail": (1, 3, keys), "kv_tail": (1, 3, both),
    }  # fmt: skip
    inputs = {name: _ones(call, *shapes[name]) for name in shapes if name in names}
    inputs["initial_state"] = _ones(call, 1, H, call.K, call.V, fp32=True)
    return inputs, {"output": call.output, "key_heads": H}


_MIXED = ("q", "kv", "a", "q_weight", "kv_weight", "A_log", "dt_bias", "q_tail", "kv_tail")


def _conv(call: Call) -> tuple[dict[str, Tensor], dict[str, Any]]:
    channels = call.heads * call.V
    shapes = {
        "x": (1, call.tokens, channels), "weight": (channels, 4), "bias": (channels,),
        "initial_state": (1, 3, channels),
    }  # fmt: skip
    return {name: _ones(call, *shape) for name, shape in shapes.items()}, {}


def _norm(call: Call) -> tuple[dict[str, Tensor], dict[str, Any]]:
    shape = (1, call.tokens, call.heads, call.V)
    inputs = {"o": _ones(call, *shape), "gate": _ones(call, *shape), "weight": _ones(call, call.V)}
    return inputs, {"eps": 1e-6}


INPUTS: dict[str, Callable[[Call], tuple[dict[str, Tensor], dict[str, Any]]]] = {
    "gated_delta_rule": lambda call: _rule(call, beta=True),
    "ssd": lambda call: _rule(call, beta=False),
    "gated_delta_net": lambda call: _mixer(call, (*_MIXED, "b")),
    "mamba2": lambda call: _mixer(call, (*_MIXED, "skip")),
    "short_conv": _conv,
    "gated_norm": _norm,
}
RULES = ("gated_delta_rule", "ssd", "gated_delta_net", "mamba2")
STEPS = ("gated_delta_net", "mamba2", "short_conv")


def launches(call: Call) -> list[Any]:
    """The launches that this call of an op, and its backward pass, would make."""
    import importlib

    from hybrid_sleep.kernels.common import dispatch, triton_launch

    package = importlib.import_module(f"hybrid_sleep.kernels.{call.op}")
    inputs, options = INPUTS[call.op](call)
    if call.mask and call.op != "gated_norm":
        options["mask"] = torch.ones(1, call.tokens, dtype=torch.bool)
    with triton_launch.recording() as recorded, dispatch.forced(call.op, "triton"):
        results = getattr(package, call.op)(**inputs, **options)
        if call.grad:
            results = (results,) if isinstance(results, Tensor) else results
            results = [x for x in results if x is not None and x.requires_grad]
            torch.autograd.backward(results, [torch.ones_like(x) for x in results])
    return recorded


class _Target:
    """Stands in for a driver: a GPU to compile for, with nothing to run on."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", CAPABILITY, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_launch(launch: Any, config: Any) -> dict[str, Any]:
    """Compile one launch in one configuration; bytes of shared memory and stack, registers,
    instructions of the tensor cores."""
    import triton

    compiled = launch.kernel.function.run(
        grid=(1,), warmup=True, num_warps=config.num_warps, num_stages=config.num_stages,
        **launch.arguments, **config.kwargs,
    )  # fmt: skip
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if used is None:
        raise RuntimeError(f"cuobjdump must report registers, got: {usage!r}")
    return {
        "blocks": dict(config.kwargs),
        "warps": config.num_warps,
        "stages": config.num_stages,
        "shared": compiled.metadata.shared,
        "registers": int(used[1]),
        "spilled": int(used[2]),
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
        "mma": compiled.asm["ptx"].count("mma.sync"),
    }


def _form(launch: Any) -> tuple[dict[str, int], list[str]]:
    """What makes another program of the same kernel: its sizes, and the switches that are on.

    The dtype says the rest.
    """
    named = {name: x for name, x in launch.arguments.items() if name.isupper()}
    sizes = {name: x for name, x in named.items() if type(x) is int and name not in ("T", "NT")}
    return sizes, [name for name, x in named.items() if x is True]


def wrong(row: dict[str, Any]) -> list[str]:
    """What of a row breaks a limit."""
    found = []
    if row["shared"] > SHARED:
        found.append(f"{row['shared']} bytes of shared memory, {SHARED} are there")
    most = SPILLS_OF_LARGE_KEYS if row["sizes"].get("K", 0) > LARGE_KEY else SPILLS[row["dtype"]]
    if row["spilled"] > most:
        found.append(f"{row['spilled']} bytes spilled, at most {most} may")
    if row["wants_wgmma"] and not row["wgmma"]:
        found.append("no wgmma")
    return found


def run(
    ops: Sequence[str] = tuple(INPUTS),
    *,
    dims: Sequence[tuple[int, int]] = DIMS,
    quick: bool = False,
    command: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Compile everything; one row for each kernel, form, dtype, K and V, and configuration.

    quick: each kernel once, in bfloat16, its first form and its largest configuration.

    Raises ValueError for an unknown op, RuntimeError without Triton or in its interpreter.
    """
    for op in ops:
        check_choice("ops", op, tuple(INPUTS))
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if find_spec("triton") is None:
        install = "pip install 'hybrid-sleep[triton]'"
        raise RuntimeError(f"the package triton is not installed ({install})")
    from triton.runtime.driver import driver

    from hybrid_sleep.kernels.common import triton_launch

    if triton_launch.INTERPRET:
        raise RuntimeError("TRITON_INTERPRET must not be 1: the interpreter compiles nothing")
    driver.set_active(_Target())
    rows, seen = [], set()
    for op in ops:
        for call in calls(op, dims):
            for launch in launches(call):
                sizes, switches = _form(launch)
                form = () if quick else (call.dtype, *sorted(sizes.items()), *switches)
                key = (id(launch.kernel), *form)
                if key in seen:
                    continue
                seen.add(key)
                configs = launch.kernel.allowed(launch.arguments)
                for config in configs[-1:] if quick else configs:
                    row = {
                        "op": op,
                        "kernel": launch.kernel.name,
                        "dtype": str(call.dtype).removeprefix("torch."),
                        "sizes": sizes,
                        "switches": switches,
                        **compile_launch(launch, config),
                    }
                    row["wants_wgmma"] = launch.kernel.wants_wgmma(launch.arguments)
                    row["wrong"] = wrong(row)
                    rows.append(row)
                    if progress is not None:
                        progress(line(row))
    return {
        "benchmark": "compiled",
        "capability": CAPABILITY,
        "limits": {
            "shared": SHARED,
            "spilled": SPILLS,
            "spilled_of_large_keys": SPILLS_OF_LARGE_KEYS,
        },
        "rows": rows,
        "command": command,
        "provenance": provenance(),
    }


def line(row: dict[str, Any]) -> str:
    """One row in words."""
    blocks = " ".join(f"{name}={size}" for name, size in row["blocks"].items())
    words = f"{row['op']} {row['kernel']} {row['dtype']} {blocks} {row['warps']} warps"
    return words + (f": {'; '.join(row['wrong'])}" if row["wrong"] else "")


def markdown(result: dict[str, Any]) -> str:
    """The worst of each kernel and dtype, then what breaks a limit."""
    groups: dict[tuple, list[dict]] = {}
    for row in result["rows"]:
        groups.setdefault((row["op"], row["kernel"], row["dtype"]), []).append(row)
    head = ["op", "kernel", "dtype", "compiled", "shared, KiB", "registers", "spilled, bytes",
            "wgmma", "within limits"]  # fmt: skip
    cells = []
    for (op, name, dtype), rows in groups.items():
        with_wgmma = sum(bool(row["wgmma"]) for row in rows)
        bad = sum(bool(row["wrong"]) for row in rows)
        cells.append([
            op, name, dtype, str(len(rows)),
            str(max(row["shared"] for row in rows) // 1024),
            str(max(row["registers"] for row in rows)),
            str(max(row["spilled"] for row in rows)),
            f"in {with_wgmma}" if any(row["wants_wgmma"] for row in rows) else "not wanted",
            f"**{bad} are not**" if bad else "yes",
        ])  # fmt: skip
    lines = table(head, cells, align="lllrrrrrl")
    limits, record = result["limits"], result["provenance"]
    packages = [f"{name} {version}" for name, version in record["packages"].items()]
    spills = ", ".join(f"{size} bytes in {dtype}" for dtype, size in limits["spilled"].items())
    spills += f", {limits['spilled_of_large_keys']} where K is above {LARGE_KEY}"
    lines += [
        "",
        f"Compiled for compute capability {result['capability'] / 10} without a GPU, every "
        "configuration that tuning may choose; the largest of each column. Limits: "
        f"{limits['shared'] // 1024} KiB of shared memory; spilled at most {spills}; wgmma "
        "wherever bf16 tiles are 64 tokens long and keys at least 64 channels wide.",
        *footer(record, result["command"], versions="; ".join(packages)),
    ]
    broken = [f"- {line(row)}" for row in result["rows"] if row["wrong"]]
    return "\n".join(lines + ([""] + broken if broken else [])) + "\n"


def save(result: dict[str, Any], out: Path) -> list[Path]:
    """Write results.json and results.md into `out`, each atomically; their paths."""
    paths = [out / "results.json", out / "results.md"]
    write_records(paths[0], result)
    write_text_atomic(paths[1], markdown(result))
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with 1 where a limit is broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ops", nargs="+", default=list(INPUTS), metavar="OP")
    parser.add_argument(
        "--dims", nargs="+", metavar="K,V", help="head dims instead of the usual ones"
    )
    parser.add_argument("--quick", action="store_true", help="each kernel once, in bfloat16")
    parser.add_argument("--out", type=Path, default=Path("out/compiled"))
    options = parser.parse_args(arguments)
    dims: Sequence[Any] = DIMS
    if options.dims:
        dims = [tuple(int(size) for size in pair.split(",")) for pair in options.dims]

    def show(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    command = "python -m hybrid_sleep.kernels.benchmarks.compiled"
    result = run(options.ops, dims=dims, quick=options.quick, command=command, progress=show)
    save(result, options.out)
    print(markdown(result))
    sys.exit(any(row["wrong"] for row in result["rows"]))


if __name__ == "__main__":
    main()
