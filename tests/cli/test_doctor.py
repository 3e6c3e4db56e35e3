"""doctor tells what is so: the paths ops really take, and packages it has not imported."""

from __future__ import annotations

import io
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from small import small_ids, small_model
from typer.testing import CliRunner

from hybrid_sleep.cli import doctor
from hybrid_sleep.cli.app import app
from hybrid_sleep.kernels.common import dispatch
from hybrid_sleep.kernels.gated_delta_rule import gated_delta_rule
from hybrid_sleep.kernels.gated_norm import gated_norm
from hybrid_sleep.kernels.short_conv import short_conv
from hybrid_sleep.kernels.ssd import ssd
from hybrid_sleep.support import versions


def row(section: str, name: str) -> dict:
    (found,) = [r for r in doctor.report() if r["section"] == section and r["name"] == name]
    return found


def distribution(folder, name: str, version: str, *lines: str) -> None:
    """Leave in `folder` what pip would leave of an installed distribution."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    head = ("Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}")
    (info / "METADATA").write_text("\n".join([*head, *lines]) + "\n")


def run_op(op: str, tokens: int) -> None:
    q, k, v = torch.randn(3, 1, tokens, 1, 2)
    g = torch.zeros(1, tokens, 1)
    if op == "gated_delta_rule":
        gated_delta_rule(q, k, v, g, g)
    elif op == "ssd":
        ssd(q, k, v, g)
    elif op == "short_conv":
        short_conv(torch.randn(1, tokens, 2), torch.randn(2, 3))
    elif op == "gated_norm":
        gated_norm(v, v, torch.ones(2), 1e-6)
    else:
        # What layers call as one op is called by a layer.
        kind = "mamba2" if op == "mamba2" else "gated_deltanet"
        model = small_model(state_space=kind, window=tokens, dtype=torch.float32)
        with torch.no_grad():
            model(small_ids(1, tokens))


def test_report_is_plain_data_in_the_order_of_its_sections():
    rows = doctor.report()
    assert json.loads(json.dumps(rows)) == rows
    assert list(dict.fromkeys(r["section"] for r in rows)) == list(doctor.TITLES)
    assert all(r.keys() >= {"section", "name", "value", "ok", "why"} for r in rows)


@pytest.mark.parametrize("op", dispatch.OPS)
def test_ops_take_the_path_that_is_reported(op):
    rows = [r for r in doctor.report() if r["section"] == "ops" and r["name"].startswith(f"{op}, ")]
    rows = [r for r in rows if r["device"] == "cpu"]
    assert [r["tokens"] for r in rows] == [1, 1024]
    for reported in rows:
        run_op(op, reported["tokens"])
        taken = dispatch.explain(op)
        assert reported["value"] == taken["implementation"]
        assert reported["candidates"] == taken["candidates"]
        assert taken["reason"] in reported["why"]


def test_optional_packages_are_found_without_being_imported(tmp_path, monkeypatch):
    (tmp_path / "fla").mkdir()
    (tmp_path / "fla" / "__init__.py").write_text("raise RuntimeError('0 active drivers')\n")
    (tmp_path / "lm_eval.py").write_text("raise RuntimeError('imported')\n")
    distribution(tmp_path, "flash-linear-attention", "9.8.7")
    # A distribution whose module is gone is of no use.
    distribution(tmp_path, "mamba-ssm", "1.2.3")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    # Another test of this process may have imported the real one.
    monkeypatch.delitem(sys.modules, "lm_eval", raising=False)
    rows = {r["name"]: r["value"] for r in doctor.report() if r["section"] == "optional"}
    assert rows["flash-linear-attention"] == "9.8.7"
    assert rows["lm-eval"] == "found, version unknown"
    assert rows["mamba-ssm"] == "not found"
    assert "fla" not in sys.modules and "lm_eval" not in sys.modules


def test_a_version_that_was_never_tested_is_marked(tmp_path, monkeypatch):
    needs = ("Requires-Python: >=3.10", "Requires-Dist: torch<2.14,>=2.11")
    extra = "Requires-Dist: peft<0.30,>=0.21; extra == 'other'"
    distribution(tmp_path, "hybrid-sleep", "0.1.0", *needs, extra)
    distribution(tmp_path, "torch", "2.14.0")
    distribution(tmp_path, "peft", "0.30.1")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    (tmp_path / "peft.py").touch()
    assert row("software", "torch")["ok"] is False
    assert row("software", "torch")["why"] == "never tested: outside >=2.11,<2.14"
    assert row("software", "python")["ok"] is True
    # What only an extra asks for is judged where it is installed.
    assert row("optional", "peft")["ok"] is False
    assert row("optional", "peft")["why"].endswith("never tested: outside >=0.21,<0.30")
    verdict = row("verdict", "versions")
    assert verdict["ok"] is False
    assert verdict["value"] == "never tested: torch 2.14.0, peft 0.30.1"
    # It may well work.
    assert not doctor.broken(doctor.report())


@pytest.mark.parametrize("installed", ["2.10.1", None])
def test_what_is_too_old_or_missing_is_broken(tmp_path, monkeypatch, installed):
    distribution(tmp_path, "hybrid-sleep", "0.1.0", "Requires-Dist: some-package<2.14,>=2.11")
    if installed:
        distribution(tmp_path, "some-package", installed)
    monkeypatch.syspath_prepend(tmp_path)
    rows = doctor.report()
    assert doctor.broken(rows)
    (found,) = [r for r in rows if r["name"] == "some-package"]
    assert found["ok"] is False and found["value"] == (installed or "not found")
    assert found["why"] == (
        "too old: needs >=2.11,<2.14" if installed else "this package needs it"
    )
    assert rows[-1]["value"] == (
        f"missing, too old or never tested: some-package {found['value']}"
    )


@pytest.mark.parametrize("broken", [True, False])
def test_the_command_fails_where_something_is_broken(monkeypatch, broken):
    found = {"section": "software", "name": "torch", "value": "1", "ok": False, "why": ""}
    monkeypatch.setattr(doctor, "report", lambda: [{**found, "broken": broken}])
    done = CliRunner().invoke(app, ["doctor"])
    assert "torch" in done.output
    assert done.exit_code == broken


def test_a_checkout_says_what_differs_from_the_last_test(tmp_path, monkeypatch):
    folder = tmp_path / "installed"
    folder.mkdir()
    needs = ("Requires-Dist: same<3", "Requires-Dist: older<3", "Requires-Dist: newer<3")
    distribution(folder, "hybrid-sleep", "0.1.0", *needs)
    found = {"same": "2.1+cpu", "older": "2.0", "newer": "3.0", "far_off": "7"}
    for name, version in found.items():
        distribution(folder, name, version)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    pins = "# Head.\nsame==2.1\nolder==2.1\nnewer==2.1\nFar.Off==6\nnot-installed==1\n"
    (tmp_path / "constraints.txt").write_text(pins)
    # No checkout: the file is another's.
    assert row("software", "same")["why"] == "in the tested range <3"
    (tmp_path / "pyproject.toml").touch()
    assert row("software", "same")["why"] == "the version last tested"
    assert row("software", "older")["why"] == "in the tested range <3; last tested: 2.1"
    assert row("software", "newer")["why"] == "never tested: outside <3; last tested: 2.1"
    verdict = row("verdict", "versions")
    assert verdict["value"] == "never tested: newer 3.0"
    wanted = "other than last tested (in brackets): older 2.0 (2.1), newer 3.0 (2.1), far-off 7 (6)"
    assert verdict["why"] == wanted


def test_a_checkout_that_is_not_installed_knows_its_ranges(monkeypatch):
    installed = (versions.needed(), versions.optional())
    present = versions.metadata.metadata

    def metadata(name):
        if name == versions.DISTRIBUTION:
            raise versions.metadata.PackageNotFoundError(name)
        return present(name)

    monkeypatch.setattr(versions.metadata, "metadata", metadata)
    needed, optional = versions.needed(), versions.optional()
    assert needed.keys() == installed[0].keys() and "python" in needed
    assert "<5.25" in needed["transformers"]
    assert optional.keys() >= {"triton", "deepspeed", "datasets", "lm-eval", "peft", "trl"}
    assert not optional.keys() & needed.keys() - {"hybrid-sleep"}


def test_a_local_build_of_torch_is_within_its_range(tmp_path, monkeypatch):
    distribution(tmp_path, "hybrid-sleep", "0.1.0", "Requires-Dist: torch<2.14,>=2.11")
    distribution(tmp_path, "torch", "2.13.1+cpu")
    monkeypatch.syspath_prepend(tmp_path)
    assert row("software", "torch")["ok"] is True


def test_a_machine_with_a_gpu_gets_rows_for_it(monkeypatch):
    device = SimpleNamespace(name="Fast 1", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    gpu = row("machine", "GPU 0")
    assert gpu["value"] == "Fast 1" and gpu["why"] == "80.0 GiB, compute capability 9.0"
    ops = [r for r in doctor.report() if r["section"] == "ops"]
    calls = [("cpu", "float32"), ("cuda", "bfloat16")]
    wanted = [(*call, tokens) for call in calls for _ in dispatch.OPS for tokens in (1, 1024)]
    assert [(r["device"], r["dtype"], r["tokens"]) for r in ops] == wanted
    assert row("sleep", "on cuda")["value"] == "cuda graph"
    assert row("sleep", "on cpu")["why"] == "cpu is no CUDA device"


@torch.no_grad()
def test_a_sleep_takes_the_path_that_is_reported():
    model = small_model()
    report = model.sleep(model(small_ids(1, 4)).cache, passes=2)
    told = row("sleep", "on cpu")
    assert report.path == f"{told['value']}: {told['why']}"


@torch.no_grad()
def test_tokens_are_decoded_as_is_reported():
    model = small_model()
    cache = model(small_ids(1, 1)).cache
    for _ in range(2):
        model(small_ids(1, 1), cache=cache)
    assert cache.decoding == row("decoding", "on cpu")["value"]


def test_no_compiler_is_a_reason(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "C++ compiler" in row("decoding", "on cpu")["why"]
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "2000 new tokens" in row("decoding", "on cpu")["why"]


def test_a_container_can_only_lower_the_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "CONTAINER", tmp_path)
    cores, memory = doctor._cores(), doctor._memory()
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert (doctor._cores(), doctor._memory()) == (cores, memory)
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text("1048576\n")
    assert (doctor._cores(), doctor._memory()) == (1, 2**20)
    (tmp_path / "cpu.max").write_text("100000000 100000\n")
    (tmp_path / "memory.max").write_text(f"{2**60}\n")
    assert (doctor._cores(), doctor._memory()) == (cores, memory)


@pytest.mark.parametrize("width", [50, 80, 140])
def test_tables_lose_nothing_at_any_width(width):
    rows = doctor.report()
    # Text with square brackets is not markup.
    rows[0]["why"] = "[red]plain[/red]"
    out = io.StringIO()
    doctor.render(Console(file=out, width=width), rows)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    # Cells wrap, so what is compared is each column of letters on its own.
    columns = [line.split("│")[1:4] for line in lines if line.startswith("│")]
    for index, key in enumerate(("name", "value", "why")):
        printed = "".join(cells[index] for cells in columns)
        wanted = "".join(str(r[key]) for r in rows)
        assert printed.replace(" ", "") == wanted.replace(" ", "")
