"""The package is found whole however it is installed, and importing it touches nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BESIDE = ("kernels", "training", "eval", "configs")
BASELINE = "eval/results/depth_demo/results.json"
CHECKPOINTS = "eval/facts/checkpoints/"
TYPED = "hybrid_sleep/py.typed"
RUNNERS = ("python", "python -m pytest", "pytest")
OPTIONAL = ("fla", "mamba_ssm", "causal_conv1d", "flash_attn", "triton", "deepspeed", "lm_eval")


def sources(root: Path) -> dict[str, str]:
    """Where each file of the package must lie once installed -> where it lies in a checkout."""
    found = {}
    for folder in ("hybrid_sleep", *BESIDE):
        prefix = "" if folder == "hybrid_sleep" else "hybrid_sleep/"
        suffixes = (".yaml", ".json") if folder == "configs" else (".py",)
        for path in sorted((root / folder).rglob("*")):
            file = path.relative_to(root).as_posix()
            checkpoint = file.startswith(CHECKPOINTS) and path.is_file()
            plain = path.suffix in suffixes and "/results/" not in file
            if plain or checkpoint or file in (BASELINE, TYPED):
                found[prefix + file] = file
    return found


def modules(root: Path) -> dict[str, str]:
    """Import name of every module and package with code -> its file in a checkout."""
    names = {}
    for installed, source in sources(root).items():
        if source.endswith(".py") and not source.startswith(CHECKPOINTS):
            parts = Path(installed).with_suffix("").parts
            names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = source
    return names


def run(*command: object, cwd: Path, **env: str) -> str:
    """Standard output of a command in a clean environment; on failure the test shows all of it."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command} in {cwd}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout, so that builds leave nothing in the real one."""
    copy = tmp_path_factory.mktemp("copy") / "checkout"
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "out"),
    )
    # The dotfiles left out above hold environments and caches, none of them part of the package.
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    flags = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *flags, checkout, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def environment(folder: Path) -> Path:
    """The Python of a new environment that borrows this one's packages, and nothing editable.

    A path file names the borrowed folders. Python does not read the path files inside them, which
    is how an editable installation of this very package in them stays unseen.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    borrowed = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    return environment(tmp_path_factory.mktemp("bare") / "venv")


@pytest.fixture(scope="module")
def editable(checkout, tmp_path_factory) -> Path:
    python = environment(tmp_path_factory.mktemp("editable") / "venv")
    install(python, "--editable", checkout)
    return python


@pytest.fixture(scope="module")
def regular(checkout, tmp_path_factory) -> Path:
    python = environment(tmp_path_factory.mktemp("regular") / "venv")
    install(python, checkout)
    return python


def install(python: Path, *what: object) -> None:
    flags = ("--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed", "--quiet")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", *flags, *what, cwd=python.parent)


PROBE = """
import importlib.util, json, sys
from importlib import resources
import hybrid_sleep, hybrid_sleep.support.io

found = {name: importlib.util.find_spec(name).origin for name in json.loads(sys.argv[1])}
runs = resources.files("hybrid_sleep.configs").joinpath("runs")
text = {entry.name: entry.read_text() for entry in runs.iterdir() if entry.name.endswith(".yaml")}
with open(sys.argv[2], "w") as answer:
    json.dump({"found": found, "runs": text, "version": hybrid_sleep.__version__}, answer)
"""

PROBE_TEST = """
import os, pathlib, runpy, sys

def test_probe(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["probe", *os.environ["PROBE_ARGS"].split("|")])
    runpy.run_path(str(pathlib.Path(__file__).with_name("probe.py")))
"""


def probe(python: Path, names: list[str], cwd: Path, runner: str) -> dict:
    """What a fresh process that runs in `cwd` finds of the package."""
    answer = cwd / "answer.json"
    folder = cwd / "tests"
    folder.mkdir(exist_ok=True)
    (folder / "probe.py").write_text(PROBE)
    (folder / "test_probe.py").write_text(PROBE_TEST)
    arguments = (json.dumps(names), str(answer))
    if runner == "python":
        run(python, "-c", PROBE, *arguments, cwd=cwd)
    else:
        start = ["-m", "pytest"]
        if runner == "pytest":
            # The console script differs from `-m` in that it puts no current folder on the path.
            start = ["-c", "import sys, pytest; sys.path.remove(''); sys.exit(pytest.main())"]
        run(python, *start, "-q", "tests/test_probe.py", cwd=cwd, PROBE_ARGS="|".join(arguments))
    return json.loads(answer.read_text())


def check(python: Path, checkout: Path, cwd: Path, runner: str, *, installed: bool) -> None:
    """Every module and config is found: in the installation, or else in the checkout."""
    expected = {name: checkout / source for name, source in modules(checkout).items()}
    if installed:
        (site,) = python.parents[1].glob("lib/python*/site-packages")
        target = {source: site / target for target, source in sources(checkout).items()}
        expected = {name: target[source] for name, source in modules(checkout).items()}
    answer = probe(python, list(expected), cwd, runner)
    assert {name: Path(file) for name, file in answer["found"].items()} == expected
    configs = (checkout / "configs" / "runs").glob("*.yaml")
    assert answer["runs"] == {path.name: path.read_text() for path in configs}


def test_wheel_holds_every_module_and_config_and_nothing_else(checkout, wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert packed == set(sources(checkout))
        for target, source in sources(checkout).items():
            assert archive.read(target) == (checkout / source).read_bytes(), target


def test_only_what_is_installed_is_importable_from_a_checkout():
    code = """
