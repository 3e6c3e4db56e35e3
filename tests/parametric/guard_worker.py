"""One process of `test_ewc_processes.py`: Fisher information, then guarded steps."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from hybrid_sleep.parametric.ewc import OnlineEWC
from hybrid_sleep.parametric.guard import GuardCallback
from hybrid_sleep.training import fit
from hybrid_sleep.training.ranks import ranks
from hybrid_sleep.training.zero import choose_accelerator, prepare

STEPS, WARMUP = 4, 2


def made(common: str):
    """The model and the rows that every process has."""
    sys.path.insert(0, common)
    from editable import VOCAB, tiny_hybrid
    from small import small_ids

    return tiny_hybrid(window=4).float(), small_ids(8, 7, vocab=VOCAB)


def measured(model, rows) -> OnlineEWC:
    """A guard behind one task, whose rows differ in length."""
    guard = OnlineEWC(model, 100.0)
    lengths = (7, 3, 5, 7, 2, 6, 7)
    guard.consolidate(
        guard.measure([row[:n] for row, n in zip(rows.tolist(), lengths, strict=False)], batch=3)
    )
    return guard


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)


def alone(common: str) -> dict[str, torch.Tensor]:
    """What one process makes of it."""
    model, rows = made(common)
    guard, optimizer = measured(model, rows), optimizer_of(model)
    state = {f"importance/{n}": x.clone() for n, x in guard.importance.items()}
    batches = [{"input_ids": rows, "labels": rows}] * STEPS
    with guard.guarding(optimizer):
        fit(model, batches, steps=STEPS, optimizer=optimizer, warmup=WARMUP)
    return state | {n: p.detach() for n, p in model.named_parameters()}


def main(folder: Path, common: str) -> None:
    choose_accelerator()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    prepare(config, "cpu")
    import deepspeed

    deepspeed.init_distributed("gloo")
    assert ranks() == 2
    model, rows = made(common)
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, optimizer=optimizer_of(model), config=config
    )
    rank = torch.distributed.get_rank()
    guard = measured(engine.module, rows)
    found = {f"importance/{n}": x.clone() for n, x in guard.importance.items()}
    callback, mine = GuardCallback(guard), rows[rank::2]
    for step in range(STEPS):
        engine.train()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(1.0, step / WARMUP)
        callback.on_step_begin(None, None, None, optimizer=optimizer)
        engine.backward(engine(input_ids=mine, labels=mine).loss)
        # DeepSpeed steps here, and Trainer tells of both behind it.
        engine.step()
        callback.on_pre_optimizer_step(None, None, None)
        callback.on_optimizer_step(None, None, None)
    found |= {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    torch.save(found, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
