"""Memory under ZeRO-3: two processes, of which the first has the folder and solves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from memories import options
from two_processes import imported, run_in_two

from hybrid_sleep.eval.facts.world import load_world

WORKER = Path(__file__).resolve().parent / "zero_worker.py"


@pytest.mark.slow
def test_two_processes_under_zero_3_write_the_weights_of_one(tmp_path):
    pytest.importorskip("deepspeed")
    run_in_two(WORKER, tmp_path)
    first, second = (torch.load(tmp_path / f"weight{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)
    assert (tmp_path / "digest0").read_text() == (tmp_path / "digest1").read_text()
    worker = imported(WORKER)
    model, tokenizer, small = load_world(0)
    pristine = model.model.layers[2].mlp.down_proj.weight.detach().clone()
    worker.scenario(model, tokenizer, small, tmp_path / "alone", options())
    alone = model.model.layers[2].mlp.down_proj.weight
    assert (alone - pristine).norm() > 0.01 * pristine.norm()
    torch.testing.assert_close(first, alone.detach(), rtol=1e-5, atol=1e-6)
