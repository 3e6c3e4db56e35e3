"""Memory under ZeRO-3: two processes, of which the first has the folder and solves."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from memories import options

from hybrid_sleep.eval.facts.world import load_world

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
def test_two_processes_under_zero_3_write_the_weights_of_one(tmp_path):
    pytest.importorskip("deepspeed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launch += [f"--master-port={port}", str(HERE / "zero_worker.py"), str(tmp_path)]
    done = subprocess.run(
        [*launch, str(HERE.parent / "common")],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (torch.load(tmp_path / f"weight{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)
    assert (tmp_path / "digest0").read_text() == (tmp_path / "digest1").read_text()
    sys.path.insert(0, str(HERE))
    try:
        from zero_worker import scenario
    finally:
        sys.path.remove(str(HERE))
    model, tokenizer, small = load_world(0)
    pristine = model.model.layers[2].mlp.down_proj.weight.detach().clone()
    scenario(model, tokenizer, small, tmp_path / "alone", options())
    alone = model.model.layers[2].mlp.down_proj.weight
    assert (alone - pristine).norm() > 0.01 * pristine.norm()
    torch.testing.assert_close(first, alone.detach(), rtol=1e-5, atol=1e-6)
