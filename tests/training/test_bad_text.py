"""Text that cannot be learned from is refused before the first step, with place and cause."""

from __future__ import annotations

import json
import logging

import pytest

from hybrid_sleep import HybridSleepConfig
from hybrid_sleep.training.text.batches import TextBatches
from hybrid_sleep.training.text.config import TextConfig
from hybrid_sleep.training.text.source import open_source
from hybrid_sleep.training.text.tokenizer import load_tokenizer


def rows(*contents):
    return "".join(json.dumps({"text": content}) + "\n" for content in contents)


def check(config, batch=2):
    tokenizer = load_tokenizer(config.tokenizer)
    source = open_source(config)
    source.check(tokenizer, vocab_size=300, rows=batch)
    return source, tokenizer


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def make(text, streaming, path="json"):
        file = tmp_path / "data.jsonl"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        given = {"path": path, "data_files": str(file), "streaming": streaming}
        return TextConfig(dataset=given, length=8)

    return make


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (rows(*[[1]] * 400), "must hold a document of two tokens or more"),
        (
            rows(*[[[1, 2], [3]]] * 400),
            r"flat lists of token ids, got \[\[1, 2\], \[3\]\].* in row 0",
        ),
        (rows("ab", 7), "got int in row 1"),
        (rows(*[[1, 2]] * 99, [1.5]), r"got \[1.*in row"),
        (rows([1, 2], [3, None]), r"got \[3, None\].* in row 1"),
        (rows(["a", "b"]), r"got \['a', 'b'\].* in row 0"),
        ('{"text": "a"}\n{"text": \n', r"data.jsonl.* in row 1"),
        ("hello\n", r"data.jsonl.* in row 0"),
        ("", r"data.jsonl', which is empty"),
    ],
)
def test_rows_that_are_no_documents(dataset, streaming, text, says):
    with pytest.raises(ValueError, match=says) as caught:
        check(dataset(text, streaming))
    assert "\n" not in str(caught.value)
    assert logging.getLogger("datasets").handlers  # as they were


def test_the_row_of_a_token_out_of_range_is_named_before_it_is_read(dataset):
    with pytest.raises(ValueError, match=r"0..258, .* got \[1, 259\].* in row 300"):
        check(dataset(rows(*[[1, 2]] * 300, [1, 259]), False))


def test_a_stream_that_breaks_later_says_behind_which_row(dataset, monkeypatch):
    source, _ = check(dataset(rows(*["some text"] * 4), True))

    def broken(place):
        yield from ({"text": "some text"} for _ in range(3))
        raise OSError("the disk is gone")

    monkeypatch.setattr(source, "_from", broken)
    with pytest.raises(ValueError, match=r"behind row 2: OSError: the disk is gone"):
        list(source.blocks(8))


def test_a_separator_that_never_occurs(tmp_path):
    one, two = tmp_path / "1.txt", tmp_path / "2.txt"
    one.write_text("first line\nsecond line\n" * 9)
    two.write_text("third\n\nfourth" * 9)

    def config(separator, *files):
        return TextConfig(files=[str(file) for file in files], separator=separator, length=8)

    with pytest.raises(ValueError, match=r"got '\\n\\n', which occurs in none of the files"):
        open_source(config("\n\n", one))
    with pytest.raises(ValueError, match=r"occurs in none .* in double quotes"):
        open_source(config(r"\n", one))
    assert open_source(config("\n\n", one, two)).size["chunks"]
    assert open_source(config(None, one)).size["chunks"]
    one.write_text(r"taken\nfrom\ncode" * 9)
    assert open_source(config(r"\n", one)).size["chunks"]


def test_a_step_without_a_label_says_so(dataset):
    """Most documents are longer: only when it is read can such a batch be seen."""
    source, tokenizer = check(dataset(rows([5, 6], *[[1]] * 199), False))
    with pytest.raises(ValueError, match="but one token of a document each in step"):
        for _, _ in zip(range(40), TextBatches(source, tokenizer, rows=2), strict=False):
            pass


def test_the_tokenizer_of_a_model_of_ours_is_read_without_its_code(tmp_path, monkeypatch):
    ours, other = tmp_path / "ours", tmp_path / "other"
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    for folder in (ours, other):
        load_tokenizer("bytes").save_pretrained(folder)
    config = HybridSleepConfig(num_hidden_layers=2)
    config.auto_map = {"AutoConfig": "modeling_hybrid_sleep.HybridSleepConfig"}
    config.save_pretrained(ours)
    assert len(load_tokenizer(str(ours))) == 259

    said = json.loads((other / "tokenizer_config.json").read_text())
    said |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (other / "tokenizer_config.json").write_text(json.dumps(said))
    (other / "mine.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(ValueError, match="code of its own, which is not run"):
        load_tokenizer(str(other))
