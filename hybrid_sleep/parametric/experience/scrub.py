"""Secrets in a text, replaced before anything of it is written.

Tokens, keys and passwords are found by the patterns of detect-secrets, which asks no service about
them; e-mail addresses, phone and card numbers by patterns of our own. What is written out in words,
or looks like any other word, is not found.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from hybrid_sleep.parametric.experience.packages import needed

Span = tuple[int, int]

EMAIL, PHONE, CARD, PEM = "E-Mail Address", "Phone Number", "Card Number", "Private Key"

_EMAIL = re.compile(r"[\w.!#$%&'*+/=?^`{|}~-]{1,64}@[\w-]+(?:\.[\w-]+)+")
# The international form, that of North America, and the national one of most other countries.
_PHONE = re.compile(
    r"(?<![\w.])(?<!\d )(?:"
    r"(?:\+|00)[1-9]\d{0,2}[ .\-/]?(?:\(0?\d{1,4}\)[ .\-/]?)?\d(?:[ .\-/]?\d){5,12}"
    r"|\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}"
    r"|\(?0[1-9]\d{0,3}\)?[ /-]\d{2,8}(?:[ -]?\d{2,6}){0,4}"
    r")(?![\w])"
)
_DIGITS = re.compile(r"(?<!\d)\d+(?:[ \u00a0-]\d+)*(?!\d)")
_PEM = re.compile(
    r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----.*?(?:-----END [A-Z0-9 ]*-----|\Z)", re.DOTALL
)
# Shorter ones are words and numbers more often than keys.
_BASE64, _HEX = re.compile(r"[A-Za-z0-9+/_=-]{20,}"), re.compile(r"[0-9a-fA-F]{16,}")


def scrub(text: str) -> tuple[str, Counter[str]]:
    """`text` with a marker naming its kind for every secret, and how many there were of each.

    A marker is "[Card Number removed]". Scrubbed text stays as it is.
    """
    standing = [match.span() for match in _markers().finditer(text)]
    found = []
    for kind, find in _finders():
        for start, end in find(text):
            if not any(start < b and a < end for a, b in standing):
                found.append((start, end, kind))
    pieces: list[str] = []
    counts, done = Counter[str](), 0
    for start, end, kind in _apart(found):
        pieces += [text[done:start], f"[{kind} removed]"]
        counts[kind] += 1
        done = end
    return "".join([*pieces, text[done:]]), counts


def scrub_data(value: Any) -> tuple[Any, Counter[str]]:
    """The same for all text and numbers in plain data, names included."""
    counts: Counter[str] = Counter()

    def clean(inner: Any) -> Any:
        if isinstance(inner, dict):
            return {clean(key): clean(x) for key, x in inner.items()}
        if isinstance(inner, list | tuple):
            return [clean(x) for x in inner]
        if isinstance(inner, bool) or not isinstance(inner, str | int | float):
            return inner
        text, found = scrub(str(inner))
        counts.update(found)
        return text if found else inner

    return clean(value), counts


def luhn(digits: str) -> bool:
    """Whether `digits` end with their check digit (ISO/IEC 7812-1, annex B)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def _apart(found: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Overlapping spans as one, of the kind of the longest."""
    groups: list[list[tuple[int, int, str]]] = []
    reach = 0
    for span in sorted(found):
        if not groups or span[0] >= reach:
            groups.append([])
        groups[-1].append(span)
        reach = max(reach, span[1])
    return [
        (
            group[0][0],
            max(end for _, end, _ in group),
            max(group, key=lambda span: span[1] - span[0])[2],
        )
        for group in groups
    ]


def _cards(text: str) -> Iterator[Span]:
    """Numbers of cards: 13 to 19 digits, in groups or not, of an industry that issues them."""
    for run in _DIGITS.finditer(text):
        groups = [match.span() for match in re.finditer(r"\d+", run.group())]
        taken = 0
        for first, (start, _) in enumerate(groups):
            # No card has more groups than digits.
            for _, end in groups[first : first + 19] if start >= taken else ():
                digits = re.sub(r"\D", "", run.group()[start:end])
                if 13 <= len(digits) <= 19 and digits[0] in "23456" and luhn(digits):
                    yield run.start() + start, run.start() + end
                    taken = end
                    break


def _matches(pattern: re.Pattern[str], group: int = 0) -> Callable[[str], Iterator[Span]]:
    return lambda text: (match.span(group) for match in pattern.finditer(text))


def _first_words(pattern: re.Pattern[str], group: int) -> Callable[[str], Iterator[Span]]:
    """Values up to the first space: in prose the rest of the line is no part of them."""

    def find(text: str) -> Iterator[Span]:
        match = pattern.search(text)
        while match:
            start, end = match.span(group)
            word = re.compile(r"\S*").match(text, start, end)
            end = word.end() if word else end
            yield start, end
            match = pattern.search(text, max(end, match.start() + 1))

    return find


def _random(pattern: re.Pattern[str], plugin: Any) -> Callable[[str], Iterator[Span]]:
    """Strings of more entropy than detect-secrets allows a string, in quotes or not."""
    return lambda text: (
        match.span()
        for match in pattern.finditer(text)
        if plugin.calculate_shannon_entropy(match.group()) > plugin.entropy_limit
    )


@functools.cache
def _finders() -> tuple[tuple[str, Callable[[str], Iterator[Span]]], ...]:
    """Every kind of secret, and where it is in a text."""
    with needed("detect-secrets"):
        from detect_secrets import plugins
        from detect_secrets.plugins import high_entropy_strings, keyword
        from detect_secrets.plugins.base import RegexBasedDetector

    found: list[tuple[str, Callable[[str], Iterator[Span]]]] = [
        (PEM, _matches(_PEM)),
        (EMAIL, _matches(_EMAIL)),
        (CARD, _cards),
        (PHONE, _matches(_PHONE)),
    ]
    for module in pkgutil.iter_modules(plugins.__path__):
        inside = vars(importlib.import_module(f"{plugins.__name__}.{module.name}"))
        for value in inside.values():
            if isinstance(value, type) and issubclass(value, RegexBasedDetector):
                detector: Any = value
                patterns = detector.denylist
                # The whole match: what its groups hold is of some tokens the prefix alone.
                for pattern in patterns if isinstance(patterns, list | tuple) else ():
                    found.append((detector.secret_type, _matches(pattern)))
    kind = keyword.KeywordDetector.secret_type
    for pattern, group in keyword.QUOTES_REQUIRED_DENYLIST_REGEX_TO_GROUP.items():
        found.append((kind, _matches(pattern, group)))
    for pattern, group in keyword.CONFIG_DENYLIST_REGEX_TO_GROUP.items():
        found.append((kind, _first_words(pattern, group)))
    for pattern, plugin in (
        (_BASE64, high_entropy_strings.Base64HighEntropyString()),
        (_HEX, high_entropy_strings.HexHighEntropyString()),
    ):
        found.append((plugin.secret_type, _random(pattern, plugin)))
    return tuple(found)


@functools.cache
def _markers() -> re.Pattern[str]:
    kinds = sorted({re.escape(kind) for kind, _ in _finders()})
    return re.compile(rf"\[(?:{'|'.join(kinds)}) removed\]")
