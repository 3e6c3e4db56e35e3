"""The command `experience`: what is kept, slept over and erased, on the small world's model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hybrid_sleep import SleepCache
from hybrid_sleep.cli.app import app
from hybrid_sleep.eval.facts.world import World, load_world

CHECKPOINT = Path(__file__).resolve().parents[2] / "eval/facts/checkpoints/seed0"
STUDY = (
    "study.dreams=0", "study.shares.recent=1.0", "study.shares.dream=0.0",
    "study.shares.foundation=0.0", "study.tokens=200", "study.foundation=64", "study.rate=1e-3",
    "study.band=[0,100]", "study.share=1.0", "study.measured=2", "study.erase=true",
    "thresholds.locality=null", "thresholds.perplexity_ratio=null",
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
