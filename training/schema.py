"""YAML to dataclasses: every key known, none given twice, every value of its type."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import yaml


class StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ValueError(f"key {key!r} in line {line} is given twice; allowed: once")
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_overrides(overrides: Mapping[str, Any] | Iterable[str]) -> list[tuple[str, Any]]:
    """Pairs of dotted key and value, from a mapping or from `key=value` texts (read as YAML)."""
    if isinstance(overrides, Mapping):
        return list(overrides.items())
    parsed = []
    for text in [overrides] if isinstance(overrides, str) else overrides:
        key, equals, value = text.partition("=")
        if not (key.strip() and equals):
            raise ValueError(f"override {text!r}; allowed: key=value, such as train.steps=100")
        parsed.append((key.strip(), yaml.safe_load(value)))
    return parsed


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
    return kind(**{k: _typed(v, hints[k], prefix + k) for k, v in content.items()})


def only_known(content: Mapping[str, Any], known: Iterable[str], prefix: str) -> None:
    """Raise ValueError for the first key that is not `known`."""
    for key in content:
        if key not in known:
            raise ValueError(f"unknown key {prefix}{key}; allowed: {', '.join(sorted(known))}")


def none_missing(kind: type, content: Mapping[str, Any], prefix: str) -> None:
    """Raise ValueError for the first field of `kind` that has no default and no value."""
    for f in dataclasses.fields(kind):
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if needed and f.name not in content:
            raise ValueError(f"key {prefix}{f.name} is missing; it has no default")


def _typed(value: Any, hint: Any, key: str) -> Any:
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
                return _typed(value, kind, key)
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
        return [_typed(item, arguments[0], f"{key}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{key}={value!r}; allowed: keys and values")
        if arguments == (str, Any):
            return dict(value)
        of_key, of_value = arguments
        return {
            _typed(k, of_key, f"{key} key"): _typed(v, of_value, f"{key}.{k}")
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
    if hint is int and isinstance(value, bool) or not isinstance(value, hint):
        names = {bool: "true or false", int: "an integer", str: "text"}
        raise ValueError(f"{key}={value!r}; allowed: {names[hint]}")
    return value
