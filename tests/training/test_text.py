"""Documents of files and data sets: found, held out, tokenised; and what is refused."""

import dataclasses
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_sleep.training.config import run_config
from hybrid_sleep.training.text.batches import TextBatches
from hybrid_sleep.training.text.config import TextConfig
from hybrid_sleep.training.text.files import find_documents
from hybrid_sleep.training.text.source import Document, HoldOut, open_source, shuffled
from hybrid_sleep.training.text.tokenizer import Encoder, load_tokenizer, reads_bytes

WORDS = ["ünï", "a", "\n", "bee", " ", "🙂🙂", "end.\n", "\t", "longer words"]


def texts(count):
    """Texts of different lengths, some blank, no two of the others alike."""
    return [f"<{i}>" + "".join(WORDS[i * j % 9] for j in range(i % 7)) for i in range(count)]


def write_rows(folder, kind, rows):
    """A local data set of `rows`, as keys of `text.dataset`."""
    path = folder / f"rows.{kind}"
    if kind == "json":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pa = pytest.importorskip("pyarrow")
        table = pa.Table.from_pylist(rows)
        if kind == "csv":
            pytest.importorskip("pyarrow.csv").write_csv(table, path)
        else:
            pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=7)
    return {"path": kind, "data_files": str(path)}


def training(source, size=3):
    return [source.read(h) for _, handles in source.blocks(size) for h in handles]


def held_out(source):
    return [source.read(handle) for handle in source.held_out()]


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.text(alphabet="ab\r\n \f\u00e9\u2028", max_size=8), max_size=6),
    separator=st.sampled_from(["\n\n", "\r\n", "\f", "\r\r\n", "é\n", None]),
)
def test_documents_of_a_file_are_what_python_reads(tmp_path_factory, parts, separator):
    path = tmp_path_factory.mktemp("split") / "x.txt"
    path.write_bytes("\n\n".join(parts).encode())
    with open(path, encoding="utf-8") as file:
        whole = file.read()
    if separator is not None:
        separator = separator.replace("\r\n", "\n").replace("\r", "\n")
    expected = whole.split(separator) if separator else [whole]
    data = path.read_bytes()
    found = [
        data[start:end].decode().replace("\r\n", "\n").replace("\r", "\n")
        for start, end in find_documents(path, separator)
    ]
    # bytes.isspace knows ASCII alone: text that is only U+2028 is kept.
    assert found == [text for text in expected if text.encode() and not text.encode().isspace()]


def test_globs_are_sorted_and_files_come_once_without_their_bom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("c", "a", "b"):
        (tmp_path / f"{name}.txt").write_bytes(b"\xef\xbb\xbf" + f"text {name}".encode())
    (tmp_path / "[x].txt").write_text("text x")
    (tmp_path / "empty.txt").write_text("")
    config = TextConfig(files=["c.txt", "*.txt", "[x].txt"], length=8, held_out=0.0)
    assert [d.content for d in training(open_source(config))] == [
        "text c",
        "text x",
        "text a",
        "text b",
    ]


@pytest.mark.parametrize("text", ["line of text\n" * 900, "äö" * 3000, "x\r\n\r\n" * 1500])
def test_a_long_document_is_cut_into_pieces_that_give_it_back(tmp_path, text):
    path = tmp_path / "long.txt"
    path.write_bytes(text.encode())
    source = open_source(TextConfig(files=[str(path)], length=16, held_out=0.1))
    chunks, tail = training(source), [source.read(h) for h in sorted(source.held_out(), key=list)]
    plain = text.replace("\r\n", "\n")
    assert "".join(d.content for d in chunks + tail) == plain
    assert max(len(d.content.encode()) for d in chunks) <= 10 * 16
    assert len(chunks) > 30
    # Only the end of the document ends: the held-out part is what follows the training part.
    assert [d.ends for d in chunks + tail] == [False] * (len(chunks) + len(tail) - 1) + [True]
    share = sum(len(d.content) for d in tail) / len(plain)
    assert 0.08 < share < 0.2
    if "line" in text:
        assert all(d.content.endswith("text\n") for d in chunks)


