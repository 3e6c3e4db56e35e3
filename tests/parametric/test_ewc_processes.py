"""Two processes under ZeRO 2: the Fisher information of one, and the guarded steps of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from two_processes import COMMON, imported, run_in_two

WORKER = Path(__file__).resolve().parent / "guard_worker.py"


@pytest.mark.slow
def test_o7_two_processes_under_zero_2_do_what_one_does(tmp_path):
    pytest.importorskip("deepspeed")
    run_in_two(WORKER, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    worker = imported(WORKER)
    wanted, start = worker.alone(str(COMMON)), dict(worker.made(str(COMMON))[0].named_parameters())
    assert wanted.keys() == first.keys() == second.keys()
    moved = 0.0
    for name, value in wanted.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-5, msg=name)
        if name in start:
            moved = max(moved, float((value - start[name].detach()).abs().max()))
    assert moved > 1e-3
