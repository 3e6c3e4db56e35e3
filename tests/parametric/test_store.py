"""The folder of facts: versions, commits and their undoing, files that are refused."""

from __future__ import annotations

import json
import os
import sqlite3

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_sleep.parametric.factors import Factors
from hybrid_sleep.parametric.facts import Fact, Relation
from hybrid_sleep.parametric.schema import WRITTEN
from hybrid_sleep.parametric.store import FactStore

BASE = "0" * 64
LIVES = Relation("lives in", ("{} lives in", "The home of {} is"), held_out=("{} is found in",))
ADA = Fact("Ada Byron", "lives in", "Lisbon", source="Last week Ada Byron moved. She likes Lisbon.")


def factors(facts, site="blocks.1.mlp.down_proj", o=3, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    r = len(facts)
    left, right, keys = (torch.randn(*s, generator=g) for s in ((o, r), (r, d), (r, d)))
    return {site: Factors(left, right, keys, torch.tensor(facts, dtype=torch.int64))}


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(getattr(one[site], part), getattr(other[site], part))
        for site in one
        for part in ("left", "right", "keys", "facts")
    )


def states(store):
    return {known.id: known.state for known in store.facts()}


@pytest.fixture
def store(tmp_path):
    with FactStore.open(tmp_path / "facts", BASE, model="small") as store:
        yield store


def test_a_fact_is_kept_with_its_words_and_where_it_stood(store):
    (one,) = store.add([ADA], [LIVES])
    store.close()
    with FactStore.open(store.folder, BASE) as again:
        known = again.fact(one)
        assert known.fact == ADA and known.fact.source == ADA.source
        assert (known.version, known.state, known.supersedes) == (1, "pending", None)
        assert ADA.source[slice(*known.span)] == "Ada Byron moved. She likes Lisbon"
        assert again.relation("Lives In") == LIVES
        assert again.relation("works at") == Relation.plain("works at")
        assert again.find("ada byron") == again.find("ADA BYRON", "Lives in") == [known]
        assert again.find("Ada Byron", "works at") == []


def test_the_same_again_is_no_new_fact_and_another_object_is_a_new_version(store):
    lisbon, porto, faro = (Fact("Ada", "lives in", x) for x in ("Lisbon", "Porto", "Faro"))
    (one,) = store.add([lisbon])
    assert store.add([Fact("ADA", "Lives in", "lisbon"), lisbon]) == [one, one]
    store.commit("wake", states={one: "active"}, digest="1")

    (two,) = store.add([porto])
    assert states(store) == {one: "active", two: "pending"}
    (three,) = store.add([faro])
    assert states(store) == {one: "active", two: "retired", three: "pending"}
    assert (store.fact(three).version, store.fact(three).supersedes) == (3, two)
    # Said again last, what is in the weights holds, and nothing waits to replace it.
    assert store.add([lisbon]) == [one]
    assert states(store) == {one: "active", two: "retired", three: "retired"}

    (four,) = store.add([faro])
    assert four not in (one, two, three)
    store.commit("wake", states={four: "active"}, digest="2")
    assert [s for _, s in sorted(states(store).items())] == ["retired"] * 3 + ["active"]
    store.commit("forget", states={four: "retired"}, digest="3")
    (five,) = store.add([faro])
    assert (store.fact(five).version, store.fact(five).supersedes) == (5, None)


def test_factors_are_added_to_those_before_or_replace_them(store):
    one, two, three = store.add([Fact(name, "lives in", "Faro") for name in ("Ada", "Bo", "Cy")])
    a, b, c = factors([one], seed=1), factors([two, two], seed=2), factors([one, two, three])
    c |= factors([three], site="blocks.2.mlp.down_proj", o=2, seed=3)
    store.commit("wake", states={one: "active"}, factors=a, digest="1")
    store.commit("wake", states={two: "active"}, factors=b, digest="2")
    assert list(map(same, store.factors(), (a, b))) == [True, True]
    store.commit("sleep", states={three: "active"}, factors=c, replace=True, digest="3")
    assert len(store.factors()) == 1 and same(store.factors()[0], c)
    assert len(store.factors(commit=1)) == 1 and same(store.factors(commit=1)[0], a)
    site = "blocks.1.mlp.down_proj"
    assert store.keys()[site][1].tolist() == [one, two, three]

    store.commit("forget", states={two: "retired"}, digest="4")
    keys, whose = store.keys()[site]
    assert whose.tolist() == [one, three] and torch.equal(keys, c[site].keys[[0, 2]])
    store.commit("forget", states={one: "retired", three: "retired"}, replace=True, digest=BASE)
    assert store.factors() == [] and store.keys() == {}
    assert [c.digest for c in store.history()] == ["1", "2", "3", "4", BASE]
    with pytest.raises(ValueError, match="commit must be the id of one in the store, got 9"):
        store.factors(commit=9)


