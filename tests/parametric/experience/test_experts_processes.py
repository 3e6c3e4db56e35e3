"""Two processes under ZeRO 2 train the experts of one, on the rows that one writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from two_processes import COMMON, imported, run_in_two

WORKER = Path(__file__).resolve().parent / "experts_worker.py"


@pytest.mark.slow
def test_two_processes_under_zero_2_train_the_experts_of_one(tmp_path):
    pytest.importorskip("deepspeed")
    run_in_two(WORKER, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    wanted = imported(WORKER).scenario(str(COMMON), "")
    assert wanted.keys() == first.keys() == second.keys() and wanted["rows on policy"] == 3
    for name, value in wanted.items():
        assert torch.equal(first[name], second[name]), name
        assert float((first[name] - value).abs().max()) <= 1e-5, name