def test_one_document_of_every_group_is_held_out(tmp_path):
    path = tmp_path / "many.txt"
    documents = texts(205)
    path.write_text("\f".join(documents), encoding="utf-8")
    source = open_source(TextConfig(files=[str(path)], separator="\f", length=64, held_out=0.1))
    kept, aside = training(source), held_out(source)
    numbers = sorted(documents.index(d.content) for d in aside)
    assert [n // 10 for n in numbers[:20]] == list(range(20)) and len(numbers) in (20, 21)
    assert len({n % 10 for n in numbers}) > 3
    assert sorted(d.content for d in kept + aside) == sorted(documents)
    assert not {d.content for d in kept} & {d.content for d in aside}


@pytest.mark.parametrize("share, total", [(0.1, None), (0.1, 10), (0.1, 9), (0.0, 3), (0.5, 1)])
def test_tails_are_held_out_of_few_documents(share, total):
    split = HoldOut(share, total)
    assert split.tails == (total in (9, 1))
    assert split.tail(200) == (round(200 * share) if total in (9, 1) else 0)
    if not split.tails:
        assert sum(map(split.draws, range(100))) == round(100 * share)


def test_shuffling_is_a_permutation_by_seed_epoch_and_block():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]
    orders = {tuple(shuffled(50, *key)) for key in keys}
    assert len(orders) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)
    # As it was first: a run resumed under another version must find its documents.
    assert shuffled(6, 0, 0, 0) == [4, 1, 3, 5, 0, 2]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_rows_of_a_data_set_are_documents(tmp_path, kind, streaming):
    pytest.importorskip("datasets")
    documents = [t if i % 5 else " " for i, t in enumerate(texts(41))]
    rows = [{"other": 1, "body": text} for text in documents]
    given = {**write_rows(tmp_path, kind, rows), "streaming": streaming, "column": "body"}
    source = open_source(TextConfig(dataset=given, length=8, held_out=0.1))
    kept, aside = training(source), held_out(source)
    places = [i for i in range(41) if HoldOut(0.1, 41).draws(i)]
    assert [d.content for d in aside] == [documents[i] for i in places if i % 5]
    assert [d.content for d in kept] == [
        text for i, text in enumerate(documents) if i % 5 and i not in places
    ]
    # From every place on, and while another iterator is under way, the rest is the same.
    blocks = list(source.blocks(4))
    for n, (place, _) in enumerate(blocks):
        other = source.held_out()
        next(other)
        again = list(source.blocks(4, json.loads(json.dumps(place))))
        assert [documents for _, documents in again] == [documents for _, documents in blocks[n:]]


def test_few_rows_of_a_data_set_give_their_ends(tmp_path):
    pytest.importorskip("datasets")
    rows = [{"input_ids": list(range(i, i + 20))} for i in range(3)] + [{"input_ids": [9]}]
    given = {**write_rows(tmp_path, "parquet", rows), "column": "input_ids"}
    source = open_source(TextConfig(dataset=given, length=8, held_out=0.1))
    assert training(source) == [Document(list(range(i, i + 18)), False) for i in range(3)]
    assert held_out(source) == [*(Document([i + 18, i + 19]) for i in range(3)), Document([9])]


def test_bytes_need_no_file_and_are_saved_and_loaded(tmp_path):
    tokenizer = load_tokenizer("bytes")
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert len(tokenizer) == len(again) == 259 and reads_bytes(again)
    text = "a </s> b\r\n<pad>\x00ü🙂"
    for encoder in (Encoder(tokenizer), Encoder(again)):
        assert encoder(Document(text)).tolist() == [b + 3 for b in text.encode()] + [1]
        assert encoder(Document(text, False)).tolist() == [b + 3 for b in text.encode()]
        assert encoder(Document([5, 6])).tolist() == [5, 6, 1]
        assert encoder(Document([5, 1])).tolist() == [5, 1]
        assert encoder(Document([5, 1], False)).tolist() == [5, 1]


