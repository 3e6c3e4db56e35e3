"""A process killed at any write leaves an experience whole or absent, an erasure done or not begun.

And what an erasure had begun is through after the next opening: no key, no file, no byte of it.
"""

from __future__ import annotations

import os
import signal

import pytest
from experiences import contents, correction, opened, text

from hybrid_sleep.parametric import durable

LARGE = "the harbour at night "


def derive(buffer):
    path = buffer.derived("cache.bin", "ada")
    path.write_bytes(b"derived of ada")


STEPS = (
    lambda b: b.add(text(LARGE * 300, "ada"), [1.0]),
    lambda b: b.add(text("Ada lives in Faro.", "ada"), [2.0]),
    lambda b: b.add(text("Ada lives  in Faro.", "ada"), [2.0]),
    lambda b: b.add(correction("Where is Bo?", "Faro.", "Braga.", "bo"), [3.0]),
    derive,
    lambda b: b.slept([2]),
    lambda b: b.erase(ids=[2]),
    lambda b: b.add(text("Bo likes to swim.", "bo"), [3.0]),
    lambda b: b.erase("ada"),
)


def run(folder, after=lambda step, buffer: None, first=0):
    store, buffer = opened(folder)
    with store:
        after(first - 1, buffer)
        for number, step in enumerate(STEPS[first:], first):
            step(buffer)
            after(number, buffer)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What lasts after each step, and every write on the way."""
    seen, writes = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "reached", writes.append)
        run(tmp_path_factory.mktemp("whole"), lambda step, b: seen.append(contents(b)))
    return seen, writes


def in_a_process_that_is_killed(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def test_every_kind_of_write_is_passed(whole):
    _, writes = whole
    both = ("schema", "experience", "slept", "erase", "derived", "clean", "key", "shred")
    wanted = {f"{when} {what}" for when in ("before", "after") for what in both}
    assert set(writes) == wanted | {"within shred", "after vacuum"}


@pytest.mark.slow
def test_a_kill_at_any_write_leaves_what_was_or_what_was_to_be(whole, tmp_path):
    seen, writes = whole
    for last in range(len(writes)):
        folder, progress = tmp_path / f"{last}", tmp_path / f"{last}.steps"
        progress.touch()
        passed = []

        def reached(point, last=last, passed=passed):
            passed.append(point)
            if len(passed) > last:
                os.kill(os.getpid(), signal.SIGKILL)

        def work(folder=folder, reached=reached, progress=progress):
            durable.reached = reached
            run(folder, lambda step, b: progress.write_text(f"{step}"))

        in_a_process_that_is_killed(work)
        done = int(progress.read_text() or -2)
        store, buffer = opened(folder)
        with store:
            now = contents(buffer)
            # Where even the opening was not finished, it was empty and still is.
            allowed = [seen[0]] if done == -2 else seen[done + 1 : done + 3]
            assert now in allowed, writes[last]
            names = {source.key for source in buffer._vault.sources.values()}
            kept = {path.stem for path in folder.glob("keys/*")}
            assert kept - {"audit"} == names, writes[last]
            erased = now[1]["states"]["erased"]
            assert not (erased and (folder / "cache.bin").exists()), writes[last]
        run(folder, first=max(done + 1, 0) if now == allowed[0] else done + 2)
        store, buffer = opened(folder)
        with store:
            assert contents(buffer) == seen[-1], writes[last]
            assert not (folder / "cache.bin").exists()
