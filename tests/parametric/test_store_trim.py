"""The files of commits that no undo is asked to bring back go, and no others."""

import pytest
import torch

from hybrid_sleep.parametric.factors import Factors
from hybrid_sleep.parametric.facts import Fact
from hybrid_sleep.parametric.store import FactStore


def factors(facts):
    r = len(facts)
    left, right, keys = torch.ones(3, r), torch.ones(r, 4), torch.ones(r, 4)
    return {"mlp.down_proj": Factors(left, right, keys, torch.tensor(facts))}


@pytest.fixture
def store(tmp_path):
    with FactStore.open(tmp_path / "facts", "0" * 64, model="small") as store:
        yield store


def test_what_more_undos_would_bring_back_than_are_asked_for_is_removed(store):
    def files():
        return sorted(p.name[:-12] for p in store.folder.glob("*-*.safetensors"))

    facts = store.add([Fact(name, "lives in", "Faro") for name in "Ada Bo Cy".split()])
    a, b, c = ({"w": torch.full((2,), float(i))} for i in range(3))
    states = [{one: "active"} for one in facts]
    store.commit("wake", states=states[0], factors=factors(facts[:1]), digest="1")
    store.commit("experience", weights=a, digest="2")
    store.commit("sleep", states=states[1], factors=factors(facts[:2]), replace=True, digest="3")
    store.commit("experience", weights=b, digest="4")
    store.commit("wake", states=states[2], factors=factors(facts[2:3]), digest="5")
    assert files() == [
        "commit-000001", "commit-000003", "commit-000005", "weights-000002", "weights-000004",
    ]  # fmt: skip
    # Two undos bring back commit 4, then 3: the first night's weights, under the slept factors.
    store.trim(2)
    assert files() == ["commit-000003", "commit-000005", "weights-000002", "weights-000004"]
    assert [store.undo().digest for _ in range(2)] == ["4", "3"]
    assert torch.equal(store.weights()["w"], a["w"])
    before = store.history()
    with pytest.raises(ValueError, match=r"before commit 3 .* got no commit-000001.*option undos"):
        store.undo()
    assert store.history() == before
    # What was undone is out of reach, and what is in effect always stays.
    store.commit("experience", weights=c, digest="8")
    store.trim(0)
    assert files() == ["commit-000003", "weights-000008"] and len(store.factors()) == 1
    assert torch.equal(store.weights()["w"], c["w"])
    with pytest.raises(ValueError, match="undos must be"):
        store.trim(-1)
