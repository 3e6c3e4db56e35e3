"""Two processes under ZeRO 2: the night of one, interrupted on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from two_processes import COMMON, imported, run_in_two

WORKER = Path(__file__).resolve().parent / "night_worker.py"


@pytest.mark.slow
def test_two_processes_under_zero_2_have_the_night_of_one(tmp_path):
    pytest.importorskip("deepspeed")
    run_in_two(WORKER, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    worker = imported(WORKER)
    wanted = worker.scenario(tmp_path / "alone", str(COMMON), "")
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