def test_undo_goes_back_as_an_editor_does(store):
    one, two = store.add([Fact("Ada", "lives in", "Faro"), Fact("Bo", "lives in", "Porto")])
    store.commit("wake", states={one: "active"}, factors=factors([one]), digest="1")
    store.commit("wake", states={two: "active"}, factors=factors([two]), digest="2")
    # What changed nothing is not undone.
    store.commit("sleep", status="rolled back", report={"gate": {"locality": 0.9}})
    assert store.head.digest == "2" and store.head.report == {"gate": {"locality": 0.9}}

    commit = store.undo()
    assert (commit.kind, commit.digest, commit.report) == ("undo", "1", {"undone": 2})
    # What was learned is taken back, and does not wait to be written again.
    assert states(store) == {one: "active", two: "retired"} and len(store.factors()) == 1
    (three,) = store.add([Fact("Cy", "lives in", "Braga")])
    store.commit("wake", states={three: "active"}, factors=factors([three]), digest="3")
    assert [store.undo().digest, store.undo().digest] == ["1", BASE]
    assert set(states(store).values()) == {"retired"} and store.factors() == []
    before = store.history()
    with pytest.raises(ValueError, match="must have a commit to take back, got none in effect"):
        store.undo()
    assert store.history() == before
    with FactStore.open(store.folder.parent / "new", BASE) as new:
        with pytest.raises(ValueError, match="must have a commit to take back"):
            new.undo()


def test_what_was_undone_does_not_wait_where_a_later_version_does(store):
    (one,) = store.add([Fact("Ada", "lives in", "Faro")])
    store.commit("wake", states={one: "active"}, digest="1")
    (two,) = store.add([Fact("Ada", "lives in", "Porto")])
    store.undo()
    assert states(store) == {one: "retired", two: "pending"}


NAMES, PLACES = ("Ada", "Bo"), ("Faro", "Porto")
ACTIONS = st.one_of(
    st.tuples(st.just("add"), st.sampled_from(NAMES), st.sampled_from(PLACES)),
    st.tuples(
        st.just("commit"),
        st.dictionaries(st.integers(0, 5), st.sampled_from((*WRITTEN, "quarantined", "retired"))),
        st.booleans(),
    ),
    st.tuples(st.just("audit"), st.integers(0, 5), st.sampled_from(WRITTEN)),
    st.tuples(st.just("undo")),
    st.tuples(st.just("nothing")),
    st.tuples(st.just("reopen")),
)


@settings(max_examples=25)
@given(actions=st.lists(ACTIONS, min_size=3, max_size=14))
def test_undo_is_the_inverse_of_a_commit_in_any_order(tmp_path_factory, actions):
    folder = tmp_path_factory.mktemp("store")
    store = FactStore.open(folder, BASE)
    # What a list of states would do, of which undo drops the last: facts in the weights, factors.
    done = [(set(), BASE, ())]

    def outside():
        written = {known.id for known in store.facts(WRITTEN)}
        head = store.head
        return written, head.digest if head else BASE, tuple(store.files())

    for number, (action, *values) in enumerate(actions):
        if action == "add":
            name, place = values
            (made,) = store.add([Fact(name, "lives in", place)])
            newest = max(store.find(name), key=lambda known: known.version)
            assert newest.id == made and newest.fact.object == place
        elif action == "audit":
            known = {x.id for x in store.facts(WRITTEN)}
            chosen = {values[0]: values[1]} if values[0] in known else {}
            store.record_audit(dict.fromkeys(chosen, {"statement": True}), chosen)
        elif action == "commit":
            wanted, seen = {}, set()
            for known in store.facts():
                state = values[0].get(known.id)
                if state and known.state != "retired" and known.fact.key not in seen:
                    wanted[known.id] = state
                    seen.add(known.fact.key)
            before = {**states(store)}
            made = factors(sorted(wanted), seed=number) if wanted else None
            store.commit(
                "sleep", states=wanted, factors=made, replace=values[1], digest=f"{number}"
            )
            after = states(store)
            store.undo()
            assert states(store) == before and outside() == done[-1]
            # A version that was retired can only come back by undoing, so its change is made anew.
            store.commit(
                "sleep", states=wanted, factors=made, replace=values[1], digest=f"{number}"
            )
            assert states(store) == after
            done.append(outside())
        elif action == "undo":
            if len(done) > 1:
                done.pop()
                store.undo()
            else:
                with pytest.raises(ValueError, match="to take back"):
                    store.undo()
        elif action == "nothing":
            store.commit("sleep", status="nothing to do")
        else:
            store.close()
            store = FactStore.open(folder, BASE)
        assert outside() == done[-1]
        by_key = {}
        for known in store.facts():
            if known.state != "retired":
                by_key.setdefault(known.fact.key, []).append(known.state in WRITTEN)
        # At most one version is in the weights, and one that waits is later.
        assert all(kinds in ([True], [False], [True, False]) for kinds in by_key.values())
    store.close()


