"""After an erasure nothing of it is left in any byte of any file, nor a key that would open it."""

from __future__ import annotations

import json
import os
import struct

import pytest
from experiences import correction, encode, opened, text

from hybrid_sleep.parametric import durable
from hybrid_sleep.parametric.experience.buffer import Buffer
from hybrid_sleep.parametric.store import FactStore

# No secret by its looks, so that it is kept, and spelled with letters that JSON escapes.
SECRET = "Zélie hid the amber däggers under the Quillon bridge"
ID = "Nebukadnezar the Ünnamed"


def forms(words):
    """The bytes of words in every form that they may be written in."""
    ids = list(words.encode())
    yield from (words.encode(code) for code in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le"))
    yield json.dumps(words)[1:-1].encode()
    yield from (json.dumps(ids, separators=s)[1:-1].encode() for s in ((", ", ":"), (",", ":")))
    yield from (struct.pack(f"<{len(ids)}{size}", *ids) for size in "hiq")


def found(folder, needles, only="*"):
    """Which needles are in which files."""
    where = {path: path.read_bytes() for path in folder.rglob(only) if path.is_file()}
    assert where
    return [(path.name, x[:24]) for path, data in where.items() for x in needles if x in data]


def ciphertexts(buffer, ids=None):
    """All blobs of rows, cut into pieces: a page may hold a part of one."""
    db = buffer._vault.db
    rows = db.execute("SELECT id, body, signature FROM experiences").fetchall()
    blobs = [b for n, *both in rows if ids is None or n in ids for b in both]
    if ids is None:
        blobs += [x[0] for x in db.execute("SELECT name FROM sources")]
    return [b[i : i + 16] for b in blobs for i in range(0, len(b) - 15, 16)]


def keys(folder):
    return [p.read_bytes() for p in (folder / "keys").iterdir() if p.stem != "audit"]


def fill(buffer, source=ID, count=12, size=500):
    for n in range(count):
        more = f" {source} {n} " + chr(97 + n) * size
        buffer.add(text(SECRET + more, source, provenance={"from": SECRET}), [1.0])
    buffer.add(correction(SECRET + "?", SECRET + "!", SECRET, source), [1.0])


def test_plaintext_never_reaches_the_disk(tmp_path, monkeypatch):
    needles = [*forms(SECRET), *forms(ID)]
    points = []

    def look(point):
        points.append(point)
        assert found(tmp_path, needles) == []

    monkeypatch.setattr(durable, "reached", look)
    store, buffer = opened(tmp_path)
    with store:
        fill(buffer)
        buffer.erase(ids=[1, 2])
        buffer.erase(ID)
    assert found(tmp_path, needles) == []
    assert {"before experience", "after experience", "before erase", "after vacuum"} <= set(points)


def test_a_source_is_erased_to_the_last_byte_and_its_key_too(tmp_path):
    store, buffer = opened(tmp_path)
    with store:
        fill(buffer)
        gone = [*ciphertexts(buffer), *keys(tmp_path)]
        assert found(tmp_path, gone)
        buffer.add(text("Bo lives in Faro.", "bo"), [1.0])
        assert buffer.erase(ID) == 13
        assert found(tmp_path, gone) == []
        assert [x.experience.text for x in buffer.experiences()] == ["Bo lives in Faro."]
        summary = buffer.summary()
        assert summary["states"] == {"waiting": 1, "slept": 0, "erased": 13}
        assert [*summary["sources"]] == ["bo"] and summary["offered"] == 14
    assert found(tmp_path, gone) == []
    assert {x.name for x in tmp_path.iterdir()} == {"facts.db", "keys"}


def test_what_stays_of_a_source_gets_another_key(tmp_path):
    store, buffer = opened(tmp_path)
    with store:
        fill(buffer)
        before = {x.id: x for x in buffer.experiences()}
        gone = [*ciphertexts(buffer, {2, 3}), *keys(tmp_path)]
        assert buffer.erase(ids=[2, 3]) == 2
        assert found(tmp_path, gone) == []
        left = buffer.experiences()
        assert [x.id for x in left] == sorted(before.keys() - {2, 3})
        assert all(x.experience == before[x.id].experience for x in left)
        with pytest.raises(ValueError, match="id must be"):
            buffer.erase(ids=[2])
        with pytest.raises(ValueError, match="source must be"):
            buffer.erase("nobody")
        with pytest.raises(ValueError, match="either"):
            buffer.erase()
    with FactStore.open(tmp_path) as store:
        assert [x.experience for x in Buffer(store, encode).experiences()] == [
            x.experience for x in left
        ]


class Stop(Exception):
    pass


def stop_at(monkeypatch, wanted):
    def reached(point):
        if point == wanted:
            raise Stop

    monkeypatch.setattr(durable, "reached", reached)


def test_deleted_rows_are_zeros_before_pages_are_rewritten(tmp_path, monkeypatch):
    store, buffer = opened(tmp_path)
    with store:
        # Each fills pages of its own, so that none was moved.
        fill(buffer, count=3, size=9000)
        gone = ciphertexts(buffer, {1, 2, 3})
        stop_at(monkeypatch, "after erase")
        with pytest.raises(Stop):
            buffer.erase(ID)
        assert found(tmp_path, gone, "facts.db") == []
        # They still are in the journal, which the next opening overwrites.
        assert found(tmp_path, gone, "facts.db-journal")
    monkeypatch.undo()
    os.link(tmp_path / "facts.db-journal", tmp_path / "link")
    with FactStore.open(tmp_path) as store:
        assert Buffer(store, encode).ids() == []
    assert found(tmp_path, gone) == [] and not (tmp_path / "facts.db-journal").exists()
    assert set((tmp_path / "link").read_bytes()) == {0}
    assert not keys(tmp_path)


def test_copies_in_the_gaps_of_pages_go_too(tmp_path):
    store, buffer = opened(tmp_path)
    with store:
        fill(buffer, count=25, size=30)
        for n in range(25):
            buffer.add(text(f"{n} " + "b" * n * 9, "bo"), [1.0])
        gone = ciphertexts(buffer, set(range(1, 27)))
        buffer.erase(ID)
        assert found(tmp_path, gone) == []
        pages = buffer._vault.db.execute("PRAGMA freelist_count").fetchone()[0]
        assert pages == 0


def test_derived_files_and_keys_are_overwritten_and_removed(tmp_path):
    outside = tmp_path.with_name("outside")
    outside.write_bytes(b"mine")
    store, buffer = opened(tmp_path)
    with store:
        fill(buffer, count=2)
        fill(buffer, "bo", count=2)
        dreams, cache = tmp_path / "dreams.bin", tmp_path / "cache"
        assert buffer.derived("dreams.bin", "bo") == dreams
        assert buffer.derived(cache, ID) == cache
        (cache / "deep").mkdir(parents=True)
        (cache / "link").symlink_to(outside)
        files = [cache / "a.bin", cache / "deep" / "b.bin", dreams]
        for path in files:
            path.write_bytes(SECRET.encode() * 9)
        files += (tmp_path / "keys").glob("*.key")
        links = {path: tmp_path.with_name(f"link-{path.name}") for path in files}
        for path, link in links.items():
            os.link(path, link)
        buffer.erase(ID)
        assert not cache.exists() and outside.read_bytes() == b"mine"
        assert dreams.exists()
        zeros = {p for p, link in links.items() if set(link.read_bytes()) == {0}}
        assert {p.name for p in zeros} >= {"a.bin", "b.bin"} and len(zeros) == 3
        # Of a part of a source as well.
        buffer.erase(ids=buffer.ids()[:1])
        assert not dreams.exists() and set(links[dreams].read_bytes()) == {0}
        assert found(tmp_path, [*forms(SECRET)]) == []
        for wrong in ("..", "../outside", "facts.db", "keys", "keys/audit.key", ".", outside):
            with pytest.raises(ValueError, match="path"):
                buffer.derived(wrong, "bo")
        with pytest.raises(ValueError, match="source"):
            buffer.derived("x", "nobody")


def test_who_has_a_text_and_the_key_can_tell_what_became_of_it(tmp_path):
    store, buffer = opened(tmp_path)
    with store:
        fill(buffer, count=1)
        buffer.add(text("Bo's card is 4111 1111 1111 1111.", "bo"), [1.0])
        assert buffer.proof(SECRET + "!") == {"held": [2], "erased": []}
        buffer.erase(ID)
        for words in (SECRET, SECRET + "!", SECRET + "?"):
            said = buffer.proof(words)
            assert said["held"] == [] and len(said["erased"]) == 1
        assert buffer.proof(SECRET + ".") == {"held": [], "erased": []}
        # As it was given, though kept without the number.
        assert buffer.proof("Bo's card is 4111 1111 1111 1111.")["held"] == [3]
        rows = buffer._vault.db.execute("SELECT * FROM erased").fetchall()
        digests = [x for row in rows for x in row[2:]]
        assert len(set(digests)) == len(digests) == 8 and {len(x) for x in digests} == {32}
    (tmp_path / "keys" / "audit.key").write_bytes(bytes(32))
    with FactStore.open(tmp_path, write=False) as store:
        assert Buffer(store, encode).proof(SECRET)["erased"] == []


def test_without_proof_nothing_but_time_and_count_stays_of_a_source(tmp_path):
    store, buffer = opened(tmp_path)
    with store:
        fill(buffer, count=2)
        fill(buffer, "bo", count=1)
        buffer.erase(ids=[1])
        buffer.erase("bo")
        buffer.erase(ID, proof=False)
        assert buffer.proof(SECRET)["erased"] and buffer.summary()["states"]["erased"] == 5
        held = buffer._vault.db.execute("SELECT erasure_id FROM erased").fetchall()
        assert {row[0] for row in held} == {2}
        assert buffer.summary()["erasures"] == 3