import importlib, importlib.util, pkgutil, sys
import hybrid_sleep

inside = {module.name for module in pkgutil.iter_modules(hybrid_sleep.__path__)}
assert not inside & {"setup", "tests", "docs", "hybrid_sleep"}, inside
for name in ("setup", "tests", "docs", "hybrid_sleep", "hybrid_sleep.support.io", "pyproject"):
    try:
        importlib.import_module(f"hybrid_sleep.{name}")
    except ModuleNotFoundError:
        continue
    raise AssertionError(name)
for folder in sys.argv[2:]:
    spec = importlib.util.find_spec(f"hybrid_sleep.{folder}")
    assert list(spec.submodule_search_locations) == [f"{sys.argv[1]}/{folder}"], spec
"""
    run(sys.executable, "-c", code, ROOT, *BESIDE, cwd=ROOT)


def test_kernels_folder_hides_no_installed_package_of_that_name(tmp_path):
    assert not (ROOT / "kernels" / "__init__.py").exists()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("published = True\n")
    code = "import kernels; assert kernels.published"
    run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(tmp_path))


def test_transformers_imports_its_hybrids_from_the_checkout():
    code = "import transformers; from transformers import Qwen3NextForCausalLM"
    run(sys.executable, "-c", code, cwd=ROOT)


def test_importing_touches_no_device_no_network_and_no_optional_package(tmp_path):
    report = tmp_path / "report.json"
    code = """
import importlib, json, sys
import torch
from transformers import GenerationMixin, PreTrainedModel, Trainer

lazy = ("matplotlib", "typer", *json.loads(sys.argv[2]))
before = set(sys.modules)
calls = []

def spy(name):
    real = getattr(torch.cuda, name)
    def spied(*args, **kwargs):
        calls.append(f"torch.cuda.{name}")
        return real(*args, **kwargs)
    setattr(torch.cuda, name, spied)

spied = ("is_available", "device_count", "current_device", "get_device_capability",
         "get_device_properties", "_lazy_init")
for name in spied:
    spy(name)
watched = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system")
sys.addaudithook(lambda event, args: calls.append(event) if event in watched else None)

import hybrid_sleep
for name in hybrid_sleep.__all__:
    getattr(hybrid_sleep, name)
names = json.loads(sys.argv[1])
for name in names:
    if name.startswith("hybrid_sleep.kernels"):
        importlib.import_module(name)
early = sorted({m.partition(".")[0] for m in set(sys.modules) - before} & set(lazy))
for name in names:
    importlib.import_module(name)
late = sorted({m.partition(".")[0] for m in set(sys.modules) - before} & set(lazy[2:]))
with open(sys.argv[3], "w") as file:
    json.dump({"calls": calls, "early": early, "late": late}, file)
"""
    # An op imports its Triton kernels when it is called with them.
    left_out = ("__main__", "triton")
    names = [
        name
        for name in modules(ROOT)
        if not name.rpartition(".")[2].startswith(left_out) or name.endswith("triton_paths")
    ]
    run(sys.executable, "-c", code, json.dumps(names), json.dumps(OPTIONAL), report, cwd=ROOT)
    assert json.loads(report.read_text()) == {"calls": [], "early": [], "late": []}


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.slow
def test_not_installed_from_the_checkout(bare, checkout, runner):
    check(bare, checkout, checkout, runner, installed=False)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("where", ["checkout", "elsewhere"])
@pytest.mark.slow
def test_editable_installation(editable, checkout, tmp_path, where, runner):
    cwd = checkout if where == "checkout" else tmp_path
    check(editable, checkout, cwd, runner, installed=False)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.slow
def test_regular_installation_from_elsewhere(regular, checkout, tmp_path, runner):
    check(regular, checkout, tmp_path, runner, installed=True)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.slow
def test_regular_installation_gives_way_to_the_checkout(regular, checkout, runner):
    check(regular, checkout, checkout, runner, installed=False)


@pytest.mark.slow
def test_the_command_is_installed(editable, regular, tmp_path):
    for python in (editable, regular):
        assert "doctor" in run(python.with_name("hybrid-sleep"), "--help", cwd=tmp_path)


@pytest.mark.slow
def test_a_source_distribution_builds_the_same_wheel(checkout, wheel, tmp_path):
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path, cwd=checkout)
    (packed,) = tmp_path.glob("*.tar.gz")
    flags = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", tmp_path)
    run(sys.executable, "-m", "pip", "wheel", *flags, packed, cwd=tmp_path)
    (again,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())
