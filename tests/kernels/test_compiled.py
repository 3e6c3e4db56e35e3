"""What the Triton kernels compile to for compute capability 9.0, without a GPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from hybrid_sleep.kernels.benchmarks import compiled
from hybrid_sleep.kernels.common import dispatch, triton_launch

# A mixer launches the kernels of its rule: together they are compiled once.
GROUPS = (
    ("gated_delta_rule", "gated_delta_net"),
    ("ssd", "mamba2"),
    ("short_conv", "gated_norm"),
)


def compile_ops(ops, folder, *options):
    """The rows of `ops`; in a process of its own, since this one may be Triton's interpreter."""
    command = [sys.executable, "-m", "hybrid_sleep.kernels.benchmarks.compiled", "--ops", *ops]
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "--out", str(folder), *options], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())["rows"]


def check(ops, dtypes, *arguments):
    rows = compile_ops(ops, *arguments)
    assert [row for row in rows if row["wrong"]] == []
    assert {row["dtype"] for row in rows} == dtypes
    for row in rows:
        assert 0 <= row["shared"] <= compiled.SHARED
        assert row["spilled"] <= compiled.SPILLS_OF_LARGE_KEYS
    # The limits mean something only where registers were counted and tiles are as long as thought.
    assert min(row["registers"] for row in rows) > 0
    if ops != ("short_conv", "gated_norm"):
        assert sum(row["wgmma"] > 0 for row in rows if row["dtype"] == "bfloat16") > 3
    return rows


def test_every_kernel_compiles_within_its_limits(tmp_path):
    rows = check(dispatch.OPS, {"bfloat16"}, tmp_path, "--dims", "128,128", "--quick")
    assert sorted(row["kernel"] for row in rows) == sorted(kernel.name for kernel in kernels())


@pytest.mark.slow
@pytest.mark.parametrize("ops", GROUPS, ids=lambda ops: ops[1])
def test_every_configuration_compiles_within_its_limits(ops, tmp_path):
    rows = check(ops, {"bfloat16", "float32"}, tmp_path)
    assert {row["op"] for row in rows} == set(ops)


def test_every_op_is_in_a_group():
    assert {op for ops in GROUPS for op in ops} == set(compiled.INPUTS) == set(dispatch.OPS)


def kernels():
    """Every Triton kernel of every op."""
    for op in dispatch.OPS:
        importlib.import_module(f"hybrid_sleep.kernels.{op}.triton")
    found = {
        id(x): x
        for module in list(sys.modules.values())
        if getattr(module, "__name__", "").startswith("hybrid_sleep.kernels.")
        for x in vars(module).values()
        if isinstance(x, triton_launch.Kernel)
    }
    return list(found.values())


def test_every_kernel_of_every_op_is_launched_by_some_call():
    """A kernel that no recorded call launches would be compiled nowhere."""
    launched = {
        id(launch.kernel)
        for op in compiled.INPUTS
        for call in compiled.calls(op, [(16, 16)])
        for launch in compiled.launches(call._replace(tokens=min(call.tokens, 600)))
    }
    assert {id(kernel) for kernel in kernels()} == launched


def test_what_chooses_a_configuration_is_kept_on_disk():
    """Triton writes the key of every tuning as JSON, and one for two precisions would mix them."""
    products: dict[tuple, set] = {}
    for op in compiled.INPUTS:
        for call in compiled.calls(op, [(16, 16)]):
            for launch in compiled.launches(call._replace(tokens=min(call.tokens, 600))):
                given = launch.arguments
                key = [given[name] for name in launch.kernel._tuned.keys]
                json.dumps(key)
                key += [str(x.dtype) for x in given.values() if hasattr(x, "dtype")]
                products.setdefault((launch.kernel.name, *key), set()).add(given.get("DOT"))
    assert {len(found) for found in products.values()} == {1}


def test_a_broken_limit_is_said():
    row = {"shared": 10, "spilled": 0, "dtype": "bfloat16", "sizes": {"K": 128}}
    row |= {"wants_wgmma": True, "wgmma": 3}
    assert compiled.wrong(row) == []
    assert "shared memory" in compiled.wrong(row | {"shared": compiled.SHARED + 1})[0]
    assert "spilled" in compiled.wrong(row | {"spilled": 1000})[0]
    assert compiled.wrong(row | {"spilled": 1000, "sizes": {"K": 256}}) == []
    assert compiled.wrong(row | {"wgmma": 0}) == ["no wgmma"]
