"""Two processes under ZeRO 2: the night of one, interrupted on the way."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
COMMON = str(HERE.parents[1] / "common")


@pytest.mark.slow
def test_two_processes_under_zero_2_have_the_night_of_one(tmp_path):
    pytest.importorskip("deepspeed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, f"--master-port={port}", str(HERE / "night_worker.py"), str(tmp_path), COMMON],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    sys.path.insert(0, str(HERE))
    try:
        from night_worker import scenario
    finally:
        sys.path.remove(str(HERE))
    wanted = scenario(tmp_path / "alone", COMMON, "")
    assert wanted.keys() == first.keys() == second.keys()
    moved = 0.0
    for name, value in wanted.items():
        assert torch.equal(first[name], second[name]), name
        gap = float((first[name] - value).abs().max())
        if name.startswith("change/"):
            moved = max(moved, float(value.abs().max()))
            assert gap <= 1e-5, (name, gap)
        else:
            assert gap <= 1e-5 * max(1.0, float(value.abs().max())), (name, gap)
    assert moved > 1e-4
