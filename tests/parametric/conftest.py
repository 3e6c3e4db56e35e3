"""The committed small world, and memories over it."""

from __future__ import annotations

import copy

import pytest
from memories import options

from hybrid_sleep.eval.facts.world import load_world
from hybrid_sleep.parametric import workspace
from hybrid_sleep.parametric.memory import Memory
from hybrid_sleep.sleep.weights import weights_digest


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


@pytest.fixture(scope="session", autouse=True)
def _samples_once():
    """What the same weights write from the same seed, each time a memory asks, is written once."""
    made, write = {}, workspace.own_samples

    def once(model, tokenizer, *args, **given):
        key = weights_digest(model), args, repr(sorted(given.items()))
        if key not in made:
            made[key] = write(model, tokenizer, *args, **given)
        return [list(row) for row in made[key]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace, "own_samples", once)
        yield


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
