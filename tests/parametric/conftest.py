"""The committed small world, and memories over it."""

from __future__ import annotations

import copy

import pytest
from memories import options

from hybrid_sleep.eval.facts.world import load_world
from hybrid_sleep.parametric.memory import Memory


@pytest.fixture(scope="session")
def world():
    return load_world(0)


@pytest.fixture(scope="session")
def rows(world):
    _, tokenizer, small = world
    parts = {}
    for split, count in (("train", 60), ("test", 4)):
        texts = iter(small.texts(split, 0))
        parts[split] = [tokenizer(next(texts)).input_ids for _ in range(count)]
    return parts["train"], parts["test"]


@pytest.fixture
def model(world):
    return copy.deepcopy(world[0])


@pytest.fixture
def opened(world, rows, tmp_path):
    """A function that opens a memory of a model over the world."""
    _, tokenizer, small = world
    known = [
        (small.relations[f.relation].statements[0].replace("{}", f.subject), f.object)
        for f in small.known_facts()[:8]
    ]

    def make(model, folder=tmp_path / "memory", **changes):
        given = {
            "relations": list(small.relations.values()),
            "known": known,
            "corpus": rows[0],
            "ordinary": rows[1],
            "options": options(),
            **changes,
        }
        return Memory.open(folder, model, tokenizer, **given)

    return make