def test_trained_weights_hold_until_others_come_or_an_undo(store):
    (one,) = store.add([Fact("Ada", "lives in", "Faro")])
    first, second = ({"blocks.0.up.weight": torch.full((2, 3), x)} for x in (1.0, 2.0))
    held = lambda commit=None: {name: x.tolist() for name, x in store.weights(commit).items()}  # noqa: E731
    want = [{}]
    assert held() == {}
    store.commit("wake", states={one: "active"}, factors=factors([one]), digest="1")
    store.commit("experience", weights=first, digest="2")
    store.commit("sleep", states={one: "active"}, factors=factors([one]), replace=True, digest="3")
    store.commit("sleep", status="nothing to do")
    store.commit("experience", weights=second, digest="5")
    store.undo()
    want += [{}] + 3 * [{"blocks.0.up.weight": [[1.0] * 3] * 2}]
    want += [{"blocks.0.up.weight": [[2.0] * 3] * 2}, want[2]]
    assert [held(commit) for commit in range(1, 7)] == want[1:]
    store.close()
    with FactStore.open(store.folder, BASE) as again:
        assert {name: x.tolist() for name, x in again.weights().items()} == want[2]
        again.undo()
        again.undo()
        assert again.weights() == {} and len(again.files()) == 1
        assert (again.folder / "weights-000005.safetensors").is_file()


def test_what_is_kept_of_a_commit_does_not_grow_with_their_number(store):
    def size(number):
        row = store._db.execute("SELECT * FROM commits WHERE id = ?", (number,)).fetchone()
        return sum(len(str(x)) for x in row)

    made = []
    for i in range(40):
        (one,) = store.add([Fact(f"Subject {i}", "lives in", "Faro")])
        made.append(factors([one], seed=i))
        store.commit("wake", states={one: "active"}, factors=made[-1], digest=f"{i:064d}")
    assert size(40) <= size(5) + 4  # digits of its ids
    assert len(store.files()) == 40 and len(store.files(7)) == 7
    assert all(same(a, b) for a, b in zip(store.factors(), made, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "dream"}, "kind must be one of .*, 'experience', got 'dream'"),
        ({"states": {9: "active"}}, "fact_id must be one of a fact in the store, got 9"),
        ({"states": {1: "known"}}, "state of fact 1 must be one of 'pending', .*, got 'known'"),
        ({"states": {1: "active", 3: "active"}}, "states must write one version .* got 1 and 3"),
        ({"states": {2: "active"}}, "state of fact 2 must stay 'retired', got 'active'"),
        ({"factors": factors([1, 9])}, "fact_id must be one of a fact in the store, got 9"),
        ({"report": {"ratio": float("nan")}}, "not JSON compliant"),
        ({"status": "done"}, "status must be one of 'committed', 'rolled back', .*, got 'done'"),
        (
            {"status": "rolled back", "states": {1: "active"}},
            "that is rolled back must have no states, no factors and no weights",
        ),
        ({"edits": {9: {"a": {}}}}, "fact_id must be one of a fact in the store, got 9"),
    ],
)
def test_a_commit_that_cannot_be_changes_nothing(store, change, message):
    (one,) = store.add([Fact("Ada", "lives in", "Faro")])
    store.commit("wake", states={one: "active"}, digest="1")
    store.add([Fact("Ada", "lives in", "Porto")])
    store.add([Fact("Ada", "lives in", "Braga")])
    before = states(store), store.history(), sorted(os.listdir(store.folder))
    with pytest.raises(ValueError, match=message):
        store.commit(**{"kind": "wake", **change})
    assert before == (states(store), store.history(), sorted(os.listdir(store.folder)))


