"""The command `experience`: what is kept, slept over and erased, on the small world's model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hybrid_sleep import SleepCache
from hybrid_sleep.cli import memories
from hybrid_sleep.cli.app import app
from hybrid_sleep.eval.facts.world import World, load_world
from hybrid_sleep.parametric.store import FactStore

CHECKPOINT = Path(__file__).resolve().parents[2] / "eval/facts/checkpoints/seed0"
STUDY = (
    "study.dreams=0", "study.shares.recent=1.0", "study.shares.dream=0.0",
    "study.shares.foundation=0.0", "study.tokens=200", "study.foundation=64", "study.rate=1e-3",
    "study.band=[0,100]", "study.share=1.0", "study.measured=2", "study.acquired=0.0",
    "study.erase=true", "thresholds.locality=null", "thresholds.perplexity_ratio=null",
)  # fmt: skip
WITH_MODEL = [
    "--model", CHECKPOINT, "--dtype", "float32", *(x for c in STUDY for x in ("--set", c)),
]  # fmt: skip


def call(*words, code=0):
    result = CliRunner().invoke(app, ["experience", *map(str, words)])
    assert result.exit_code == code, result.output
    return result


def test_experience_is_kept_slept_over_and_erased(tmp_path):
    folder, file, questions = tmp_path / "memory", tmp_path / "said.jsonl", tmp_path / "asked.jsonl"
    fact = World(0).unseen_facts(1)[0]
    one = {"prompt": f"Where does {fact.subject} live?", "text": fact.object}
    file.write_text(json.dumps(one) + "\n")
    questions.write_text(json.dumps({"question": one["prompt"], "answer": one["text"]}) + "\n")
    refused = call("add", folder, "Ada lives in Faro.", *WITH_MODEL, code=2).output
    assert refused.startswith("error: consent must be True") and refused.count("\n") == 1
    assert "1 kept" in call("add", folder, "--file", file, "--consent", *WITH_MODEL).stdout
    assert "0 kept, 1 were known" in call("add", folder, "--file", file, "--consent").stdout
    call("add", folder, "Ada lives in Faro.", "--consent", "--source", "other")
    status = json.loads(call("status", folder).stdout)
    assert json.dumps(status).count("Faro") == 0 and "other" in json.dumps(status)
    assert "1 experiences of other erased" in call("erase", folder, "--source", "other").stdout
    model = load_world()[0]
    cache = SleepCache(model.config)
    model(torch.tensor([[5, 6, 7]]), cache=cache)
    cache.save_pretrained(tmp_path / "cache")
    given = "--questions", questions, "--cache", tmp_path / "cache"
    tried = call("sleep", folder, *given, "--dry-run").stdout
    assert tried.startswith("experience: rolled back") and "a dry run" in tried
    assert "1 caches, 3 tokens in caches" in tried
    done = call("sleep", folder, "--questions", questions).stdout
    assert done.startswith("experience: committed (commit 2)") and "acquired: " in done
    assert "nothing to do" in call("sleep", folder).stdout
    # Of the weights before.
    late = call("sleep", folder, "--cache", tmp_path / "cache", code=2).output
    assert late.startswith("error: cache") and "version" in late


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1"),
        ('{"prompt": "a"}', "line 1 must have text, and may have prompt, provenance, rejected"),
        ('{"text": "a", "answer": "b"}', "line 1 must have text"),
    ],
)
def test_a_line_that_is_no_experience_is_named(tmp_path, line, message):
    file = tmp_path / "said.jsonl"
    file.write_text(line)
    output = call("add", tmp_path / "memory", "--file", file, "--consent", code=2).output
    assert str(file) in output and message in output and not (tmp_path / "memory").exists()


def test_a_sleep_when_due_says_why_and_asks_no_model(tmp_path, monkeypatch):
    folder, asleep = tmp_path / "memory", []
    monkeypatch.setattr(memories, "_load", lambda *given: pytest.fail("loaded a model"))
    assert "must hold facts" in call("sleep", folder, "--when-due", code=2).output
    assert not folder.exists()
    with FactStore.open(folder, "0" * 64) as store:
        due = ("sleep", folder, "--when-due", "--set", "schedule.idle=0")
        found = call(*due, code=3).stdout
        assert found == "not due: " + f"{folder} is in use\n"
        store.database.execute("INSERT INTO sources VALUES (1, 'key', 'name')")
        store.database.execute(
            "INSERT INTO experiences VALUES (1, 1, 'text', 'waiting', NULL, "
            "'2026-01-01T00:00:00+00:00', 'w', 1, 1, 1, 300, 1, 'b', 's')"
        )
    schedule = tmp_path / "often.yaml"
    schedule.write_text("schedule:\n  tokens: 301\n  pressure: null\n")
    often = (*due, "--options", schedule)
    assert "300 waiting tokens of 301" in call(*often, code=3).stdout
    # What was asked changed nothing of the folder.
    assert not (folder / "memory.json").exists()
    (folder / "model.json").write_text('{"model": "m", "dtype": "auto"}')

    def load(*given):
        asleep.append(given)
        raise ValueError("here a model would be")

    monkeypatch.setattr(memories, "_load", load)
    output = call(*often, "--set", "schedule.tokens=300", code=2).output
    assert output.startswith("due: 300 tokens of experience wait\n") and len(asleep) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "it must be names and values of options"),
        ("schedule: {x: 1}", "options must be those of a memory, got schedule.x"),
        ("schedule: {window: [22:00, 06:00]}", "times of day such as '22:00', got 1320"),
        ("a: [", "line 1"),
    ],
)
def test_a_file_of_options_that_is_none_is_named(tmp_path, text, message):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    output = call("add", tmp_path / "memory", "a", "--options", file, *WITH_MODEL, code=2).output
    assert str(file) in output and message in output and not (tmp_path / "memory").exists()
