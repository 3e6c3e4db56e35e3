"""Overlap and near-duplicates against every pair, compared one by one."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_sleep.parametric.dreams.novel import Seen, ngrams, overlap

WORDS = st.lists(st.sampled_from("abc"), max_size=9).map(" ".join)


def grams(text, n):
    words = text.lower().replace(".", "").split()
    n = max(1, min(n, len(words)))
    return {tuple(words[i : i + n]) for i in range(len(words)) if i + n <= len(words)}


def test_by_hand():
    assert ngrams("Ada lives. In IT", 2) == {("ada", "lives"), ("lives", "in"), ("in", "it")}
    assert ngrams("Ada lives", 4) == {("ada", "lives")}
    assert ngrams("...") == frozenset()
    source = "Ada Byron lives in Lisbon."
    assert overlap(source, source) == 1.0
    assert overlap("The home of Ada Byron is Lisbon.", source) == 0.0
    assert overlap("Ada Byron lives in Lisbon now.", source) == 2 / 3
    assert overlap("lives in", source) == 1.0 and overlap("?", source) == 0.0


@settings(max_examples=80, deadline=None)
@given(st.lists(WORDS, max_size=6), WORDS, st.integers(1, 5))
def test_against_every_pair(texts, text, n):
    seen = Seen(n)
    for i, other in enumerate(texts):
        seen.add(f"d{i}", other)
    own = grams(text, n)
    alike = [
        len(own & grams(other, n)) / len(own | grams(other, n)) if own and grams(other, n) else 0.0
        for other in texts
    ]
    best = max(alike, default=0.0)
    assert seen.nearest(text) == (best, f"d{alike.index(best)}" if best else "")
    if own:
        shorter = min(n, len(text.split()))
        assert overlap(text, texts[0] if texts else "", n) == len(
            own & (grams(texts[0], shorter) if texts and texts[0] else set())
        ) / len(own)