def test_factors_that_do_not_fit_together_are_refused(store):
    (one,) = store.add([ADA])
    good = factors([one])["blocks.1.mlp.down_proj"]
    wrong = {
        "left": good.left.double(),
        "right": good.right[:, :2],
        "keys": torch.full_like(good.keys, float("inf")),
        "facts": good.facts[:0],
    }
    for name, value in wrong.items():
        parts = {part: getattr(good, part) for part in ("left", "right", "keys", "facts")}
        with pytest.raises(ValueError, match="of a.b must be"):
            store.commit("wake", factors={"a.b": Factors(**{**parts, name: value})})
    assert store.history() == []


def test_facts_that_are_none_are_refused(store):
    with pytest.raises(ValueError, match="facts must each be a Fact, got 'Ada lives in Faro.'"):
        store.add(["Ada lives in Faro."])
    with pytest.raises(ValueError, match="must not contradict each other"):
        store.add([Fact("Ada", "lives in", "Faro"), Fact("ada", "lives in", "Porto")])
    with pytest.raises(ValueError, match="spans must be one for each of 1 facts, got 0"):
        store.add([ADA], spans=[])
    assert store.facts() == []
    (one,) = store.add([ADA])
    with pytest.raises(ValueError, match="states must be of facts in the weights, got fact 1"):
        store.record_audit({one: {}}, {one: "degraded"})
    with pytest.raises(ValueError, match="state of fact 1 must be one of 'active', 'degraded'"):
        store.record_audit({}, {one: "retired"})
    with pytest.raises(ValueError, match="state must be one of 'pending', .*, got 'lost'"):
        store.facts("lost")


def test_explain_says_when_it_came_what_it_changed_and_how_it_tests(store):
    (one,) = store.add([ADA], [LIVES])
    site = "blocks.1.mlp.down_proj"
    store.commit(
        "wake",
        states={one: "active"},
        factors=factors([one]),
        digest="1",
        edits={one: {site: {"norm": 0.5, "error": 1e-9}}},
        audits={one: {"statement": True}},
    )
    store.record_audit({one: {"statement": False, "question": False}}, {one: "degraded"})
    (two,) = store.add([Fact("Ada Byron", "lives in", "Porto")])
    told = json.loads(json.dumps(store.explain(one)))
    assert told["state"] == "degraded" and told["source"] == ADA.source
    assert told["edits"] == [{"commit": 1, "site": site, "norm": 0.5, "error": 1e-9}]
    assert told["audit"]["results"] == {"statement": False, "question": False}
    assert [(c["kind"], c["before"], c["after"]) for c in told["commits"]] == [
        ("wake", "pending", "active")
    ]
    assert told["conflicts"] == [two] and told["superseded_by"] == two
    assert [v["object"] for v in told["versions"]] == ["Lisbon", "Porto"]
    assert store.explain(two)["supersedes"] == one and store.explain(two)["audit"] is None
    with pytest.raises(ValueError, match="fact_id must be one of a fact in the store, got 7"):
        store.explain(7)


def test_pristine_weights_are_kept_once_and_grow_by_sites(store):
    first = {"a.weight": torch.randn(3, 4, dtype=torch.bfloat16), "b.weight": torch.randn(2, 2).T}
    store.save_pristine(first)
    edited = {"a.weight": first["a.weight"] + 1, "c.weight": torch.ones(2)}
    store.save_pristine(edited)
    kept = store.pristine()
    assert kept.keys() == {"a.weight", "b.weight", "c.weight"}
    assert all(torch.equal(kept[name], x) for name, x in {**edited, **first}.items())
    with pytest.raises(ValueError, match=r"a.weight must be torch.bfloat16 of shape \(3, 4\)"):
        store.save_pristine({"a.weight": torch.zeros(3, 4)})


def test_one_writes_and_others_read_beside_it(store):
    with pytest.raises(BlockingIOError, match="is being written into by process"):
        FactStore.open(store.folder, BASE)
    (one,) = store.add([ADA])
    with FactStore.open(store.folder, write=False) as reader:
        assert reader.find("Ada Byron")[0].state == "pending"
        store.commit("wake", states={one: "active"}, factors=factors([one]), digest="1")
        assert reader.explain(one)["state"] == "active" and same(
            reader.factors()[0], factors([one])
        )
        assert len(list(reader.export_lines())) == 1
        for write in (
            lambda: reader.add([ADA]),
            lambda: reader.commit("wake", factors=factors([one])),
            reader.undo,
            lambda: reader.record_audit({one: {}}),
            lambda: reader.save_pristine({}),
        ):
            with pytest.raises(PermissionError, match="must be open for writing"):
                write()
    store.close()
    FactStore.open(store.folder, BASE).close()


