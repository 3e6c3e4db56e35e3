"""One process of `test_night_processes.py`: a night, interrupted in one of them and resumed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from hybrid_sleep.eval.facts.world import load_world
from hybrid_sleep.parametric.durable import read_described
from hybrid_sleep.parametric.ewc import OnlineEWC
from hybrid_sleep.parametric.experience.night import GUARD
from hybrid_sleep.parametric.experience.options import StudyOptions
from hybrid_sleep.parametric.guard import part_of
from hybrid_sleep.parametric.memory import Memory
from hybrid_sleep.parametric.mix import Shares
from hybrid_sleep.training.ranks import of_first, ranks
from hybrid_sleep.training.zero import choose_accelerator

# Rows that two do not divide, and a last step that is shorter. No foundations: where the teacher is
# the model itself, gradients are rounding noise at first, of which AdamW makes whole steps.
STUDY = StudyOptions(
    band=(0, 100), share=1.0, dreams=0, shares=Shares(1.0, 0.0, 0.0), tokens=350, rows=5,
    rate=1e-4, measured=5, strength=10.0, erase=True,
)  # fmt: skip


def scenario(folder: Path, common: str, press: str) -> dict[str, torch.Tensor]:
    """Sleep over some experience; returns trained weights, importance, and what the record says."""
    sys.path.insert(0, common)
    from memories import options

    model, tokenizer, small = load_world(0)
    train, test = (
        [tokenizer(text).input_ids for text in small.texts(split, 0, count=count)]
        for split, count in (("train", 30), ("test", 4))
    )
    pairs = [
        (small.relations[f.relation].questions[0].replace("{}", f.subject), f.object)
        for f in small.unseen_facts(3, 11)
    ]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    marks = {name: set(vars(p)) for name, p in model.named_parameters()}
    with Memory.open(
        folder, model, tokenizer, relations=list(small.relations.values()), corpus=train,
        ordinary=test, options=options(study=STUDY),
    ) as memory:  # fmt: skip
        # What the model could do before, held as by earlier nights.
        guard = OnlineEWC(model, 10.0)
        guard.consolidate(guard.measure(train[:5], batch=3))
        of_first(guard.save, folder / GUARD)
        found = {f"first/{name}": x.clone() for name, x in guard.importance.items()}
        for question, answer in pairs:
            assert memory.experience(answer, prompt=question, consent=True).id is not None

        def progress(step: str, done: int, of: int) -> None:
            if step == "train" and done == 2:
                os.kill(os.getpid(), signal.SIGINT)

        if press:
            try:
                memory.sleep(kind="experience", progress=progress if press == "here" else None)
                raise AssertionError("not interrupted")
            except KeyboardInterrupt:
                pass
            now = dict(model.named_parameters())
            assert all(torch.equal(value, now[name]) for name, value in before.items())
        record = memory.sleep(kind="experience", questions=())
        assert record.outcome == "committed", record
        assert record.gate["training"]["resumed at"] == (2 if press else None)
        assert not (folder / "night").exists()
        # Nothing of DeepSpeed stays in the model.
        now = dict(model.named_parameters())
        assert {name: set(vars(p)) for name, p in now.items()} == marks
        assert len({p.untyped_storage().data_ptr() for p in now.values()}) == len(now)
        assert not model._forward_hooks and not model._forward_pre_hooks
        learned = dict(memory.edited.learned)
    importance = part_of(read_described(folder / GUARD)[0], "importance")
    found |= {f"importance/{name}": x for name, x in importance.items()}
    found |= {f"change/{name}": x - before[name] for name, x in learned.items()}
    values = [x for x in record.gate["after"].values() if x is not None]
    return found | {"gate": torch.tensor(values)}


def main(folder: Path, common: str) -> None:
    choose_accelerator()
    torch.distributed.init_process_group("gloo")
    assert ranks() == 2
    rank = torch.distributed.get_rank()
    found = scenario(folder / "memory", common, "here" if rank == 1 else "there")
    torch.save(found, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
