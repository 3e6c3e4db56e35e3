"""The answer in a free-text reply: an integer, or a set of variables."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator

MOST_DIGITS = 1000  # of an answer; Python itself reads no more than 4300

# A sign belongs to a number unless something to subtract from stands before it.
_NUMBER = re.compile(
    r"(?<![A-Za-z\d.])(?P<sign>(?<![)\]}])-)?\$?"
    r"(?P<whole>\d{1,3}(?:(?:,|\{,\}|\\,)\d{3})+(?!\d)|\d+)"
    r"(?P<rest>\.\d+|\s*[/⁄]\s*\d+|[eE][+-]?\d+)?"
)
_BETWEEN = r"(?:\\(?:text|textbf|mathrm|mathbf|mathit)|[\s*_$\\(\[{`\"'>~≈])*"
_CUE = re.compile(
    rf"(?<![a-z])(?:answer|solution)(?![a-z]){_BETWEEN}"
    rf"(?P<link>(?:(?:\b(?:is|are|was|were|equals)\b|=|:){_BETWEEN})*)",
    re.IGNORECASE,
)
_STATED = re.compile(
    rf"(?:\b(?:is|equals)\b(?:\s+equal\s+to\b)?|=){_BETWEEN}(?P<number>{_NUMBER.pattern})",
    re.IGNORECASE,
)
_DENIED = re.compile(rf"\bnot\b{_BETWEEN}{_NUMBER.pattern}", re.IGNORECASE)
# Behind a number, what makes it the first of an expression.
_OPERATOR = re.compile(
    r"(?:\(|[ \t]*(?:[-+/×÷^]|\*(?!\*)|\*\*(?=\d)|\\(?:times|cdot|div)\b|[xX](?=[ \t]*\d)))"
    r"[ \t]*[$({]*(?=-?\$?\d)"
)
_EXPRESSION = re.compile(r"\$?-?\d[\d.,]*(?:\s*[-+/×÷^*xX]+\s*\$?\d[\d.,]*)+")
_HASHES = re.compile(r"(?<!#)####(?!#)([^\n]*)")
_UNIT = re.compile(r"[\s.%*_$)\]}\\]*(?:[a-z]+[\s.*_$]*)*")
_NEXT_QUESTION = re.compile(
    r"^[\s*_#>]*(?:question|problem|q|instruction|user|human)[\s*_]*:", re.IGNORECASE | re.MULTILINE
)
_WORDS = re.compile(r"[A-Za-z]{3}|[,;:]|\.\s")
_SENTENCE = re.compile(r"(?:[^.\n]|\.(?=\d))*")
_THIN_SPACE = re.compile("(?<=\\d)[\u00a0\u2009\u202f](?=\\d{3}(?!\\d))")

_NAME = r"V_?\{?\d+\}?(?!\w)"
_APART = (
    r"(?:\s*=\s*-?\d+(?!\w))?"
    r"(?:\\text|\\mathrm|[\s,;&*•`'\"$\\(){}\[\]<>+-]|\band\b|(?<=\s)\d+[.)](?=\s))*"
)
_NAMES = re.compile(rf"(?<![A-Za-z\d])(?:{_NAME}{_APART})+", re.IGNORECASE)
_NOTHING = re.compile(r"\b(?:none|nothing|no variables?|empty|emptyset)\b|∅|\{\s*\}", re.IGNORECASE)


def parse_answer(reply: str) -> int | None:
    r"""The integer that a reply gives as its answer, or None.

    The first rule that finds anything decides, and of several finds the last one counts, of the
    first rule the first:
    1. `#### 12`, a line of its own (a unit may follow), as GSM8K's solutions end and its grader
       reads them;
    2. `\boxed{12}` (or `oxed{12}`, as an escaped `\b` leaves it): the one number after its last
       `=`, or None if there are several or none;
    3. `answer` or `solution` and a number right after it, or after the `=` of an equation there;
       with `:`, `=`, `is` or the like in between also further on in the sentence, the first one
       or the last after `=`, `is` or `equals`. None if only words follow to the reply's end;
    4. `is`, `equals` or `=`, then a number;
    5. any number.
    Behind an answer by one of the first three, a line that begins with `Question:`, `User:` or the
    like ends the reply: what a model asks itself next is no answer to what it was asked.

    Case, units, emphasis, quotes and brackets are ignored, and so is a number after `not`. `1,000`
    and `1{,}000` are 1000, `12.` and `12.0` are 12; what is no integer, such as `12.5` or `1/2`, is
    None, and so are a number in words and an expression: graders compare numbers and work none out,
    and GSM8K's would take `10-3` for 10.
    """
    text = _own_part(_DENIED.sub(",", _plain(reply)), _is_answered)
    hashed = _hashed(text)
    if hashed is not None:
        return _integer(hashed)
    box = _last_box(text)
    if box is not None:
        numbers = list(_NUMBER.finditer(box.rpartition("=")[2]))
        return _integer(numbers[0]) if len(numbers) == 1 else None
    for cue, after in _cues(text):
        found = _direct(after)
        if found is None and cue["link"]:
            sentence = _SENTENCE.match(after)[0]
            found = _last_stated(sentence) or _NUMBER.search(sentence)
            if found is None and re.search("[A-Za-z]", after) and not _NUMBER.search(after):
                return None
        if found is not None:
            return _integer(found)
    if _EXPRESSION.fullmatch(text.strip("*_$ \n")):
        return None
    found = _last_stated(text) or next(reversed(list(_NUMBER.finditer(text))), None)
    return None if found is None else _integer(found)


def parse_set(reply: str) -> frozenset[str] | None:
    r"""The variables `V12` that a reply gives as its answer, or None if it gives no answer.

    Names next to each other, with commas, spaces, line breaks, `and`, bullets, brackets or `= 4`
    between them, are one list. The first rule that finds anything decides:
    1. the names in the last `\boxed{...}`;
    2. the first list after the last `answer` or `solution` (with `:`, `is`, `are` or the like)
       after which there is one in the sentence or at the next line's start;
    3. the last list.
    `none`, `no variable`, `empty` or `{}` in its place is the empty set. Order, repetition and
    case make no difference; `V_{12}` is `V12`, but `V012` is another name. What follows a next
    `Question:` does not count, as for `parse_answer`.
    """
    text = _own_part(
        _plain(reply), lambda own: _last_box(own) is not None or _cued_names(own) is not None
    )
    box = _last_box(text)
    if box is not None:
        names = _names(box)
        return names if names or _NOTHING.search(box) or not box.strip() else None
    cued = _cued_names(text)
    if cued is not None:
        return cued
    listed = list(_NAMES.finditer(text))
    if listed:
        return _names(listed[-1][0])
    return frozenset() if _NOTHING.search(text) else None


def _own_part(text: str, answered: Callable[[str], bool]) -> str:
    """`text` up to the first next question that has an answer before it."""
    for asked in _NEXT_QUESTION.finditer(text):
        if answered(text[: asked.start()]):
            return text[: asked.start()]
    return text


def _is_answered(text: str) -> bool:
    """Whether a rule that goes by marks finds an answer, not one that takes any number."""
    marked = _hashed(text) is not None or _last_box(text) is not None
    return marked or any(_direct(after) is not None for _, after in _cues(text))


def _hashed(text: str) -> re.Match[str] | None:
    """The number of the first line `#### 12`; one with a title behind it is a heading."""
    for line in _HASHES.finditer(text):
        found = _direct(line[1])
        if found is not None:
            rest = found.string[found.end() :]
            if _UNIT.fullmatch(rest) or _OPERATOR.match(rest):
                return found
    return None


def _cued_names(text: str) -> frozenset[str] | None:
    for cue, rest in _cues(text):
        if cue["link"]:
            after = cue["link"] + rest
            sentence = _SENTENCE.match(after.lstrip(": \n*"))[0]
            listed = _NAMES.search(after)
            if listed and (listed[0].split()[0] in sentence or sentence.rstrip().endswith(":")):
                return _names(listed[0])
            if _NOTHING.search(after):
                return frozenset()
    return None


def _plain(reply: str) -> str:
    """`reply` in plain characters: one minus sign, one kind of digit and space."""
    text = unicodedata.normalize("NFKC", _THIN_SPACE.sub(",", reply))
    return re.sub("[\u2212\u2013\u2012\ufe63]", "-", text)


def _cues(text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Every `answer` or `solution` and what follows up to the next one, the last first."""
    end = len(text)
    for cue in reversed(list(_CUE.finditer(text))):
        yield cue, text[cue.end() : end]
        end = cue.start()


