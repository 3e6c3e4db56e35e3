"""A process killed before, within or after any write leaves the store as it was or as it was to be.

And what was done before that, facts above all, is there; the rest can be done anew.
"""

from __future__ import annotations

import os
import signal

import pytest
import safetensors.torch
import torch

from hybrid_sleep.parametric import durable
from hybrid_sleep.parametric.factors import Factors
from hybrid_sleep.parametric.facts import Fact, Relation
from hybrid_sleep.parametric.store import FactStore

BASE = "0" * 64


def part(facts, seed):
    g = torch.Generator().manual_seed(seed)
    left, right, keys = (torch.randn(*s, generator=g) for s in ((3, 2), (2, 4), (len(facts), 4)))
    return {"a": Factors(left, right, keys, torch.tensor(facts))}


# All that writes; each step is one call, and the ids that later ones name are known.
STEPS = (
    lambda s: s.save_pristine({"a.weight": torch.ones(3, 4)}),
    lambda s: s.add([Fact("Ada", "lives in", "Faro"), Fact("Bo", "lives in", "Faro")]),
    lambda s: s.commit(
        "wake",
        states={1: "active", 2: "active"},
        factors=part([1, 2], 1),
        digest="1",
        edits={1: {"a": {"norm": 1.0}}},
        audits={1: {"statement": True}},
    ),
    lambda s: s.record_audit({2: {"statement": False}}, {2: "degraded"}),
    lambda s: s.add([Fact("Ada", "lives in", "Braga")], [Relation("lives in", ("{} lives in",))]),
    lambda s: s.save_pristine({"b.weight": torch.zeros(2)}),
    lambda s: s.commit(
        "sleep",
        states={2: "active", 3: "active"},
        factors=part([2, 3], 2),
        replace=True,
        digest="2",
        report={"seconds": 1.0},
    ),
    lambda s: s.undo(),
    lambda s: s.commit("forget", states={1: "retired", 2: "retired"}, replace=True, digest=BASE),
    lambda s: s.commit("sleep", status="nothing to do"),
    lambda s: s.commit("wake", states={3: "active"}, factors=part([3], 3), digest="3"),
    lambda s: s.commit("experience", weights={"b.weight": torch.ones(2)}, digest="4"),
    lambda s: s.undo(),
)


def contents(store):
    """All that lasts, without times."""
    facts = [(x.id, x.fact, x.version, x.state, x.supersedes) for x in store.facts()]
    told = [store.explain(x.id) for x in store.facts()]
    commits = [
        (c.kind, c.status, c.digest, store.files(c.id), c.weights, c.effective, c.report)
        for c in store.history()
    ]
    tensors = [
        {name: getattr(of[site], name).tolist() for name in ("left", "right", "keys", "facts")}
        for of in store.factors()
        for site in of
    ]
    return (
        facts,
        [(x["edits"], x["audit"] and x["audit"]["results"]) for x in told],
        commits,
        tensors,
        {name: value.tolist() for name, value in store.pristine().items()},
        {name: value.tolist() for name, value in store.weights().items()},
        store.relation("lives in"),
    )


def run(folder, after=lambda step, store: None, first=0):
    with FactStore.open(folder, BASE) as store:
        after(first - 1, store)
        for number, step in enumerate(STEPS[first:], first):
            step(store)
            after(number, store)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What lasts after each step, and every write on the way."""
    seen, writes = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "reached", writes.append)
        folder = tmp_path_factory.mktemp("whole")
        run(folder, lambda step, store: seen.append(contents(store)))
    return seen, writes


def in_a_process_that_is_killed(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            # Nothing of pytest's may run twice.
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_every_kind_of_write_is_passed(whole):
    _, writes = whole
    transactions = {"schema", "facts", "commit", "audit", "undo"}
    files = {"pristine.safetensors"} | {f"commit-00000{n}.safetensors" for n in (1, 2, 6)}
    files.add("weights-000007.safetensors")
    assert set(writes) == {f"{when} {x}" for when in ("before", "after") for x in transactions} | {
        f"{when} {x}" for when in ("before", "within", "after") for x in files
    }


def test_a_kill_at_any_write_leaves_what_was_or_what_was_to_be(whole, tmp_path):
    seen, writes = whole
    for last in range(len(writes)):
        folder, progress = tmp_path / f"{last}", tmp_path / f"{last}.steps"
        progress.touch()
        passed = []

        def reached(point, last=last, passed=passed):
            passed.append(point)
            if len(passed) > last:
                die()

        def note(step, store, progress=progress):
            progress.write_text(f"{step}")

        def work(folder=folder, reached=reached, note=note):
            durable.reached = reached
            run(folder, note)

        in_a_process_that_is_killed(work)
        done = int(progress.read_text() or -2)
        with FactStore.open(folder, BASE) as store:
            now = contents(store)
            # Where even the opening was not finished, it was empty and still is.
            allowed = [seen[0]] if done == -2 else seen[done + 1 : done + 3]
            assert now in allowed, writes[last]
            files = {f[0] for c in store.history() for f in (c.file, c.weights) if f}
            # A journal that nothing was synced to is left for the next transaction to take over.
            others = {"facts.db", "facts.db-journal", "pristine.safetensors"}
            others.add(".hybrid_sleep.lock")
            assert files <= set(os.listdir(folder)) <= files | others, writes[last]
        run(folder, first=max(done + 1, 0) if now == allowed[0] else done + 2)
        with FactStore.open(folder, write=False) as store:
            assert contents(store) == seen[-1], writes[last]


def test_a_reader_rolls_back_what_was_half_written(tmp_path):
    with FactStore.open(tmp_path, BASE) as store:
        store.add([Fact("Ada", "lives in", "Faro")])

    def work():
        with FactStore.open(tmp_path, BASE) as store:
            # Too small for the transaction, so that part of it is in the file before its end.
            store._db.execute("PRAGMA cache_size = 2")
            durable.reached = lambda point: die()
            store.add([Fact(f"Bo {i}", "lives in", "Faro", source="x" * 999) for i in range(300)])

    before = (tmp_path / "facts.db").read_bytes()
    in_a_process_that_is_killed(work)
    assert (tmp_path / "facts.db-journal").exists()
    assert (tmp_path / "facts.db").read_bytes() != before
    with FactStore.open(tmp_path, write=False) as reader:
        assert [str(x.fact) for x in reader.facts()] == ["Ada lives in Faro"]


def test_a_kill_in_the_middle_of_a_file_leaves_the_old_one(tmp_path):
    with FactStore.open(tmp_path, BASE) as store:
        store.save_pristine({"a.weight": torch.ones(3, 4)})

    def half(tensors, path, metadata):
        path.write_bytes(b"\x40")
        die()

    def work():
        safetensors.torch.save_file = half
        with FactStore.open(tmp_path, BASE) as store:
            store.save_pristine({"b.weight": torch.ones(2)})

    in_a_process_that_is_killed(work)
    with FactStore.open(tmp_path, BASE) as store:
        assert store.pristine().keys() == {"a.weight"}
        assert len(list(tmp_path.glob("*.safetensors"))) == 1
