"""Streams of intents, out of small files of the hub's form that are written here."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from torch import nn

from hybrid_sleep.eval.continual.bench import measure_row
from hybrid_sleep.eval.continual.intent_names import BANKING77, CLINC150, CLINC150_DOMAINS
from hybrid_sleep.eval.continual.intents import Banking77, Clinc150
from hybrid_sleep.eval.continual.methods import Training
from hybrid_sleep.eval.tasks.sampling import Stream

datasets = pytest.importorskip("datasets")

# Of bytes: 259 ids for texts, then the first token, the separator, the end, and intents.
BEGIN, SEPARATOR, END, FIRST = 259, 260, 261, 262
COLUMN = {"clinc150": "intent", "banking77": "label"}
NAMES = {"clinc150": CLINC150, "banking77": BANKING77}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, texts, labels, column, names=None):
    """A file of two columns; names: those of a `ClassLabel`, which Parquet keeps."""
    features = None
    if names is not None:
        features = datasets.Features(
            {"text": datasets.Value("string"), column: datasets.ClassLabel(names=list(names))}
        )
    data = datasets.Dataset.from_dict({"text": texts, column: labels}, features=features)
    path.parent.mkdir(parents=True, exist_ok=True)
    {".parquet": data.to_parquet, ".json": data.to_json, ".csv": data.to_csv}[path.suffix](path)


def published(folder, kind="clinc150", end=".parquet", names=True, each=2):
    """Every intent `each` times in train and once in test; a text says split, number and intent."""
    every, column = NAMES[kind], COLUMN[kind]
    for split, count in (("train", each), ("validation", 1), ("test", 1)):
        labels = [i for i in range(len(every)) for _ in range(count)]
        texts = [f"{split[:2]}{n}, {every[i]}" for n, i in enumerate(labels)]
        write(
            folder / f"{split}-00000-of-00001{end}", texts, labels, column, every if names else None
        )
    return folder


def text_of(row):
    """The text of a row of bytes."""
    return bytes(i - 3 for i in row[1 : row.index(SEPARATOR)]).decode()


def test_the_tables_are_those_that_were_published():
    assert len(set(CLINC150)) == 151 and len(set(BANKING77)) == 77
    assert [len(intents) for intents in CLINC150_DOMAINS.values()] == [15] * 10
    assert {x for group in CLINC150_DOMAINS.values() for x in group} == {*CLINC150} - {"oos"}
    # Numbers that the hub's cards show.
    assert (CLINC150[0], CLINC150[42], CLINC150[150]) == (
        "restaurant_reviews", "oos", "change_volume",
    )  # fmt: skip
    assert (BANKING77[0], BANKING77[11], BANKING77[42]) == (
        "activate_my_card", "card_arrival", "lost_or_stolen_phone",
    )  # fmt: skip
    assert CLINC150_DOMAINS["travel"][:3] == ("plug_type", "travel_notification", "translate")


def test_rows_by_hand(tmp_path):
    labels = [CLINC150.index(domain[0]) for domain in CLINC150_DOMAINS.values()]
    write(tmp_path / "train.json", ["hi", *["abcdé"] * 9], labels, "intent")
    write(tmp_path / "test.json", [""] * 10, labels, "intent")
    stream = Clinc150(tmp_path, text_length=5)
    assert (stream.begin, stream.separator, stream.pad) == (BEGIN, SEPARATOR, END)
    assert stream.vocab_size == FIRST + 151 and stream.length == 9
    # "freeze_account" is number 20; a byte is its value and 3.
    assert stream.batch(0, 1, Stream(0)).tolist() == [
        [BEGIN, 104 + 3, 105 + 3, SEPARATOR, FIRST + 20, END, END, END, END]
    ]
    # "replacement_card_duration" is 90; of é, the fifth letter, one of two bytes is left.
    assert stream.batch(1, 1, Stream(0)).tolist() == [
        [BEGIN, 100, 101, 102, 103, 0xC3 + 3, SEPARATOR, FIRST + 90, END]
    ]
    assert "than 5, 9 for training and 0 for tests" in stream.about
    # What is learned of a row ends with its first pad.
    labels = stream.labels(stream.batch(0, 1, Stream(0)))
    assert labels[0, 3:].tolist() == [SEPARATOR, FIRST + 20, END, -100, -100, -100]
    assert stream.without_pads([[BEGIN, 1, END, END], [BEGIN, 1]]) == [[BEGIN, 1, END], [BEGIN, 1]]


@pytest.mark.parametrize("end", [".parquet", ".json", ".csv"])
@pytest.mark.parametrize("kind", [Clinc150, Banking77])
def test_each_form_of_files_gives_the_same_tasks(tmp_path, kind, end):
    every = NAMES[kind.name]
    stream = kind(published(tmp_path / "named", kind.name, end, names=end == ".parquet"))
    assert stream.tasks == (
        [name.replace("_", " ") for name in CLINC150_DOMAINS] if kind is Clinc150
        else [f"intents {i + 1} to {i + 11}" for i in range(0, 77, 11)]
    )  # fmt: skip
    for task, (name, group) in enumerate(stream.groups.items()):
        size = 15 if kind is Clinc150 else 11
        assert len(group) == size and stream.floor(task) == 1 / size
        if kind is Clinc150:
            assert tuple(every[i] for i in group) == CLINC150_DOMAINS[name.replace(" ", "_")]
        rows = stream.batch(task, 40 * size, Stream(task)).tolist()
        seen = Counter((text_of(row), row[row.index(SEPARATOR) + 1] - FIRST) for row in rows)
        assert set(seen) == {
            (f"tr{n}, {every[i]}", i) for i in group for n in (2 * i, 2 * i + 1)
        }  # fmt: skip
    assert ("Left out: 3 texts out of scope" in stream.about) == (kind is Clinc150)
    # Numbers, a ClassLabel in another order, and names as text all say the same.
    labels = [every[i] for i in range(len(every)) for _ in (0, 1)]
    texts = [f"tr{n}, {name}" for n, name in enumerate(labels)]
    for folder, names in (("text", None), ("turned", every[::-1])):
        given = labels if names is None else [names.index(name) for name in labels]
        if names is not None and end != ".parquet":
            continue
        column = COLUMN[kind.name]
        write(tmp_path / folder / "sub" / "train" / f"0000{end}", texts, given, column, names)
        tests = [f"te{n}, {name}" for n, name in enumerate(every)]
        numbers = [*every] if names is None else [names.index(name) for name in every]
        write(tmp_path / folder / f"a-test{end}", tests, numbers, column, names)
        assert kind(tmp_path / folder).settings == stream.settings


def test_of_configurations_plus_is_read(tmp_path):
    for name in ("small", "plus"):
        published(tmp_path / name, each=2 if name == "plus" else 1)
    assert Clinc150(tmp_path)._read["train"].count == 300
    assert Clinc150(tmp_path / "small")._read["train"].count == 150


def test_tasks_of_so_many_intents_in_a_drawn_order(tmp_path):
    folder = published(tmp_path / "data")
    of = {domain: [CLINC150.index(x) for x in names] for domain, names in CLINC150_DOMAINS.items()}
    stream = Clinc150(folder, intents=50)
    assert stream.tasks == ["intents 1 to 50", "intents 51 to 100", "intents 101 to 150"]
    every = [i for group in stream.groups.values() for i in group]
    assert every == sum(of.values(), [])
    drawn = Clinc150(folder, intents=50, shuffled=1)
    mixed = [i for group in drawn.groups.values() for i in group]
    assert mixed != every and sorted(mixed) == sorted(every)
    domains = Clinc150(folder, shuffled=1)
    assert domains.tasks != list(of) and sorted(domains.tasks) == sorted(
        name.replace("_", " ") for name in of
    )
    assert all(list(g) == of[name.replace(" ", "_")] for name, g in domains.groups.items())
    texts = {text_of(row) for row in domains.batch(3, 200, Stream(0)).tolist()}
    fourth = list(domains.groups.values())[3]
    assert {x.partition(", ")[2] for x in texts} == {CLINC150[i] for i in fourth}
    # What a row depends on is in the settings, and nothing of where the files are.
    assert drawn.settings["shuffled"] == 1 and str(tmp_path) not in str(drawn.settings)
    assert len({str(x.settings) for x in (stream, drawn, domains, Clinc150(folder))}) == 4
    assert pickle.loads(pickle.dumps(drawn)).settings == drawn.settings


class Says(nn.Module):
    """Behind the separator, names by likelihood: for each text those that `answer` gives."""

    def __init__(self, answer):
        super().__init__()
        self.dummy = nn.Parameter(torch.zeros(1))
        self.answer, self.read = answer, []

    def forward(self, input_ids, use_cache=False):
        self.read += input_ids.tolist()
        logits = torch.zeros(*input_ids.shape, FIRST + 151)
        logits[:, :, END] = 9
        for row, ids in enumerate(input_ids.tolist()):
            at = len(ids) - 1 - ids[::-1].index(SEPARATOR)
            begin = len(ids) - 1 - ids[::-1].index(BEGIN)
            for rank, name in enumerate(self.answer(text_of(ids[begin:]))):
                logits[row, at, FIRST + CLINC150.index(name)] = 5 - rank
        return type("Output", (), {"logits": logits})


def test_accuracy_among_all_intents_or_those_of_the_task(tmp_path):
    folder = published(tmp_path / "data")
    every, own = Clinc150(folder), Clinc150(folder, scope="task")
    right = Says(lambda text: [text.partition(", ")[2]])
    assert every.accuracy(right, 5) == own.accuracy(right, 5) == 1
    # The model never reads the answer.
    assert all(FIRST > i for row in right.read for i in row)
    assert len(right.read) == 30
    # Another domain's intent is likelier, which only counts where it may be chosen.
    other = Says(lambda text: ["recipe", text.partition(", ")[2]])
    assert every.accuracy(other, 5) == 0 and own.accuracy(other, 5) == 1
    assert every.accuracy(other, 2) == own.accuracy(other, 2) == 1 / 15
    # oos is no intent of any task.
    out = Says(lambda text: ["oos", text.partition(", ")[2]])
    assert every.accuracy(out, 5) == 1
    some = Says(lambda text: [text.partition(", ")[2].replace("car_rental", "carry_on")])
    front = [BEGIN, 70, SEPARATOR, FIRST, END]
    assert every.accuracy(some, 5, context=front) == pytest.approx(14 / 15)
    assert some.read[0][:5] == front
    assert (every.measured, own.measured) == (
        "test texts whose intent is the likeliest of the 150 of all tasks",
        "test texts whose intent is the likeliest of those of its task",
    )


def test_intents_are_learned(tmp_path):
    stream = Clinc150(published(tmp_path / "data", each=1), intents=75, text_length=7)
    settings = asdict(Training(steps=1, rows=8))
    row = measure_row({"method": "fine-tuning", "seed": 0, "settings": settings}, stream)
    assert [len(x) for x in row["matrix"]] == [2, 2, 2] and row["floors"] == [1 / 75] * 2
    # A row begins, has seven bytes at most, a separator, its intent and an end.
    assert row["tokens"] == 2 * 8 * 11
    assert "than 7, 150 for training and 150 for tests" in stream.about


def test_a_tokenizer_that_is_given(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {"<unk>": 0, "<e>": 1, "te0": 2, "freeze_account": 3}
    words = Tokenizer(models.WordLevel(known, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<e>")
    made.save_pretrained(tmp_path / "words")
    folder = published(tmp_path / "data", each=1)
    stream = Clinc150(folder, text_length=2, tokenizer=str(tmp_path / "words"))
    rows = stream.batch(0, 100, Stream(0))
    assert (stream.begin, stream.vocab_size, stream.length) == (4, 4 + 3 + 151, 6)
    assert [4, 0, 3, 5, 7 + 20, 6] in rows.tolist()
    assert stream.settings["tokenizer"] == "words"
    with pytest.raises(ValueError, match="tokenizer must be"):
        Clinc150(folder, tokenizer=str(tmp_path / "none"))


def test_data_that_is_not_there_or_of_another_form_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="data must be a folder that is there, got"):
        Clinc150(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="files that have 'train' in their names"):
        Clinc150(tmp_path / "empty")
    write(tmp_path / "empty" / "latest.csv", ["a"], [0], "intent")
    write(tmp_path / "empty" / "train.csv", ["a"], [0], "intent")
    with pytest.raises(FileNotFoundError, match="files that have 'test' in their names"):
        Clinc150(tmp_path / "empty")
    banking = published(tmp_path / "banking", "banking77")
    with pytest.raises(ValueError, match="columns text and intent, got text, label in split train"):
        Clinc150(banking)
    (banking / "test-00000-of-00001.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="data must be files that datasets reads, got .*test-0"):
        Banking77(banking)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 151], "intent must be an integer of 0 to 150 or one of the 151 .* got 151 in row 1"),
        ([0, -1], "got -1 in row 1 of split train"),
        (["time", "tea"], "got 'tea' in row 1 of split train"),
        ([0.5, 1.0], "got 0.5 in row 0 of split train"),
        ([3, None], "got None in row 1 of split train|got 3.0 in row 0 of split train"),
    ],
)
def test_labels_that_are_none_of_the_intents_are_refused(tmp_path, labels, message):
    write(tmp_path / "train.parquet", ["a", "b"], labels, "intent")
    with pytest.raises(ValueError, match=message):
        Clinc150(tmp_path)


def test_rows_without_a_text_and_tasks_without_rows_are_refused(tmp_path):
    for name in ("train", "test"):
        write(tmp_path / "a" / f"{name}.parquet", ["a", None], [0, 1], "label")
        write(tmp_path / "b" / f"{name}.parquet", ["a"], [0], "label")
    with pytest.raises(ValueError, match="text must be text, got None in row 1 of split train"):
        Banking77(tmp_path / "a")
    with pytest.raises(ValueError, match="got none of 'intents 12 to 22' in split train"):
        Banking77(tmp_path / "b")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"intents": 40}, "intents must divide 150, got 40"),
        ({"intents": 0}, "intents must be an integer of at least 1 and at most 150, got 0"),
        ({"scope": "both"}, "scope must be one of 'all', 'task', got 'both'"),
        ({"text_length": 0}, "text_length must be"),
        ({"shuffled": -1}, "shuffled must be"),
    ],
)
def test_streams_that_cannot_be_are_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        Clinc150(tmp_path, **given)


def test_the_package_datasets_is_named_if_it_is_missing(tmp_path, monkeypatch):
    published(tmp_path / "data")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"datasets.*pip install 'hybrid-sleep\[train\]'"):
        Clinc150(tmp_path / "data")
