"""Ordinary text that every machine has, for key statistics and for perplexity, one from the other.

It is the language reference in `pydoc_data.topics` of the standard library, without code: technical
English. Natural prose differs from it, and so do the numbers that would be measured there.
"""

from __future__ import annotations

import hashlib
import platform
import textwrap
from typing import Any

from hybrid_sleep.parametric.measure import encode
from hybrid_sleep.validation import check_choice, check_count

PARTS = ("statistics", "perplexity")
# About so many of ten topics are for perplexity, chosen by a hash, whatever topics a Python has.
HELD_OUT = 2


def source() -> str:
    """What was read, by name and version."""
    return f"pydoc_data.topics of Python {platform.python_version()}"


def ordinary_rows(tokenizer: Any, part: str, tokens: int, length: int = 128) -> list[list[int]]:
    """Token ids of `tokens` tokens of text in rows of `length`, the last one shorter if need be.

    part: "statistics" (about 34,000 tokens of a subword vocabulary) or "perplexity" (about 9,000);
    no paragraph is in both. ValueError where there are fewer tokens than that.
    """
    check_count("tokens", tokens, minimum=2)
    check_count("length", length, minimum=2)
    ids: list[int] = []
    for text in ordinary_texts(part):
        if len(ids) >= tokens:
            break
        ids += encode(tokenizer, text + "\n\n")
    if len(ids) < tokens:
        raise ValueError(f"tokens must be at most {len(ids)} of {source()}, got {tokens}")
    rows = [ids[i : i + length] for i in range(0, tokens, length)]
    rows[-1] = rows[-1][: tokens - length * (len(rows) - 1)]
    # A single token predicts nothing.
    return [row for row in rows if len(row) > 1]


def ordinary_texts(part: str) -> list[str]:
    """The prose of the topics of one part, a text each, of paragraphs with an empty line between.

    Topics quote each other, so a paragraph is left out where it is met again.
    """
    check_choice("part", part, PARTS)
    from pydoc_data.topics import topics

    held_out = {name for name in topics if _digit(name) < HELD_OUT}
    seen: set[str] = set()
    texts: dict[str, list[str]] = {p: [] for p in PARTS}
    # Perplexity first: what both could have is then its own.
    for name in sorted(topics, key=lambda name: (name not in held_out, name)):
        kept = []
        for paragraph in _prose(topics[name]):
            if paragraph not in seen:
                seen.add(paragraph)
                kept.append(paragraph)
        if kept:
            texts[PARTS[name in held_out]].append("\n\n".join(kept))
    return texts[part]


def _prose(topic: str) -> list[str]:
    """Paragraphs of sentences, each in one line, without marks of code and emphasis."""
    found = []
    for paragraph in textwrap.dedent(topic).split("\n\n"):
        lines = paragraph.strip().splitlines()
        text = " ".join(line.strip() for line in lines)
        plain = text.replace("``", "").replace('"', "").replace("*", "")
        if len(plain) > 120 and plain[0].isupper() and plain[-1] in ".:" and "::" not in plain:
            found.append(plain)
    return found


def _digit(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10
