"""constraints.txt, pyproject.toml and make agree on what is installed and where testing ended."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import hybrid_sleep

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
NEWEST = ROOT / ".ci" / "newest.py"


def pinned() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    # No marker, no build, no address: one version on every machine.
    found = [re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9a-z.]*)", line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if not match]
    return {canonicalize_name(match[1]): match[2] for match in found}


def declared() -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    return [line for line in map(Requirement, lines) if line.name != PROJECT["name"]]


def newest(*arguments: str) -> str:
    command = [sys.executable, str(NEWEST), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def plan(target: str, folder: Path) -> str:
    """What make would run for `target` in a fresh checkout."""
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    command = ["make", "--dry-run", target]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_every_range_holds_what_was_tested_and_ends(requirement):
    assert any(part.operator == "<" for part in requirement.specifier)
    tested = pinned().get(requirement.name)
    if tested is None:
        assert requirement.name == "pre-commit"  # It takes no part in the tests.
    else:
        assert requirement.specifier.contains(tested)


def test_a_range_ends_no_further_than_the_next_release_series():
    for requirement in declared():
        tested = pinned().get(requirement.name)
        (cap,) = (Version(part.version) for part in requirement.specifier if part.operator == "<")
        # triton is held back by torch: newer ones were tested without it.
        if tested and requirement.name != "triton":
            old = list(Version(tested).release[: len(cap.release)])
            assert list(cap.release) == [*old[:-1], old[-1] + 1], requirement


def test_what_the_tests_need_is_pinned_to_the_last_package():
    asked = [*PROJECT["dependencies"], *EXTRAS["test"]]
    waiting, seen = [(Requirement(line), "") for line in asked], set()
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        marker = requirement.marker
        if (marker and not marker.evaluate({"extra": extra})) or (name, extra) in seen:
            continue
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        seen.add((name, extra))
        waiting += [(Requirement(line), e) for line in needs for e in ("", *requirement.extras)]
    # What only some builds of torch ask for, and in exact versions.
    names = {name for name, _ in seen if not name.startswith(("nvidia-", "cuda-"))}
    assert len(names) > 50
    assert names <= pinned().keys()


def test_pythons_are_named_alike():
    oldest, end = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    minors = range(int(oldest), int(end))
    named = re.findall(r"Python :: 3\.(\d+)", "\n".join(PROJECT["classifiers"]))
    assert [int(minor) for minor in named] == list(minors)
    assert (
        f"not (3, {minors[0]}) <= sys.version_info[:2] <= (3, {minors[-1]})"
        in (ROOT / "Makefile").read_text()
    )
    (job,) = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in minors]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make test PYTHON=python"]


def test_what_is_cited_is_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == hybrid_sleep.__version__
    assert citation["license"] == PROJECT["license"]
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == f"arXiv:{paper['url'].rpartition('/')[2]}"


def test_the_demo_installs_no_more_than_it_needs(tmp_path):
    demo, test = plan("demo", tmp_path), plan("test", tmp_path)
    for said in (demo, test):
        installs = [line for line in said.splitlines() if "--editable" in line]
        assert all("--constraint constraints.txt" in line for line in installs)
        assert re.search(r"--editable \.$", installs[0])
    assert demo.count("--editable") == 1 and "[test]" not in demo
    assert test.count("--editable") == 2 and "--editable '.[test]'" in test


@pytest.mark.parametrize("file", ["setup.py", "pyproject.toml", "constraints.txt"])
def test_what_is_installed_is_renewed_with_what_asks_for_it(file, tmp_path):
    plan("test", tmp_path)
    stamps = [tmp_path / ".venv" / f".installed-for-{what}" for what in ("demo", "tests")]
    stamps[0].parent.mkdir()
    for stamp in stamps:
        stamp.touch()
    make = ["make", "--dry-run", "test"]
    fresh = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "pip" not in fresh
    # Clocks of file systems tick coarsely: a touch alone may leave both equally old.
    later = stamps[1].stat().st_mtime + 10
    os.utime(tmp_path / file, (later, later))
    stale = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert stale.count("--editable") == 2


def test_newest_asks_for_everything_without_upper_bounds():
    asked = [Requirement(line) for line in newest("requirements").splitlines()]
    ours = [Requirement(line) for line in (*PROJECT["dependencies"], *EXTRAS["test"])]
    assert [(r.name, str(r.marker)) for r in asked] == [(r.name, str(r.marker)) for r in ours]
    for open_ended, capped in zip(asked, ours, strict=True):
        lower = [part for part in capped.specifier if part.operator == ">="]
        assert list(open_ended.specifier) == lower and lower
        assert open_ended.specifier.contains("99999")


def test_newest_says_what_is_newer_than_what_was_tested(tmp_path):
    # A copy of the checkout's files in which the installed packaging is ahead.
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "newest.py").write_bytes(NEWEST.read_bytes())
    here = metadata.version("packaging")
    ranges = 'dependencies = ["packaging<1", "rich"]\noptional-dependencies = {test = []}\n'
    (tmp_path / "pyproject.toml").write_text(f"[project]\n{ranges}")
    rich = metadata.version("rich")
    (tmp_path / "constraints.txt").write_text(f"# Head.\npackaging==0.1\nrich=={rich}\nnone==1\n")
    command = [sys.executable, str(tmp_path / ".ci" / "newest.py"), "report", "1"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [
        f"packaging 0.1 -> {here}  (beyond <1)",
        "1 packages are newer than constraints.txt; the tests fail (exit code 1)",
    ]


def test_constraints_are_written_from_an_environment_of_the_oldest_python():
    command = [sys.executable, str(NEWEST), "constraints"]
    done = subprocess.run(command, capture_output=True, text=True)
    if sys.version_info[:2] == (3, 11):
        file = (ROOT / "constraints.txt").read_text()
        head = [line for line in file.splitlines() if line.startswith("#")]
        said = done.stdout.splitlines()
        assert said[: len(head)] == head
        assert f"numpy=={metadata.version('numpy')}" in said
        assert not [line for line in said if line.startswith(("nvidia", "hybrid")) or "+" in line]
    else:
        assert done.returncode == 1 and "allowed: 3.11" in done.stderr