def test_a_store_can_be_read_where_nothing_can_be_written(store):
    (one,) = store.add([ADA])
    store.commit("wake", states={one: "active"}, factors=factors([one]), digest="1")
    store.close()
    (store.folder / "facts.db").chmod(0o444)
    store.folder.chmod(0o555)
    try:
        with FactStore.open(store.folder, write=False) as reader:
            assert reader.fact(one).state == "active" and len(reader.factors()) == 1
    finally:
        store.folder.chmod(0o755)


def test_stores_that_are_not_for_this_model_or_version_are_refused_as_they_are(store):
    store.close()
    file = store.folder / "facts.db"
    with pytest.raises(ValueError, match="model must have the weights for which .* got 1111"):
        FactStore.open(store.folder, "1" * 64)

    db = sqlite3.connect(file)
    db.execute("PRAGMA user_version = 1")
    db.close()
    with pytest.raises(ValueError, match="facts.db must be 2, got 1; a version before the first"):
        FactStore.open(store.folder, BASE)
    db = sqlite3.connect(file)
    db.execute("PRAGMA user_version = 3")
    db.close()
    before = file.read_bytes()
    with pytest.raises(ValueError, match="schema of .*facts.db must be 2, got 3; a newer"):
        FactStore.open(store.folder, BASE)
    assert file.read_bytes() == before and os.listdir(store.folder) == ["facts.db"]

    db = sqlite3.connect(file)
    db.execute("PRAGMA application_id = 7")
    db.close()
    with pytest.raises(ValueError, match="must be a store of facts, got the database of something"):
        FactStore.open(store.folder, BASE, write=False)


def test_damaged_and_missing_files_are_named(store, tmp_path):
    (one,) = store.add([ADA])
    store.commit("wake", states={one: "active"}, factors=factors([one]), digest="1")
    store.close()
    file, tensors = store.folder / "facts.db", store.folder / "commit-000001.safetensors"
    whole, weights = file.read_bytes(), tensors.read_bytes()
    for damage in (b"no database at all" * 100, whole[: len(whole) // 2], whole[:100]):
        file.write_bytes(damage)
        for write in (True, False):
            with pytest.raises(ValueError, match=r"facts\.db is damaged: "):
                FactStore.open(store.folder, BASE, write=write)
        assert file.read_bytes() == damage
    file.write_bytes(whole)

    tensors.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with FactStore.open(store.folder, BASE) as again:
        with pytest.raises(ValueError, match=r"commit-000001\.safetensors is damaged: .*SHA-256"):
            again.factors()
    tensors.unlink()
    with pytest.raises(FileNotFoundError, match=r"commit-000001\.safetensors is missing"):
        FactStore.open(store.folder, BASE)

    with pytest.raises(FileNotFoundError, match=r"must hold facts, got no facts\.db in it"):
        FactStore.open(tmp_path / "none", write=False)
    with pytest.raises(FileNotFoundError, match=r"must hold facts, got no facts\.db in it"):
        FactStore.open(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    # What a process leaves that is killed before the first transaction.
    (tmp_path / "facts.db").touch()
    with pytest.raises(ValueError, match="must hold facts, or be made for a model"):
        FactStore.open(tmp_path, write=False)
    FactStore.open(tmp_path, BASE).close()


def test_files_that_no_commit_refers_to_go_and_others_stay(store):
    (one,) = store.add([ADA])
    store.commit("wake", states={one: "active"}, factors=factors([one]), digest="1")
    store.undo()
    store.close()
    stay = ["commit-000001.safetensors", "notes.txt", "model.safetensors", "commit-1.safetensors"]
    go = [
        "commit-000007.safetensors",
        ".commit-000002.safetensors.x1.partial.safetensors",
        ".pristine.safetensors.x1.partial.safetensors",
    ]
    for name in (*stay[1:], *go):
        (store.folder / name).touch()
    FactStore.open(store.folder, write=False).close()
    assert set(os.listdir(store.folder)) == {"facts.db", *stay, *go}
    FactStore.open(store.folder, BASE).close()
    assert set(os.listdir(store.folder)) == {"facts.db", *stay}
