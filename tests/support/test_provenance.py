"""What a result says about where it came from."""

from __future__ import annotations

import platform
import shutil
import subprocess

import pytest
import torch

import hybrid_sleep
from hybrid_sleep.support import provenance


def test_it_names_versions_device_and_threads():
    record = provenance.provenance("cpu")
    assert record["torch"] == torch.__version__
    assert record["python"] == platform.python_version()
    assert record["hybrid_sleep"] == hybrid_sleep.__version__
    assert record["threads"] == torch.get_num_threads()
    line = provenance.describe(record)
    for value in (
        record["torch"],
        record["device"],
        record["date"],
        f"{record['threads']} threads",
    ):
        assert value in line


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_is_marked_when_files_have_changed(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    assert provenance._commit(tmp_path) is None
    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert commit.startswith(provenance._commit(tmp_path))
    (tmp_path / "untracked").write_text("does not matter")
    assert commit.startswith(provenance._commit(tmp_path))
    (tmp_path / "file").write_text("two")
    assert provenance._commit(tmp_path) == commit[:12] + "-dirty"


def test_a_device_that_is_not_here_is_refused():
    assert provenance.check_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="device='abacus'.*cpu"):
        provenance.check_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cuda'.*cpu"):
            provenance.check_device("cuda")


CODE = """
def rate(step):
    return 0.1 / step
"""
DRESSED = """'''What it does.'''

# Why.


def rate(step):
    'The rate.'
    return (
        0.1
        / step
    )
"""


@pytest.fixture
def tree(tmp_path):
    """Folders like those of a checkout, and `key()`, their fingerprint."""
    for path in (
        "hybrid_sleep/__init__.py",
        "hybrid_sleep/cli/app.py",
        "hybrid_sleep/sleep/algorithm.py",
        "kernels/ssd/chunked.py",
        "training/optimizer.py",
        "training/plots.py",
        "eval/tasks/depo.py",
        "eval/render/depth.py",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(CODE)

    def key(inside=""):
        beside = {name: tmp_path / inside / name for name in ("kernels", "training", "eval")}
        return provenance.fingerprint_of({"": tmp_path / "hybrid_sleep", **beside})

    return tmp_path, key


@pytest.mark.parametrize(
    "path",
    ["training/optimizer.py", "kernels/ssd/chunked.py", "eval/tasks/depo.py",
     "hybrid_sleep/sleep/algorithm.py", "hybrid_sleep/__init__.py"],
)  # fmt: skip
def test_any_two_edits_that_can_change_a_number_have_two_fingerprints(tree, path):
    folder, key = tree
    keys = {key()}
    for rate in ("0.2", "0.3"):
        (folder / path).write_text(CODE.replace("0.1", rate))
        keys.add(key())
    assert len(keys) == 3
    (folder / path).unlink()
    assert key() not in keys


@pytest.mark.parametrize(
    "path", ["eval/render/depth.py", "training/plots.py", "hybrid_sleep/cli/app.py"]
)
def test_what_shows_numbers_is_left_out(tree, path):
    folder, key = tree
    before = key()
    (folder / path).write_text(CODE.replace("0.1", "0.2"))
    assert key() == before


def test_comments_docstrings_and_layout_are_left_out(tree):
    folder, key = tree
    before = key()
    (folder / "training" / "optimizer.py").write_text(DRESSED)
    assert key() == before


def test_an_installed_package_has_the_fingerprint_of_its_checkout(tree):
    folder, key = tree
    before = key()
    for name in ("kernels", "training", "eval"):
        (folder / name).rename(folder / "hybrid_sleep" / name)
    assert key(inside="hybrid_sleep") == before


def test_the_fingerprint_is_of_this_package_less_what_is_named():
    folders = provenance._folders()
    counted = {name for name, _ in provenance._modules(folders)}
    assert {"sleep.cache", "kernels.ssd.chunked", "training.optimizer", "eval.tasks.depo"} < counted
    every = {name for name, _ in provenance._modules(folders, left_out=())}
    for name in provenance.PRESENTATION:
        assert any(f"{module}.".startswith(f"{name}.") for module in every), name
    assert provenance.provenance()["source"] == provenance.fingerprint()
