"""What of a text can be checked by exact words: names, numbers, quotes, negation, known facts.

It is for texts in English. In doubt a dream is rejected: another one costs a few tokens, a wrong
one is learned.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal

from hybrid_sleep.parametric.facts import SLOT, Fact, Relation

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_NUMBER = re.compile(r"(?<![\w.])[-\u2212]?\d+(?:,\d{3})*(?:\.\d+)?|\d+(?:,\d{3})*(?:\.\d+)?")
_QUOTED = re.compile(r"\"([^\"\n]+)\"|\u201c([^\u201c\u201d\n]+)\u201d")
_NEGATION = re.compile(
    r"\b(?:not|never|no|nor|neither|nobody|none|nothing|nowhere|cannot|without|false|untrue)\b"
    r"|n['\u2019]t\b",
    re.IGNORECASE,
)
_SENTENCES = re.compile(r"(?<=[.!?])\s+|\n+")
_BREAKS = frozenset(".!?:;\n(\"\u201c\u2022")

_SMALL = (
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
# "one" is left out, which is a pronoun more often.
NUMBER_WORDS = {word: i for i, word in enumerate(_SMALL, 2)}
NUMBER_WORDS |= {word: 10 * i for i, word in enumerate(_TENS, 2)}
NUMBER_WORDS |= {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_UNITS = {"one": 1, **{word: i for i, word in enumerate(_SMALL[:8], 2)}}
_COMPOUND = re.compile(rf"\b({'|'.join(_TENS)})-({'|'.join(_UNITS)})\b", re.IGNORECASE)

# Words that begin a sentence with a capital and are no names.
FUNCTION_WORDS = frozenset(
    """
    a about after all also although among an and another any are as at based because before being
    both but by ca can consequently could did do does during each either even every finally for from
    had has have he hence her here his how however i if in indeed instead into is it its just like
    many may might more moreover most much must my near no nobody none nor not nothing now of often
    on once one only or other our over people perhaps she should since so some someone something
    sometimes soon still such than that the their them then there therefore these they this those
    though through thus to today together under unlike until upon us was we were what when where
    whether which while who whom whose why will with within without wo would yes yet you your
    question answer true
    """.split()
)


def _plain(word: str) -> str:
    """`word` in lower case, without a possessive's ending."""
    return re.sub(r"['\u2019]s?$", "", word.casefold().replace("\u2019", "'"))


def _joined(text: str) -> str:
    """The words of `text`, to find runs of words in."""
    return f" {' '.join(_plain(match[0]) for match in _WORD.finditer(text))} "


def names(text: str, known: str = "") -> list[tuple[str, int]]:
    """The names in `text`, runs of words with capitals, and where each begins.

    The first word of a sentence is none if it is a function word or `known` has it in lower case.
    A run ends at punctuation and behind a possessive.
    """
    lower = {match[0] for match in _WORD.finditer(known) if match[0].islower()}
    found: list[tuple[str, int]] = []
    end, goes_on = 0, False
    for match in _WORD.finditer(text):
        word, gap = match[0], text[end : match.start()]
        plain = _plain(word)
        base = re.sub(r"(?:n't|'\w+)$", "", plain)
        begins = (end == 0 and not gap.strip()) or not _BREAKS.isdisjoint(gap)
        ordinary = begins and (base in FUNCTION_WORDS or plain in lower)
        end = match.end()
        if not any(map(str.isupper, word)) or base == "i" or ordinary:
            goes_on = False
            continue
        if goes_on and gap in ("-", " "):
            found[-1] = (f"{found[-1][0]} {plain}", found[-1][1])
        else:
            found.append((plain, match.start()))
        goes_on = not word.endswith(("'s", "\u2019s"))
    return found


def numbers(text: str) -> list[tuple[Decimal, int]]:
    """The numbers in `text`, in digits or as words of up to a billion, and where each begins."""
    found = []
    for match in _NUMBER.finditer(text):
        digits = match[0].replace(",", "").replace("\u2212", "-")
        found.append((Decimal(digits), match.start()))
    spans = []
    for match in _COMPOUND.finditer(text):
        tens, unit = match[1].casefold(), match[2].casefold()
        found.append((Decimal(NUMBER_WORDS[tens] + _UNITS[unit]), match.start()))
        spans.append(match.span())
    for match in _WORD.finditer(text):
        inside = any(first <= match.start() < last for first, last in spans)
        if match[0].casefold() in NUMBER_WORDS and not inside:
            found.append((Decimal(NUMBER_WORDS[match[0].casefold()]), match.start()))
    return sorted(found, key=lambda pair: pair[1])


