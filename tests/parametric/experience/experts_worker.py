"""One process of `test_experts_processes.py`: experts, on-policy rows, interrupted and resumed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from hybrid_sleep.parametric.ewc import L2
from hybrid_sleep.parametric.experience.options import StudyOptions
from hybrid_sleep.parametric.experience.train import train
from hybrid_sleep.parametric.fisher import covered
from hybrid_sleep.training.ranks import ranks
from hybrid_sleep.training.zero import choose_accelerator

OPTIONS = StudyOptions(rows=3, rate=0.01, tokens=64, experts=2, on_policy=0.5)


class Kept:
    """What an interrupted training leaves, in memory."""

    folder, keeps, held = "memory", True, None

    def save(self, tensors, told):
        self.held = {name: x.detach().clone() for name, x in tensors.items()}, dict(told)

    def state(self):
        return self.held


def scenario(common: str, press: str) -> dict[str, torch.Tensor]:
    """Train experts of a small model; returns its weights, and how many rows it wrote."""
    sys.path.insert(0, common)
    from editable import tiny_llama
    from nights import lessons

    model = tiny_llama().float()
    course = lessons(model)
    marks = {name: set(vars(p)) for name, p in model.named_parameters()}
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=None)

    def night(unfinished, progress=None):
        guard = L2(model, 30.0)
        guard.consolidate()
        return train(
            model, course, OPTIONS, list(covered(model)[0]), guard, unfinished,
            tokenizer=tokenizer, progress=progress,
        )  # fmt: skip

    def interrupt(step: int, steps: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    unfinished = Kept()
    if press:
        try:
            night(unfinished, interrupt if press == "here" else None)
            raise AssertionError("not interrupted")
        except KeyboardInterrupt:
            pass
    done = night(unfinished)
    assert (done.step, done.resumed) == (4, 2 if press else 0)
    parameters = dict(model.named_parameters())
    assert {name: set(vars(p)) for name, p in parameters.items()} == marks
    found = {name: p.detach().clone() for name, p in parameters.items()}
    return found | {"rows on policy": torch.tensor(float(done.on_policy))}


def main(folder: Path, common: str) -> None:
    choose_accelerator()
    torch.distributed.init_process_group("gloo")
    assert ranks() == 2
    rank = torch.distributed.get_rank()
    torch.save(scenario(common, "here" if rank == 1 else "there"), folder / f"rank{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
