"""The kernel benchmark against another commit: two trees, two processes, nothing left behind."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from hybrid_sleep.eval import results
from hybrid_sleep.kernels.benchmarks import base, ops
from hybrid_sleep.kernels.benchmarks.cases import FORWARD, Shape

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def small(index, **changes):
    """An entry of OPS at a small shape, forward alone."""
    changes = {"shapes": (Shape(T=9, B=2, H=2, d=4),), "directions": (FORWARD,), **changes}
    return replace(ops.OPS[index], **changes)


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(
        ["git", "-C", folder, *identity, *words], check=True, capture_output=True, text=True
    )
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout of the ops with one commit, after which ssd became slower."""
    folder = tmp_path_factory.mktemp("checkout")
    root = Path(__file__).resolve().parents[2]
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for name in ("hybrid_sleep", "kernels"):
        shutil.copytree(root / name, folder / name, ignore=ignored)
    shutil.copy(root / "pyproject.toml", folder)
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    file = folder / "kernels" / "ssd" / "__init__.py"
    slower = "\n_ssd = ssd\ndef ssd(*x, **y):\n    __import__('time').sleep(0.05)\n"
    file.write_text(file.read_text() + slower + "    return _ssd(*x, **y)\n")
    return folder


def test_two_states_are_compared_each_in_its_own_tree(checkout, tmp_path, monkeypatch):
    measured = (small(1), small(2), replace(small(1), name="gone", op="no_such_op"))
    result = base.run("HEAD", measured, checkout=checkout, repeats=2, out=tmp_path)
    slower, same, gone = result["rows"]
    # It sleeps fifty milliseconds; what it computes takes less than one.
    assert slower["ratio"] < 0.5 and slower["paths"] == ["chunked", "chunked"]
    assert len(same["seconds"]) == len(same["base_seconds"]) == 2
    assert same["quartiles"][0] <= same["ratio"] <= same["quartiles"][1]
    assert gone["reason"].count("No module named") == 2
    assert result["complete"]
    assert result["provenance"]["base"] == git(checkout, "rev-parse", "HEAD").strip()
    assert len(git(checkout, "worktree", "list").splitlines()) == 1
    paths = results.save(result, tmp_path)
    assert [path.name for path in paths] == ["results.json", "results.md", "base.png"]
    assert "No module named" in paths[1].read_text()
    # All of it is there, so no process is started.
    monkeypatch.setattr(base, "_worker", None)
    again = base.run("HEAD", measured, checkout=checkout, repeats=2, out=tmp_path)
    assert again["rows"] == result["rows"]


def test_an_interrupt_leaves_no_tree_and_no_process_behind(checkout, monkeypatch):
    seen = []

    def interrupted(*arguments):
        *_, ours, before = arguments
        seen.extend([ours, before])
        raise KeyboardInterrupt

    monkeypatch.setattr(base, "_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        base.run("HEAD", [small(1)], checkout=checkout)
    assert [tree.process.poll() is None for tree in seen] == [False, False]
    assert not seen[1].folder.exists()
    assert len(git(checkout, "worktree", "list").splitlines()) == 1


def test_what_cannot_be_compared_is_said_before_anything_starts(checkout, monkeypatch):
    monkeypatch.setattr(base, "_worktree", None)
    for revision in ("no-such-branch", "--all", "HEAD~1"):
        with pytest.raises(ValueError, match=f"base must be a commit .*, got '{revision}'"):
            base.run(revision, [small(1)], checkout=checkout)
    with pytest.raises(ValueError, match="repeats must be an integer of at least 2, got 1"):
        base.run("HEAD", [small(1)], checkout=checkout, repeats=1)


def test_a_package_that_is_no_checkout_has_no_base(tmp_path, monkeypatch):
    installed = tmp_path / "hybrid_sleep" / "__init__.py"
    monkeypatch.setattr(base.hybrid_sleep, "__file__", str(installed))
    with pytest.raises(ValueError, match=f"needs a git checkout.*{tmp_path} is none"):
        base.root()


def test_ops_from_elsewhere_are_refused(tmp_path):
    tree = base._Tree(tmp_path / "tree", None, None)
    tree.check_place(str(tmp_path / "tree" / "kernels" / "ssd" / "__init__.py"))
    with pytest.raises(ChildProcessError, match="were to run, and"):
        tree.check_place(str(tmp_path / "other" / "kernels" / "ssd" / "__init__.py"))


def test_the_last_line_of_a_worker_that_ends_is_in_the_error(tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text("raise RuntimeError('broken tree')\n")
    monkeypatch.setattr(base, "WORKER", worker)
    with base._worker(tmp_path) as tree:
        with pytest.raises(ChildProcessError, match="last line: RuntimeError: broken tree"):
            tree.request(do="close")
