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
