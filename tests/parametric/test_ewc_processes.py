"""Two processes under ZeRO 2: the Fisher information of one, and the guarded steps of one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
COMMON = str(HERE.parent / "common")


@pytest.mark.slow
def test_o7_two_processes_under_zero_2_do_what_one_does(tmp_path):
    pytest.importorskip("deepspeed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, f"--master-port={port}", str(HERE / "guard_worker.py"), str(tmp_path), COMMON],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    sys.path.insert(0, str(HERE))
    try:
        from guard_worker import alone, made
    finally:
        sys.path.remove(str(HERE))
    wanted, start = alone(COMMON), dict(made(COMMON)[0].named_parameters())
    assert wanted.keys() == first.keys() == second.keys()
    moved = 0.0
    for name, value in wanted.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-5, msg=name)
        if name in start:
            moved = max(moved, float((value - start[name].detach()).abs().max()))
    assert moved > 1e-3
