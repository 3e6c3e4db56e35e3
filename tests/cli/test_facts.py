"""The command `facts`, from the first sentence to the last undo, on the small world's model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hybrid_sleep.cli.app import app
from hybrid_sleep.eval.facts.words import RELATIONS
from hybrid_sleep.eval.facts.world import World
from hybrid_sleep.parametric.store import FactStore
from hybrid_sleep.support.io import read_json

CHECKPOINT = Path(__file__).resolve().parents[2] / "eval/facts/checkpoints/seed0"
CHANGES = [
    "layers=[2]",
    *(
        f"{when}.{change}"
        for when in ("wake", "night")
        for change in ("position=prompt_last", "target.clamp=2", "target.kl=0", "reply=object")
    ),
]
WITH_MODEL = [
    "--model",
    CHECKPOINT,
    "--dtype",
    "float32",
    *(x for c in CHANGES for x in ("--set", c)),
]
LIVES = RELATIONS[0]


def call(*words, code=0):
    result = CliRunner().invoke(app, ["facts", *map(str, words)])
    assert result.exit_code == code, result.output
    return result


def refused(*words) -> str:
    """The one line in which a call ends."""
    output = call(*words, code=2).output
    assert output.startswith("error: ") and output.count("\n") == 1, output
    return output


@pytest.fixture(scope="module")
def person() -> str:
    return World(0).unseen_facts(1)[0].subject


@pytest.fixture(autouse=True)
def _text(monkeypatch):
    """What a model would write by itself, in no time."""
    from hybrid_sleep.parametric import workspace

    def rows(model, tokenizer, *tokens, seed, **given):
        lines = World(0).texts("test", seed, count=20)
        return [tokenizer(line)["input_ids"] for line in lines]

    monkeypatch.setattr(workspace, "own_samples", rows)


@pytest.fixture
def relations(tmp_path) -> Path:
    path = tmp_path / "relations.yaml"
    path.write_text(json.dumps([relation.to_dict() for relation in RELATIONS]))
    return path


def test_a_fact_from_the_first_sentence_to_the_undo(tmp_path, relations, person):
    folder, file = tmp_path / "facts", tmp_path / "facts.jsonl"
    sentence = f"{person} lives in Lisbon."
    done = call("learn", folder, sentence, "--relations", relations, *WITH_MODEL)
    assert done.stdout.startswith("wake: committed (commit 1)")
    assert "1 facts, 1 new" in done.stdout
    assert read_json(folder / "model.json") == {"model": str(CHECKPOINT), "dtype": "float32"}

    question = LIVES.questions[0].replace("{}", person)
    assert "Lisbon" in call("ask", folder, question).stdout
    assert "1 active" in (text := call("status", folder).stdout)
    assert str(CHECKPOINT) in text and "layers of the edits: 2" in text
    text = call("explain", folder, person.upper()).stdout
    assert f"from: {sentence}" in text and "commit 1, wake" in text and "today" not in text
    assert "edit of commit 1 at model.layers.2" in text
    assert "today: statement 0 yes" in call("explain", folder, person, "--today").stdout
    assert call("nap", folder).stdout.startswith("nap: nothing to do")
    # The words of a relation are known by now, to what reads another sentence as well.
    done = call("learn", folder, f"The home of {person} is in Lisbon.")
    assert "nothing to do" in done.stdout

    call("export", folder, "--out", file)
    assert call("export", folder).stdout == file.read_text()
    other = tmp_path / "other"
    assert "1 facts are known" in call("import", other, file, *WITH_MODEL).stdout
    assert "1 pending" in call("status", other).stdout

    assert call("forget", folder, person, "--relation", LIVES.name).stdout.startswith("forget: com")
    assert "1 retired" in call("status", folder).stdout
    assert "got" in refused("forget", folder, person)
    assert "commit 3 was taken back" in call("undo", folder).stdout.replace("commit 2", "commit 3")
    assert "1 active" in call("status", folder).stdout
    assert "Lisbon" in call("ask", folder, question).stdout


def test_a_night_and_the_model_that_it_leaves(tmp_path, relations, person):
    from transformers import AutoModelForCausalLM

    folder, file, out = tmp_path / "facts", tmp_path / "sentences.txt", tmp_path / "model"
    file.write_text(f"{person} lives in Lisbon.\n\n{person} works as a baker.\n")
    call("learn", folder, "--file", file, "--relations", relations, *WITH_MODEL)
    assert "2 active" in call("status", folder).stdout
    # What no sleep can pass.
    done = call("sleep", folder, "--set", "thresholds.recall=1", "--set", "strengths=[1]",
                "--set", "thresholds.perplexity_ratio=1")  # fmt: skip
    assert done.stdout.startswith("sleep: ")
    rolled_back = done.stdout.startswith("sleep: rolled back")
    assert ("the weights are what they were" in done.stdout) == rolled_back
    call("save", folder, out)
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "hybrid_sleep"
    assert "OUT must be" in refused("save", folder, out)


def test_what_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    from hybrid_sleep.cli import memories

    monkeypatch.setattr(memories, "_load", lambda *given: pytest.fail("loaded a model"))
    folder = tmp_path / "facts"
    assert "--model must be given" in refused("learn", folder, "Ada Byron lives in Lisbon.")
    assert "SENTENCE or --file" in refused("learn", folder, *WITH_MODEL)
    assert "facts must read" in refused("learn", folder, "no fact", *WITH_MODEL)
    both = ("Ada Byron lives in Lisbon.", "Ada Byron lives in Riga.")
    assert "must not contradict" in refused("learn", folder, *both, *WITH_MODEL)
    fact = ("learn", folder, both[0], "--model", CHECKPOINT)
    for change in ("nonsense=1", "wake=1", "wake.target.x=1", "wake.weight=-1", "layers=[2", "cap"):
        refused(*fact, "--set", change)
    for command in ("status", "export", "nap", "sleep", "undo"):
        refused(command, folder)
    refused("explain", folder, "Ada Byron")
    broken = tmp_path / "broken"
    broken.write_text("Ada Byron lives in Lisbon.\nno fact\n")
    assert "broken, line 2: facts must read" in refused(*fact[:2], "--file", broken)
    broken.write_text('{"subject": "Ada"}\n')
    assert "line 1" in refused(*fact[:2], "--file", broken)
    assert "line 1" in refused("import", folder, broken)
    for text in ("lives in: {}", "[{name: lives in}]", "[{name: lives in, statements: [a], x: 1}]"):
        broken.write_text(text)
        assert "broken is damaged" in refused(*fact, "--relations", broken)
    assert not folder.exists()


def test_what_cannot_be_loaded(tmp_path):
    fact = ("learn", tmp_path / "facts", "Ada Byron lives in Lisbon.")
    assert "model must be a causal one" in refused(*fact, "--model", tmp_path / "none")
    assert "model must be a causal one" in refused(*fact, "--model", tmp_path)
    for name, value in (("dtype", "float31"), ("device", "abacus")):
        assert f"{name} must be" in refused(*fact, "--model", CHECKPOINT, f"--{name}", value)
    assert not (tmp_path / "facts").exists()


def test_one_writer_at_a_time(tmp_path, monkeypatch):
    from hybrid_sleep.cli import memories

    folder = tmp_path / "facts"
    with FactStore.open(folder, "0" * 64):
        monkeypatch.setattr(memories, "_load", lambda *given: pytest.fail("loaded a model"))
        fact = ("learn", folder, "Ada Byron lives in Lisbon.", "--model", CHECKPOINT)
        assert "is being written into" in refused(*fact)
        assert call("status", folder).stdout.startswith("facts: none")
        assert call("export", folder).stdout == ""
    monkeypatch.undo()
    assert "model must have the weights" in refused(*fact, "--dtype", "float32")
    assert not (folder / "model.json").exists()
