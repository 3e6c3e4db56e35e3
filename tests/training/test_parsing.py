"""YAML of any kind is data or one line that says where it is none; paths stay what was written."""

from __future__ import annotations

import datetime
import itertools
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hybrid_sleep.training.parsing import dump_yaml, parse_overrides, parse_yaml
from hybrid_sleep.training.schema import as_path, build
from hybrid_sleep.training.text.config import TextConfig

TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=6)
TEXTS |= st.sampled_from(["1e-6", "-.5E3", "1e", "no", "~", "<<", "2026-11-27", "0x1f", "{{x}}"])
DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)

PAIRS = itertools.pairwise("abcdefgh")
LAUGHS = "a: &a [1]\n" + "".join(f"{y}: &{y} [{', '.join([f'*{x}'] * 9)}]\n" for x, y in PAIRS)


@given(DATA)
def test_what_is_written_is_read_back(data):
    assert parse_yaml(dump_yaml(data)) == data


@given(DATA)
def test_others_write_what_is_read(data):
    """But for 1e-6, which is text to YAML 1.1 and a number to everyone else."""
    text = yaml.safe_dump(data, default_style='"' if isinstance(data, str) else None)
    if not any(mark in text for mark in ("1e-6", "-.5E3")):
        assert parse_yaml(text) == data


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-6", 1e-6), ("1E5", 1e5), ("-2.e-3", -2e-3), (".5e1", 5.0), ("3", 3), ("-1.5", -1.5)],
)
def test_numbers(text, number):
    value = parse_yaml(f"a: [{text}, '{text}']")["a"]
    assert value == [number, text] and type(value[0]) is type(number)


def test_merge_keys_are_followed():
    text = "base: &b {x: 1, y: 2}\nmore: &c {y: 4, z: 5}\na: {<<: [*b, *c], x: 3}\n"
    assert parse_yaml(text)["a"] == {"x": 3, "y": 2, "z": 5}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1", "line 1, column 3: while parsing a flow sequence"),
        ("[", "line 1, column 2"),
        ("a: 1\n\tb: 2", "line 2, column 1: .*a tab"),
        ("a: {{run}}", "line 1: it must be plain YAML, got a template that nothing has filled in"),
        ("a: 1\nb: {{ run }}/x", "line 2: it must be plain YAML, got a template"),
        ("{% if x %}", "line 1: it must be plain YAML, got a template"),
        ("a: {[1, 2]: 3}", "line 1: a key must be text or a number, got a list"),
        ("? {a: 1}\n: 3", "line 1: a key must be text or a number, got keys and values"),
        ("a: 1\nb: {c: 1, c: 2}", "key 'c' must be given once, got it again in line 2"),
        ("a: {<<: {b: 1}, <<: {c: 2}}", "key '<<' must be given once, got it again in line 1"),
        ("a: {<<: 3}", "line 1.*for merging"),
        ("a: &x [*x]", "line 1: it must have at most 50 levels, got more"),
        ("[" * 60 + "]" * 60, "line 1: it must have at most 50 levels, got more"),
        ("[" * 3000, "it must have at most 50 levels, got more"),
        (LAUGHS, "line .: it must have at most 100,000 values, got more"),
        ("a: *nobody", "undefined alias"),
        ("a: !!python/name:os.system x", "python/name:os.system"),
        ("a: 2026-13-45", "month must be in 1..12"),
        ("a: !!timestamp 3", "cannot be"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: \x00", "special characters"),
    ],
)  # fmt: skip
def test_what_is_no_yaml_says_where(text, says):
    with pytest.raises(ValueError, match=says) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("written", ["123", "0123", "1e5", "2026-11-27", "no", "0x1f", "1:30"])
def test_paths_stay_what_was_written(written):
    text = f"output_dir: {written}\ntext: {{files: [{written}], length: 010}}\nstages:\n"
    text += f"- {{text.files: {written}, text: {{dataset: {{data_files: {{train: {written}}}}}}}}}"
    content = parse_yaml(text)
    assert content["output_dir"] == written and content["text"]["files"] == [written]
    assert content["text"]["length"] == 8  # as in YAML 1.1
    stage = content["stages"][0]
    assert stage["text.files"] == stage["text"]["dataset"]["data_files"]["train"] == written
    assert parse_overrides([f"train.deepspeed={written}"]) == [("train.deepspeed", written)]


def test_null_stays_null_where_a_path_may_be_left_out():
    assert parse_overrides(["train.deepspeed=~", "output_dir="]) == [
        ("train.deepspeed", None), ("output_dir", None),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["a.b=[1", "steps=[", "x={{y}}"])
def test_an_override_that_is_none_is_quoted(text):
    with pytest.raises(ValueError) as caught:
        parse_overrides([text])
    assert repr(text) in str(caught.value) and "\n" not in str(caught.value)


def test_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    day = datetime.date(2026, 11, 27)
    for value, path in [
        ("~/a", "/home/someone/a"), ("a~", "a~"), (123, "123"), (day, "2026-11-27"),
        (Path("a/b"), "a/b"), ("a b", "a b"),
    ]:  # fmt: skip
        assert as_path(value) == path
    for value, why in [
        (None, "null"), ("", "^$"), ("  ", "^$"), (True, "^$"), (1.5, "^$"), (["a"], "^$"),
        ({}, "^$"), ("a\0b", "^$"), ("~no-such-user/a", "nobody has"), ("{{run}}/a", "a template"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=why):
            as_path(value)


def test_paths_of_text_are_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    text = TextConfig(files=["~/a*.txt", "b"], tokenizer="~/t", length=8)
    assert (text.files, text.tokenizer) == (["/h/a*.txt", "b"], "/h/t")
    dataset = {"path": "json", "data_files": {"train": ["~/a.jsonl", "b"]}}
    assert TextConfig(dataset=dataset, length=8).dataset.data_files == {
        "train": ["/h/a.jsonl", "b"]
    }
    with pytest.raises(ValueError, match=r"dataset.data_files must be .*, got \['a', None\]"):
        build(TextConfig, {"dataset": {"path": "json", "data_files": ["a", None]}, "length": 8})
