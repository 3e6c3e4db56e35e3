"""The types of a run config, checked by pydantic, and what it finds wrong in our own words.

A type carries the words for what it allows, so that an error names the key by its dotted path, its
value and all that is allowed, whichever of the type's conditions did not hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import os
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError

from hybrid_sleep.validation import LARGEST

STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
KEY = "[key]"  # pydantic's mark of an error in a key, not in its value


def as_number(value: Any) -> float:
    """A whole or written-out number as a float: to YAML 1.1, 2e-3 is text. ValueError if none."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    raise ValueError("")


def as_path(value: Any) -> str:
    """`value` as the text of a path, `~` as the home folder that it stands for.

    A number or a date is its digits. ValueError, saying why where that is not plain to see, for
    anything else, for blanks, a template, and the home of a user who is not known.
    """
    if isinstance(value, os.PathLike | int | datetime.date) and not isinstance(value, bool):
        value = str(value)
    if value is None:
        raise ValueError("YAML reads nothing, and a lone ~, as null")
    if not isinstance(value, str) or "\0" in value or not value.strip():
        raise ValueError("")
    if "{{" in value:
        raise ValueError("a template that nothing has filled in")
    home = os.path.expanduser(value)
    if value.startswith("~") and home == value:
        raise ValueError("nobody has that name here")
    return home


Flag = Annotated[bool, Strict(), "true or false"]
Text = Annotated[str, Strict(), "text"]
Name = Annotated[Text, Field(pattern=r"\S"), "text"]
Count = Annotated[int, Strict(), Field(ge=1, le=LARGEST), "an integer of at least 1"]
CountFrom0 = Annotated[int, Strict(), Field(ge=0, le=LARGEST), "an integer of at least 0"]
Number = Annotated[float, BeforeValidator(as_number), Field(allow_inf_nan=False)]
Rate = Annotated[Number, Field(gt=0), "a finite number above 0"]
FilePath = Annotated[str, BeforeValidator(as_path), "the path of a file"]
FolderPath = Annotated[str, BeforeValidator(as_path), "the path of a folder"]


def set_key(content: dict[str, Any], key: str, value: Any) -> None:
    """Set what a dotted key names in nested mappings; ValueError if it leads through a value."""
    *parents, last = key.split(".")
    for depth, name in enumerate(parents):
        if content.get(name) is None:
            # run.yaml has null for a section that its run was not given.
            content[name] = {}
        content = content[name]
        if not isinstance(content, dict):
            raise ValueError(
                f"override {key!r}: {'.'.join(parents[: depth + 1])} must hold keys, got "
                f"{content!r}"
            )
    content[last] = value


def flat(content: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted key."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def build(kind: type, content: Any) -> Any:
    """The dataclass `kind` from a mapping; ValueError with all that is wrong, in one line."""
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise ValueError("; ".join(_findings(error, kind, content))) from None


def only_known(content: Iterable[Any], known: Iterable[str], section: str) -> None:
    """Raise ValueError for the first key that is not `known`, with those that look like it."""
    for key in content:
        if key not in known:
            raise ValueError(_unknown(key, known, section))


def _unknown(key: Any, known: Iterable[str], section: str) -> str:
    allowed = ", ".join(sorted(known))
    return f"{section} must have keys out of {allowed}, got {key!r}{alike(key, known)}"


def alike(given: Any, known: Iterable[str]) -> str:
    """` (did you mean ...?)`, empty if nothing in `known` looks like what was `given`."""
    close = difflib.get_close_matches(str(given), known, n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _findings(error: ValidationError, kind: type, content: Any) -> Iterator[str]:
    found = set()
    for finding in error.errors(include_url=False):
        path, hint, value, rest = _follow(kind, content, finding["loc"])
        why = str(finding["ctx"]["error"]) if finding["type"] == "value_error" else ""
        if finding["type"] == "value_error" and dataclasses.is_dataclass(hint):
            # Of keys that do not go together: the section's own words.
            text = why
        elif finding["type"] == "unexpected_keyword_argument":
            text = _unknown(rest[0], [f.name for f in dataclasses.fields(hint)], path or "a run")
        elif finding["type"] == "missing":
            name = ".".join(filter(None, [path, str(rest[0])]))
            text = f"{name} must be given: it has no default"
        elif rest[-1:] == (KEY,):
            (of_key, _) = typing.get_args(_bare(hint))
            text = f"a key of {path} must be {_words(of_key)}, got {rest[0]!r}"
        else:
            too_large = finding.get("ctx", {}).get("le") == LARGEST
            words = "an integer of at most 2**63 - 1" if too_large else _words(hint)
            text = f"{path} must be {words}, got {value!r}" + (f" ({why})" if why else "")
        # Every branch of a union finds something, of one and the same value.
        if text not in found:
            found.add(text)
            yield text


def _follow(
    hint: Any, value: Any, places: tuple[int | str, ...]
) -> tuple[str, Any, Any, tuple[int | str, ...]]:
    """How far a dotted path leads: its name, the type and the value there, and what is left."""
    path = ""
    for number, place in enumerate(places):
        bare, rest = _bare(hint), places[number:]
        if dataclasses.is_dataclass(bare):
            hints = typing.get_type_hints(bare, include_extras=True)
            if place not in hints or not isinstance(value, Mapping) or place not in value:
                return path, bare, value, rest
            hint, path = hints[place], f"{path}.{place}".lstrip(".")
        elif typing.get_origin(bare) is list and isinstance(place, int):
            hint, path = typing.get_args(bare)[0], f"{path}[{place}]"
        elif typing.get_origin(bare) is dict and rest[1:2] != (KEY,) and place in value:
            hint, path = typing.get_args(bare)[1], f"{path}.{place}"
        else:
            return path, hint, value, rest
        value = value[place]
    bare = _bare(hint)
    return path, bare if dataclasses.is_dataclass(bare) else hint, value, ()


def _bare(hint: Any) -> Any:
    """`hint` without its words, and without None where that is the one alternative."""
    while typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        others = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return _bare(others[0]) if len(others) == 1 else hint
    return hint


def _words(hint: Any) -> str:
    """What a type allows."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        # Outer words follow the inner ones when types are nested.
        own = [text for text in arguments[1:] if isinstance(text, str)]
        return own[-1] if own else _words(arguments[0])
    if origin in (typing.Union, types.UnionType):
        null = ["null"] if type(None) in arguments else []
        return " or ".join(null + [_words(x) for x in arguments if x is not type(None)])
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin is list:
        return "a list"
    if dataclasses.is_dataclass(hint):
        names = sorted(f.name for f in dataclasses.fields(hint))
        return f"keys and values, with keys out of {', '.join(names)}"
    return "keys and values" if origin is dict else "a number"