def _last_box(text: str) -> str | None:
    """What the last `oxed{...}` holds, inner braces included; to the end if it is never closed."""
    at = text.rfind("oxed{")
    if at < 0:
        return None
    content, depth = text[at + len("oxed{") :], 1
    for end, character in enumerate(content):
        depth += (character == "{") - (character == "}")
        if not depth:
            return content[:end]
    return content


def _direct(after: str) -> re.Match[str] | None:
    """The number that `after` begins with, or that the equation does that it begins with."""
    start = re.match(_BETWEEN, after).end()
    line = after[start:].partition("\n")[0]
    while "=" in line and not _WORDS.search(line.partition("=")[0]):
        line = line.partition("=")[2]
    return re.compile(_BETWEEN + _NUMBER.pattern).match(line)


def _last_stated(text: str) -> re.Match[str] | None:
    return next(reversed(list(_STATED.finditer(text))), None)


def _integer(found: re.Match[str]) -> int | None:
    digits = re.sub(r"\D", "", found["whole"])
    no_integer = (found["rest"] or "").strip(".0") or _OPERATOR.match(found.string, found.end())
    if no_integer or len(digits) > MOST_DIGITS:
        return None
    return int((found["sign"] or "") + digits)


def _names(text: str) -> frozenset[str]:
    found = re.findall(rf"(?<![A-Za-z\d]){_NAME}", text, re.IGNORECASE)
    return frozenset("V" + re.sub(r"\D", "", name) for name in found)