def unsupported(text: str, allowed: str) -> list[str]:
    """Names, numbers and quoted spans of `text` that are not in `allowed`, whatever their case."""
    have, there = _joined(allowed), {number for number, _ in numbers(allowed)}
    missing = [name for name, _ in names(text, allowed) if f" {name} " not in have]
    missing += [str(number) for number, _ in numbers(text) if number not in there]
    for match in _QUOTED.finditer(text):
        if _joined(match[1] or match[2]) not in have:
            missing.append(match[0])
    return list(dict.fromkeys(missing))


def order_of_claims(text: str, source: str) -> list[int]:
    """Where the names and numbers of `text` come first in `source`, in the order of `text`.

    Those that both have, each once.
    """
    have = {number: at for number, at in reversed(numbers(source))}
    found = [(at, have[number]) for number, at in numbers(text) if number in have]
    for name, at in names(text, source):
        words = r"\W+".join(map(re.escape, name.split()))
        place = re.search(rf"(?<!\w){words}(?!\w)", source, re.IGNORECASE)
        if place is not None:
            found.append((at, place.start()))
    return list(dict.fromkeys(place for _, place in sorted(found)))


def negation_differs(text: str, source: str) -> str | None:
    """How `text` denies what `source` says, or says what it denies; None if neither is seen.

    Looked at are the sentences of the source with all names and numbers of `text`; where none has
    them all, the whole source.
    """
    claims = {f" {name} " for name, _ in names(text, source)}
    values = {number for number, _ in numbers(text)}
    about = [
        sentence
        for sentence in sentences(source)
        if all(claim in _joined(sentence) for claim in claims)
        and values <= {number for number, _ in numbers(sentence)}
    ]
    denied = [bool(_NEGATION.search(sentence)) for sentence in about or [source]]
    denies = bool(_NEGATION.search(text))
    if denies and not any(denied):
        return "it denies what its source does not"
    if not denies and about and (claims or values) and all(denied):
        return "it says what its source denies"
    return None


def sentences(text: str) -> list[str]:
    """`text` in sentences."""
    return [part for part in _SENTENCES.split(text) if part and part.strip()]


def contradicts(
    text: str, question: str | None, facts: Iterable[tuple[Fact, Relation]]
) -> Fact | None:
    """The first of `facts` of which `text` states subject and relation with another object.

    Statements are known by the texts of the relation and by subject and name of it with no other
    name between; what follows must come to the object before any other name or number. An answer
    to one of the relation's questions must have the object in the same way. The object must not
    complete the relation's negation.
    """
    for fact, relation in facts:
        asked = _same_words(question or "")
        forms = (*relation.questions, *relation.held_out_questions)
        if question is not None and asked in {
            _same_words(form.replace(SLOT, fact.subject)) for form in forms
        }:
            if not _comes_to(text, fact.object, begins=True):
                return fact
        for sentence in sentences(text):
            if relation.negation is not None:
                head = _filled(relation.negation, fact.subject)
                denied = re.search(rf"{head}(.*)", sentence, re.IGNORECASE)
                if denied and _comes_to(denied[1], fact.object):
                    return fact
            if any(not _comes_to(rest, fact.object) for rest in _rests(sentence, fact, relation)):
                return fact
    return None


def _rests(sentence: str, fact: Fact, relation: Relation) -> list[str]:
    """What follows subject and relation in `sentence`, wherever it states them."""
    heads = [
        _filled(text, fact.subject)
        for text in (*relation.statements, *relation.held_out)
        if not text.endswith(SLOT)
    ]
    found = [m[1] for head in heads for m in re.finditer(rf"{head}(.*)", sentence, re.IGNORECASE)]
    loose = rf"{_filled(SLOT, fact.subject)}(.*?){_filled(relation.name, '')}(.*)"
    for match in re.finditer(loose, sentence, re.IGNORECASE):
        if not names(f"- {match[1]}"):
            found.append(match[2])
    return found


def _filled(template: str, subject: str) -> str:
    """A pattern for the words of `template` about `subject`, whatever stands between words."""
    words = r"\s+".join(map(re.escape, template.replace(SLOT, subject).split()))
    return rf"(?<!\w){words}(?!\w)"


def _comes_to(rest: str, answer: str, begins: bool = False) -> bool:
    """Whether `rest` has `answer` in it, with no other name or number in front.

    begins: whether a sentence begins there, whose first word may have a capital for that alone.
    """
    found = re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", rest, re.IGNORECASE)
    if found is None:
        return False
    before = rest[: found.start()] if begins else f"- {rest[: found.start()]}"
    return not names(before) and not numbers(before)


def _same_words(text: str) -> str:
    return _joined(text).strip()
