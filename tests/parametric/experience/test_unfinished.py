"""What an interrupted night leaves: ciphertext, for this night alone, gone with any source."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from nights import STUDY, Folder

from hybrid_sleep.parametric.experience import sealed as files
from hybrid_sleep.parametric.experience.keys import Keys
from hybrid_sleep.parametric.experience.sealed import Sealed
from hybrid_sleep.parametric.facts import Relation

SECRET = b"wintergreen" * 20


@pytest.fixture
def folder(tmp_path):
    with Folder(tmp_path / "memory") as opened:
        yield opened


@pytest.fixture
def sealed(tmp_path):
    (tmp_path / "night").mkdir()
    keys = Keys(tmp_path)
    return Sealed(tmp_path / "night", keys, keys.joint([keys.make(), keys.make()]))


def tensors():
    g = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(5, 7, generator=g),
        "half": torch.randn(6, generator=g).bfloat16()[::2],
        "turned": torch.randn(4, 2, generator=g, dtype=torch.float64).T,
        "step": torch.tensor(3.0),
        "none": torch.empty(0, 4),
        "counts": torch.arange(6),
    }


@pytest.mark.parametrize("part", [8, 16, 1 << 26])
def test_tensors_come_back_bit_for_bit(sealed, monkeypatch, part):
    monkeypatch.setattr(files, "PART", part)
    sealed.write_tensors("state", tensors(), {"step": 3}, "about")
    found, told = sealed.read_tensors("state", "about")
    assert told == {"step": 3} and found.keys() == tensors().keys()
    for name, value in tensors().items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def test_parts_come_back_and_are_nowhere_in_plain(sealed):
    for parts in ([], [b""], [SECRET], [SECRET, b"", b"x"]):
        sealed.write("dreams", parts, "about")
        assert b"".join(sealed.read("dreams", "about")) == b"".join(parts)
        assert b"wintergreen" not in (sealed.folder / "dreams").read_bytes()


def parts_of(raw):
    found = []
    while raw:
        size = 8 + int.from_bytes(raw[:8], "big")
        found.append(raw[:size])
        raw = raw[size:]
    return found


@pytest.mark.parametrize(
    "damage",
    [
        lambda parts: parts[:-1],
        lambda parts: parts[1:],
        lambda parts: [parts[1], parts[0], *parts[2:]],
        lambda parts: [*parts, parts[-1]],
        lambda parts: [],
        lambda parts: [b"".join(parts)[:-1]],
        lambda parts: [b"".join(parts) + b"\xff" * 8],
        lambda parts: [parts[0][:9] + bytes([parts[0][9] ^ 1]) + parts[0][10:], *parts[1:]],
    ],
)
def test_a_file_that_was_changed_is_refused(sealed, damage):
    sealed.write("dreams", [b"one", b"two", b"three"], "about")
    path = sealed.folder / "dreams"
    path.write_bytes(b"".join(damage(parts_of(path.read_bytes()))))
    with pytest.raises(ValueError, match="dreams is damaged"):
        list(sealed.read("dreams", "about"))


def test_a_file_about_something_else_and_one_that_is_missing_are_refused(sealed):
    sealed.write("dreams", [b"one"], "about")
    with pytest.raises(ValueError, match="dreams is damaged: it was changed, or is about"):
        list(sealed.read("dreams", "something else"))
    (sealed.folder / "dreams").rename(sealed.folder / "state")
    with pytest.raises(ValueError, match="state is damaged"):
        list(sealed.read("state", "about"))
    with pytest.raises(FileNotFoundError, match="other is missing"):
        list(sealed.read("other", "about"))


def test_a_joint_key_is_of_all_and_of_nothing_but_them(tmp_path):
    keys = Keys(tmp_path)
    one, two, three = keys.make(), keys.make(), keys.make()
    box = keys.seal(keys.joint([two, one, one]), b"said", "about")
    assert keys.unseal(keys.joint([one, two]), box, "about") == b"said"
    for others in ([one], [two], [one, three], [one, two, three]):
        with pytest.raises(ValueError, match="must be as it was encrypted"):
            keys.unseal(keys.joint(others), box, "about")
    # Alone it is not the key of the source.
    assert keys.joint([one]) != one
    keys.destroy_others([two])
    with pytest.raises(FileNotFoundError):
        Keys(tmp_path).joint([one, two])


def test_what_was_made_once_is_not_made_again(tmp_path):
    def made():
        return [["Lisbon", [1, 2]]]

    with Folder(tmp_path / "memory") as folder:
        night = folder.night()
        assert night.found is None and night.state() is None
        assert night.once("dreams", made) == made()
        night.save({"x": torch.ones(2)}, {"step": 1})
    with Folder(tmp_path / "memory") as folder:
        night = folder.night()
        assert night.found == "this night"
        assert night.once("dreams", lambda: pytest.fail("again")) == made()
        assert torch.equal(night.state()[0]["x"], torch.ones(2)) and night.state()[1] == {"step": 1}
        for name in ("dreams", "state"):
            path = folder.path / "night" / name
            path.write_bytes(path.read_bytes()[:-1])
        # What is damaged is made again.
        assert night.state() is None and night.once("dreams", lambda: ["anew"]) == ["anew"]
        assert b"Lisbon" not in b"".join(x.read_bytes() for x in (folder.path / "night").iterdir())


@pytest.mark.parametrize(
    "other",
    [
        {"weights": "v"},
        {"seed": 1},
        {"options": replace(STUDY, rate=0.02)},
        {"options": replace(STUDY, seconds=5.0)},
        {"questions": [("Where?", "There.")]},
        {"corpus": [[1, 2, 3]]},
        {"ids": [1]},
        {"ids": [2]},
        {"words": [Relation.plain("lives in")]},
        {"prompts": {1: ["Where?"]}},
        {"semantic": max},
    ],
)
def test_leftovers_of_another_night_are_erased(folder, other):
    folder.night().once("dreams", lambda: "old")
    night = folder.night(**other)
    assert night.found == "another night"
    assert [x.name for x in (folder.path / "night").iterdir()] == ["about"]
    assert night.once("dreams", lambda: "new") == "new"
    # And the one before is another one by now.
    assert folder.night().found == "another night"


def test_what_a_killed_writer_left_is_erased_and_no_night(folder):
    folder.night().once("dreams", lambda: "old")
    (folder.path / "night" / ".state.x.partial").write_bytes(b"half")
    assert folder.night().found == "this night"
    assert sorted(os.listdir(folder.path / "night")) == ["about", "dreams"]
    for path in (folder.path / "night").iterdir():
        path.unlink()
    assert folder.night().found is None


@pytest.mark.parametrize("source", ["ada", "bo"])
def test_who_is_erased_takes_the_night_along(folder, source):
    old = folder.buffer._vault.keys.joint([x.key for x in folder.buffer._vault.sources.values()])
    keys = folder.buffer._vault.keys._read[old]
    folder.night().once("dreams", lambda: "old")
    assert folder.buffer.erase(source) == 1
    assert not (folder.path / "night").exists()
    folder.buffer.add(one_more(source), [1.0])
    again = folder.buffer._vault.keys.joint([x.key for x in folder.buffer._vault.sources.values()])
    assert folder.buffer._vault.keys._read[again] != keys


def one_more(source):
    from experiences import text

    return text("Quito is high up.", source)


def test_a_night_is_doomed_with_the_transaction_or_not_at_all(folder):
    folder.night().once("dreams", lambda: "old")
    with pytest.raises(RuntimeError), folder.store.transaction("commit"):
        folder.buffer.doom("night")
        raise RuntimeError("rolled back")
    folder.buffer.clean()
    assert (folder.path / "night" / "dreams").exists()
    with folder.store.transaction("commit"):
        folder.buffer.doom("night")
    # Killed here, it is erased by the next opening.
    path = folder.path
    folder.store.close()
    with Folder(path) as again:
        assert not (path / "night").exists()
        assert len(again.buffer.ids()) == 2
        assert again.night().found is None
