"""Two processes under ZeRO 2: the night of one, interrupted on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from two_processes import COMMON, imported, run_in_two

from hybrid_sleep.eval.facts.world import load_world
from hybrid_sleep.parametric.ewc import OnlineEWC

WORKER = Path(__file__).resolve().parent / "night_worker.py"


@pytest.mark.slow
def test_two_processes_under_zero_2_have_the_night_of_one(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    run_in_two(WORKER, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    worker = imported(WORKER)
    measured: list[tuple[Any, dict[str, Any]]] = []

    def measure(guard, rows, **options):
        measured.append((rows, options))
        return original(guard, rows, **options)

    original = OnlineEWC.measure
    with monkeypatch.context() as patch:
        patch.setattr(OnlineEWC, "measure", measure)
        wanted = worker.scenario(tmp_path / "alone", str(COMMON), "")
    assert wanted.keys() == first.keys() == second.keys()
    wanted |= {f"importance/{name}": x for name, x in alone_after(first, measured).items()}
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


def alone_after(
    found: dict[str, torch.Tensor], measured: list[tuple[Any, dict[str, Any]]]
) -> dict[str, torch.Tensor]:
    """What one process finds important in the weights of `found`, measured as in `measured`.

    At the weights of a night of its own it finds something else by their rounding: a change that
    differs by 1e-6 moves this information by 1e-5 of itself.
    """
    model = load_world(0)[0]
    guard = OnlineEWC(model, 10.0)
    for stage, (rows, options) in zip(("before", "after"), measured, strict=True):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if stage == "after" and f"change/{name}" in found:
                    p.add_(found[f"change/{name}"])
        guard.consolidate(guard.measure(rows, **options))
    return guard.importance
