"""YAML as a run, a command line and an option have it: read in one way, refused in one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

# What stays text, however much it looks like a number, a date or a truth value; with all below it.
TEXT_KEYS = (
    "init.checkpoint",
    "output_dir",
    "task.name",
    "text.dataset.column",
    "text.dataset.data_files",
    "text.dataset.name",
    "text.dataset.path",
    "text.dataset.split",
    "text.files",
    "text.separator",
    "text.tokenizer",
    "train.deepspeed",
)
DEEPEST = 50
MOST_VALUES = 100_000
_TAG = "tag:yaml.org,2002:"
_EXPONENT = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")
_TEMPLATE = re.compile(r"\{\{|\{%")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-6 as a number, as YAML 1.2 and everyone else does."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the texts that `_Loader` would read as numbers."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(_TAG + "float", _EXPONENT, list("-+.0123456789"))


def parse_yaml(text: str, key: str = "") -> Any:
    """Plain data out of YAML, the whole of a file or (with `key`) the value of one dotted key.

    Values of `TEXT_KEYS` stay the text that was written; merge keys (`<<`) are followed. Raises
    ValueError, in one line that names the place, for what is no YAML, a key given twice, a key
    that is a list or has keys itself, an unfilled template, and for what is nested too deep.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _prepare(loader, node, key, [0])
        return _construct(loader, node)
    except yaml.YAMLError as error:
        raise ValueError(_in_one_line(error, text)) from None
    except RecursionError:
        raise ValueError(f"it must have at most {DEEPEST} levels, got more") from None
    finally:
        if loader is not None:
            loader.dispose()


def _construct(loader: _Loader, node: yaml.Node) -> Any:
    try:
        return loader.construct_document(node)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # Python's own words for a date such as 2026-13-45, or for a tag that does not fit.
        raise ValueError(f"holds a value that cannot be ({error})") from None


def dump_yaml(content: Any) -> str:
    """YAML that `parse_yaml` reads back as the same data, in the same order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)


def parse_overrides(
    overrides: Mapping[str, Any] | Iterable[str], example: str = "train.steps=100"
) -> list[tuple[str, Any]]:
    """Pairs of dotted key and value, from a mapping or from `key=value` texts (read as YAML).

    Raises ValueError naming a text in another form, with an `example` of the right one.
    """
    if isinstance(overrides, Mapping):
        return list(overrides.items())
    parsed = []
    for text in [overrides] if isinstance(overrides, str) else overrides:
        key, equals, value = text.partition("=")
        if not (key.strip() and equals):
            raise ValueError(f"override must be key=value, such as {example}, got {text!r}")
        try:
            parsed.append((key.strip(), parse_yaml(value, key.strip())))
        except ValueError as error:
            raise ValueError(f"override {text!r}: {error}") from None
    return parsed


def _prepare(
    loader: _Loader, node: yaml.Node, path: str, seen: list[int], depth: int = 0
) -> None:
    """Check keys and sizes below `node`, and make text of what `TEXT_KEYS` say is text."""
    line = node.start_mark.line + 1
    seen[0] += 1
    if depth > DEEPEST or seen[0] > MOST_VALUES:
        most = f"{MOST_VALUES:,} values" if depth <= DEEPEST else f"{DEEPEST} levels"
        raise ValueError(f"line {line}: it must have at most {most}, got more")
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _prepare(loader, item, path, seen, depth + 1)
    elif isinstance(node, yaml.MappingNode):
        keys = set()
        for key_node, value in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                braces = isinstance(key_node, yaml.MappingNode)
                if braces and key_node.start_mark.index == node.start_mark.index + 1:
                    raise ValueError(_template(line))
                what = "a list" if isinstance(key_node, yaml.SequenceNode) else "keys and values"
                raise ValueError(f"line {line}: a key must be text or a number, got {what}")
            merged = key_node.tag == _TAG + "merge"
            key = "<<" if merged else loader.construct_object(key_node)
            if key in keys:
                raise ValueError(f"key {key!r} must be given once, got it again in line {line}")
            keys.add(key)
            below = path if merged else f"{path}.{key}".lstrip(".")
            _prepare(loader, value, below, seen, depth + 1)
    elif node.tag != _TAG + "null" and f"{path}.".removeprefix("stages.").startswith(
        tuple(f"{key}." for key in TEXT_KEYS)
    ):
        node.tag = _TAG + "str"


def _template(line: int) -> str:
    return (
        f"line {line}: it must be plain YAML, got a template that nothing has filled in (a text "
        "that begins with a brace needs quotes)"
    )


def _in_one_line(error: Any, text: str) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    lines = text.splitlines() or [""]
    if _TEMPLATE.search(lines[min(mark.line, len(lines) - 1)]):
        return _template(mark.line + 1)
    what = " ".join(part for part in (error.context, error.problem) if part)
    if "'\\t'" in what:
        what += " (a tab; YAML indents with spaces)"
    return f"line {mark.line + 1}, column {mark.column + 1}: {what}"