def own_tokenizer(folder, **special):
    """A folder with a tokenizer of seven words; `bos` in front if it is one of `special`."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["[unk]", "one", "two", "three", "[end]", "[go]", "<"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[unk]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if "bos_token" in special:
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single="[go] $A", special_tokens=[("[go]", 5)]
        )
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_of_a_folder_ends_documents_and_begins_them_if_it_does_so(tmp_path):
    bare = load_tokenizer(own_tokenizer(tmp_path / "a", eos_token="[end]"))
    begins = load_tokenizer(own_tokenizer(tmp_path / "b", eos_token="[end]", bos_token="[go]"))
    assert Encoder(bare)(Document("one two")).tolist() == [1, 2, 4]
    assert Encoder(begins)(Document("one two")).tolist() == [5, 1, 2, 4]
    assert Encoder(begins)(Document("one two", False)).tolist() == [5, 1, 2]
    # Text cannot end a document by naming the token.
    assert 4 not in Encoder(bare)(Document("one [end] two", False)).tolist()
    assert not reads_bytes(bare) and Encoder(bare).pad == 4
    with pytest.raises(
        ValueError, match=r"text\.tokenizer must have an eos token .*, as bytes has, got"
    ):
        load_tokenizer(own_tokenizer(tmp_path / "c"))


def test_a_tokenizer_that_is_not_there_is_named(tmp_path):
    missing = str(tmp_path / "nothing")
    with pytest.raises(
        ValueError, match=r"text\.tokenizer must be bytes, a folder .*, got '.*nothing'"
    ):
        load_tokenizer(missing)


FILES = {"files": ["a.txt"], "length": 8}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"length": 8}, "one of text.files and text.dataset must be given, got neither"),
        (
            {**FILES, "dataset": {"path": "json"}},
            "one of text.files and text.dataset must be given, got both",
        ),
        (
            {"files": [], "length": 8},
            r"text.files must be null or a list of paths and .*, got \[\]",
        ),
        ({**FILES, "length": 1}, "text.length must be an integer of at least 2, got 1"),
        (
            {**FILES, "held_out": 0.6},
            r"text.held_out must be a share of the documents, 0 to 0.5, got 0.6",
        ),
        (
            {**FILES, "held_out": float("nan")},
            "text.held_out must be a share of the documents, 0 to 0.5, got nan",
        ),
        ({**FILES, "shuffle": -1}, "text.shuffle must be an integer of at least 0, got -1"),
        ({**FILES, "separator": ""}, "text.separator must be null or text between .*, got ''"),
        (
            {**FILES, "tokenizer": ""},
            "text.tokenizer must be bytes, a folder or a name on the hub, got ''",
        ),
        ({"dataset": {}, "length": 8}, "text.dataset.path must be given"),
        (
            {"dataset": {"path": "json", "colum": 1}, "length": 8},
            "text.dataset must have keys out of column, .*, got 'colum'",
        ),
        (
            {"dataset": {"path": "json", "streaming": 1}, "length": 8},
            "text.dataset.streaming must be true or false, got 1",
        ),
        (
            {"dataset": {"path": "json"}, "separator": "x", "length": 8},
            "text.separator must be null for text.dataset, .*, got 'x'",
        ),
    ],
)
def test_what_a_config_does_not_allow_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        run_config({"text": given})


def test_a_config_is_plain_data():
    for config in (TextConfig(**FILES), TextConfig(dataset={"path": "json"}, length=4)):
        content = yaml.safe_load(yaml.safe_dump(dataclasses.asdict(config)))
        assert TextConfig(**content) == config


@pytest.mark.parametrize(
    "content, pattern, error, message",
    [
        (
            b"text",
            "b.txt",
            FileNotFoundError,
            r"text.files\[0\] must be the path of .*, got 'b.txt'",
        ),
        (
            b"text",
            "b*.txt",
            FileNotFoundError,
            r"text.files\[0\] must be the path of .*, got 'b\*.txt'",
        ),
        (b"", "a.txt", ValueError, "text.files must hold text .*, got none to train on"),
        (b" \n\n", "a.txt", ValueError, "text.files must hold text .*, got none to train on"),
        (
            b"x" * 5_000_000 + b"\xc3\xa4\xff",
            "a.txt",
            ValueError,
            "must be UTF-8, got another byte at 5000002 ",
        ),
        (b"text\xc3", "a.txt", ValueError, "must be UTF-8, got another byte at 4 "),
    ],
)
def test_files_that_cannot_be_read_are_named(
    tmp_path, monkeypatch, content, pattern, error, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(error, match=message):
        open_source(TextConfig(files=[pattern], length=8))


def test_data_sets_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    rows = write_rows(tmp_path, "json", [{"text": 3}])

    def opened(**changes):
        return open_source(TextConfig(dataset={**rows, **changes}, length=8))

    with pytest.raises(ValueError, match="text.dataset=.*cannot be loaded: "):
        opened(data_files=str(tmp_path / "missing.json"))
    with pytest.raises(ValueError, match="text.dataset=.*cannot be loaded.*split"):
        opened(split="nosplit")
    with pytest.raises(
        ValueError, match="text.dataset.column must be a column of the data set, .*text, got 'body'"
    ):
        opened(column="body")
    with pytest.raises(
        ValueError, match="text.dataset.column='text' must hold text or lists .*, got int in row 0"
    ):
        training(opened())
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match="needs the package datasets"):
        opened()


def test_a_source_is_checked_against_model_and_batch(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\f".join(texts(12)), encoding="utf-8")
    source = open_source(TextConfig(files=[str(path)], separator="\f", length=64, held_out=0.1))
    tokenizer = load_tokenizer("bytes")
    source.check(tokenizer, vocab_size=259, rows=11)
    with pytest.raises(ValueError, match="model.vocab_size must be at least 259"):
        source.check(tokenizer, vocab_size=258, rows=2)
    with pytest.raises(
        ValueError, match="for each of train.batch_size=12 rows, .*, got 11 to train on"
    ):
        source.check(tokenizer, vocab_size=259, rows=12)


def test_ready_tokens_out_of_range_are_refused(tmp_path):
    pytest.importorskip("datasets")
    given = {**write_rows(tmp_path, "parquet", [{"input_ids": [3, 259]}]), "column": "input_ids"}
    source = open_source(TextConfig(dataset=given, length=8, held_out=0.0))
    with pytest.raises(ValueError, match=r"must hold token ids in 0..258, .*\[3, 259\]"):
        source.check(load_tokenizer("bytes"), vocab_size=300, rows=1)


def test_a_data_set_of_blanks_is_refused_before_and_while_it_is_read(tmp_path):
    pytest.importorskip("datasets")
    rows = write_rows(tmp_path, "json", [{"text": " \n"}, {"text": ""}, {"text": None}])
    source = open_source(TextConfig(dataset={**rows, "streaming": True}, length=8))
    tokenizer = load_tokenizer("bytes")
    with pytest.raises(
        ValueError, match="text must hold a document for each .*, got 0 to train on"
    ):
        source.check(tokenizer, vocab_size=259, rows=1)
    with pytest.raises(ValueError, match="text must hold documents to train on, got none"):
        next(iter(TextBatches(source, tokenizer, rows=1)))
