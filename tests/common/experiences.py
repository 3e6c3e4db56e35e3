"""Experiences for tests, and a model's tokens that are bytes."""

from __future__ import annotations

from hybrid_sleep.parametric.experience.buffer import Buffer
from hybrid_sleep.parametric.experience.experience import Experience
from hybrid_sleep.parametric.store import FactStore

BASE = WEIGHTS = "0" * 64


def encode(experience):
    """Bytes as tokens, those of the text are targets."""
    prompt = experience.prompt.encode()
    return [*prompt, *experience.text.encode()], len(prompt)


def text(words, source="ada", **given):
    given = {"consent": True, "weights": WEIGHTS, **given}
    return Experience(source, words, given.pop("weights"), **given)


def correction(prompt, rejected, corrected, source="ada", **given):
    return text(corrected, source, kind="correction", prompt=prompt, rejected=rejected, **given)


def opened(folder, **given):
    """A buffer over a store in `folder`; its store is to be closed."""
    store = FactStore.open(folder, BASE)
    try:
        # As builds of SQLite have it that do not ask for more.
        store.database.execute("PRAGMA secure_delete = OFF")
        return store, Buffer(store, encode, **given)
    except BaseException:
        store.close()
        raise


def contents(buffer):
    """All that lasts and is no time."""
    kept = [
        (x.id, x.experience, x.ids, x.start, x.state, x.surprise, x.percentile, x.commit)
        for x in buffer.experiences()
    ]
    return kept, buffer.summary()
