"""One process of `test_zero.py`: a memory of a model that ZeRO-3 has partitioned."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from hybrid_sleep.eval.facts.world import load_world
from hybrid_sleep.parametric.memory import Memory
from hybrid_sleep.training.zero import choose_accelerator, prepare


def scenario(model, tokenizer, small, folder: Path, options) -> str:
    """Learn, sleep, update, take back; returns the digest of the weights."""
    facts = small.unseen_facts(2, 3)
    train, test = (
        [tokenizer(text).input_ids for text in small.texts(split, 0, count=count)]
        for split, count in (("train", 60), ("test", 4))
    )
    with Memory.open(
        folder,
        model,
        tokenizer,
        relations=list(small.relations.values()),
        corpus=train,
        ordinary=test,
        options=options,
    ) as memory:
        for fact in facts:
            memory.learn(fact)
        assert memory.sleep().outcome == "committed"
        memory.forget(facts[0].subject)
        memory.undo()
        return memory.edited.digest()


def main(folder: Path, common: str) -> None:
    sys.path.insert(0, common)
    from memories import options

    choose_accelerator()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    prepare(config, "cpu")
    import deepspeed

    deepspeed.init_distributed("gloo")
    model, tokenizer, small = load_world(0)
    module = deepspeed.initialize(model=model, config=config)[0].module
    weight = module.model.layers[2].mlp.down_proj.weight
    assert not weight.numel() and weight.ds_numel
    digest = scenario(module, tokenizer, small, folder / "memory", options())
    with deepspeed.zero.GatheredParameters([weight]):
        torch.save(weight.detach().clone(), folder / f"weight{os.environ['RANK']}.pt")
    (folder / f"digest{os.environ['RANK']}").write_text(digest)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
