"""Published problems of GSM-Infinite, from hand-made rows in local folders."""

from __future__ import annotations

import builtins
import socket

import pytest

from hybrid_sleep.eval.tasks.gsm_infinite import (
    official,
    official_problems,
    parse_answer,
    parse_set,
)

MEDIUM = "InfiniAILab/gsm_infinite_medium_0"


def published(**changed):
    return {
        "problem": "The number of adult crow in Oak Ranch equals 2.",
        "question": "What is the total number of adult animals in Oak Ranch?",
        "solution": "Define adult crow in Oak Ranch as A; so A = 2. Answer: 2.",
        "op": 2,
        "id": 7,
        "template": "crazy_zootopia",
        "mode": "normalforward",
        "length": "zero_context",
        "d": 2,
        **changed,
    }


def test_published_problems_are_read_from_a_local_copy(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    unsound = "The number of A exists, and its number is greater than 0."
    rows = [
        published(),
        published(problem=f"{unsound} {unsound}", solution="Answer: 3. No, Answer: 14."),
    ]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data/ops_2-00000-of-00001.parquet")
    lost = datasets.Dataset.from_list([published(solution="Define A; so A = 2.")])
    lost.to_parquet(tmp_path / "data/ops_3-00000-of-00001.parquet")
    first, second = official_problems(tmp_path, 2)
    assert (first["answer"], first["sound"], first["op"], first["d"]) == (2, True, 2, 2)
    content = f"{rows[0]['problem']}\n{rows[0]['question']}"
    assert first["messages"] == [{"role": "user", "content": content}]
    assert (second["answer"], second["sound"]) == (14, False)
    assert official_problems(tmp_path, 2, limit=1) == [first]
    with pytest.raises(ValueError, match=r"solution must .*Answer.* got .Define A.*ops_3, row 0"):
        official_problems(tmp_path, 3)
    assert parse_answer("Answer: 14") == second["answer"]


def symbolic(**changed):
    return {
        "problem": "assign V000001 = V000002 + 1. assign V000002 = 4. assign V000003 = 5.",
        "question": "Which variables equal 5?",
        "solution": "V000002 = 4. V000001 = V000002 + 1 = 5. V000003 = 5.",
        "op": 2,
        "n": 3,
        "length": 0,
        "id": 4,
        "d": 1,
        "answer_q": 5,
        "answer_list": ["V000001", "V000003"],
        "messages": [{"role": "user", "content": "the published prompt"}],
        **changed,
    }


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Rows into a folder that `datasets` reads, as the split of one op."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def save(op, rows):
        folder = tmp_path / "published/data"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"ops_{op}-00000-of-00001.parquet"
        datasets.Dataset.from_list(rows).to_parquet(path)
        return folder.parent

    return save


def test_symbolic_problems_are_read_too(saved):
    source = saved(1, [symbolic(), symbolic(answer_list=[], answer_q=9)])
    first, second = official_problems(source, 1)
    assert first == {key: value for key, value in symbolic().items() if key != "id"}
    assert parse_set("They are V000003 and V000001.") == set(first["answer_list"])
    assert parse_set("Answer: none") == set(second["answer_list"])
    assert official_problems(str(source), 1, limit=1) == [first]


def test_what_is_no_published_problem_is_refused(saved):
    source = saved(1, [symbolic(), symbolic(answer_list=["12"])])
    assert len(official_problems(source, 1, limit=1)) == 1
    with pytest.raises(ValueError, match=r"answer_list must .*V12.*got \['12'\].*ops_1, row 1"):
        official_problems(source, 1)
    saved(1, [{"problem": "assign V1 = 2.", "question": "?", "answer_list": ["V1"]}])
    with pytest.raises(ValueError, match=r"symbolic, medium or hard.*without solution, op, n"):
        official_problems(source, 1)
    saved(1, [{"problem": "A", "question": "?"}])
    with pytest.raises(ValueError, match=r"without solution, op, template"):
        official_problems(source, 1)


def test_a_split_that_does_not_exist_is_named(saved):
    source = saved(2, [published()])
    with pytest.raises(ValueError, match=r"ops_1.*published', whose split 'ops_3' cannot"):
        official_problems(source, 3)


@pytest.mark.parametrize("argument", [{"op": 0}, {"op": 2, "limit": 0}, {"op": 2, "source": 3}])
def test_numbers_are_checked_before_anything_is_loaded(argument, monkeypatch):
    monkeypatch.setattr(official, "_load", None)
    name, value = list(argument.items())[-1]
    with pytest.raises(ValueError, match=f"{name} must be .*got {value}"):
        official_problems(**{"source": MEDIUM, **argument})


def test_what_cannot_be_reached_fails_at_once(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def never(*args, **kwargs):
        raise AssertionError("nothing may be loaded")

    for name in ("nowhere", "./nowhere", "a/b/c", "/nowhere", ""):
        with pytest.raises(FileNotFoundError, match=rf"source must be a folder .*got {name!r}"):
            official_problems(name, 2)
    with pytest.raises(FileNotFoundError, match=r"source must be a folder .*missing'$"):
        official_problems(tmp_path / "missing", 2)
    # The tests are offline, so that only what was loaded before would do.
    with pytest.raises(ValueError, match=rf"source must .*{MEDIUM}', whose split 'ops_2' cannot"):
        official_problems(MEDIUM, 2)
    monkeypatch.setattr(datasets, "load_dataset", never)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(official, "REACHED_WITHIN", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the call and never answers
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
        with pytest.raises(ValueError, match=rf"OFFLINE.*{endpoint} cannot be reached.*{MEDIUM}"):
            official_problems(MEDIUM, 2)
    with pytest.raises(ValueError, match=rf"{endpoint} cannot be reached .*refused.*{MEDIUM}"):
        official_problems(MEDIUM, 2)


def test_the_package_datasets_is_named_if_it_is_missing(monkeypatch):
    known = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return known(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r"datasets.*pip install 'hybrid-sleep\[train\]'"):
        official_problems(MEDIUM, 2)
