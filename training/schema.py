"""Plain data to dataclasses: every key known, every value of its type, every path a path."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import os
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from hybrid_sleep.validation import LARGEST


def set_key(content: dict[str, Any], key: str, value: Any) -> None:
    """Set what a dotted key names in nested mappings; ValueError if it leads through a value."""
    *parents, last = key.split(".")
    for depth, name in enumerate(parents):
        content = content.setdefault(name, {})
        if not isinstance(content, dict):
            raise ValueError(
                f"override {key!r}: {'.'.join(parents[: depth + 1])} is a value; allowed: a key "
                "that holds keys"
            )
    content[last] = value


def flat(content: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted key."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def build(kind: type, content: Any, prefix: str) -> Any:
    """The dataclass `kind` from a mapping, each value checked; errors name `prefix` and key."""
    fields = {f.name for f in dataclasses.fields(kind)}
    if not isinstance(content, Mapping):
        allowed = ", ".join(sorted(fields))
        raise ValueError(f"{prefix[:-1]}={content!r}; allowed: the keys {allowed}")
    only_known(content, fields, prefix)
    none_missing(kind, content, prefix)
    hints = typing.get_type_hints(kind)
    return kind(**{k: typed(v, hints[k], prefix + k) for k, v in content.items()})


def only_known(content: Mapping[str, Any], known: Iterable[str], prefix: str) -> None:
    """Raise ValueError for the first key that is not `known`, with those that look like it."""
    for key in content:
        if key not in known:
            raise ValueError(
                f"unknown key {prefix}{key}; allowed: {', '.join(sorted(known))}"
                + alike(key, known)
            )


def alike(given: Any, known: Iterable[str]) -> str:
    """` (did you mean ...?)`, empty if nothing in `known` looks like what was `given`."""
    close = difflib.get_close_matches(str(given), known, n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def as_path(name: str, value: Any, what: str) -> str:
    """`value` as the text of a path, `~` as the home folder that it stands for.

    A number or a date is its digits. ValueError naming `name` for anything else, for blanks, and
    for the home of a user who is not known; `what` says what is allowed.
    """
    if isinstance(value, (os.PathLike, int, datetime.date)) and not isinstance(value, bool):
        value = str(value)
    if value is None:
        raise ValueError(f"{name} is null, as YAML reads nothing and a lone ~; allowed: {what}")
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"{name}={value!r}; allowed: {what}")
    if not value.strip():
        raise ValueError(f"{name} is empty; allowed: {what}")
    if "{{" in value:
        raise ValueError(
            f"{name}={value!r} is a template that nothing has filled in; allowed: {what}"
        )
    home = os.path.expanduser(value)
    if value.startswith("~") and home == value:
        raise ValueError(f"{name}={value!r} is in the home of an unknown user; allowed: {what}")
    return home


def none_missing(kind: type, content: Mapping[str, Any], prefix: str) -> None:
    """Raise ValueError for the first field of `kind` that has no default and no value."""
    for f in dataclasses.fields(kind):
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if needed and f.name not in content:
            raise ValueError(f"key {prefix}{f.name} is missing; it has no default")


def typed(value: Any, hint: Any, key: str) -> Any:
    """`value` if it is what `hint` says; a whole or written-out number passes as a float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        null = "null or " if type(None) in arguments else ""
        errors = []
        for kind in kinds:
            try:
                return typed(value, kind, key)
            except ValueError as error:
                errors.append(str(error))
        if len(errors) == 1:
            raise ValueError(errors[0].replace("; allowed: ", f"; allowed: {null}"))
        allowed = " or ".join(error.partition("; allowed: ")[2] for error in errors)
        raise ValueError(f"{key}={value!r}; allowed: {null}{allowed}")
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{key}={value!r}; allowed: {', '.join(map(str, arguments))}")
        return value
    if hint is list:
        origin, arguments = list, (object,)
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{key}={value!r}; allowed: a list")
        return [typed(item, arguments[0], f"{key}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{key}={value!r}; allowed: keys and values")
        if arguments == (str, Any):
            for name in value:
                if not isinstance(name, str):
                    raise ValueError(f"{key} has the key {name!r}; allowed: keys of text")
            return dict(value)
        of_key, of_value = arguments
        return {
            typed(k, of_key, f"{key} key"): typed(v, of_value, f"{key}.{k}")
            for k, v in value.items()
        }
    if hint is object:
        return value
    if hint is float:
        # YAML 1.1 reads 2e-3 as text; only 2.0e-3 is a number to it.
        if not isinstance(value, bool) and isinstance(value, (int, float, str)):
            try:
                return float(value)
            except ValueError:
                pass
        raise ValueError(f"{key}={value!r}; allowed: a number")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{key}={value!r}; allowed: an integer below 2**63")
    if hint is int and isinstance(value, bool) or not isinstance(value, hint):
        names = {bool: "true or false", int: "an integer", str: "text"}
        raise ValueError(f"{key}={value!r}; allowed: {names[hint]}")
    return value
