"""What README.md and CONTRIBUTING.md show exists and runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/training.md", "docs/evaluation.md")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = HybridSleepConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        linear_num_key_heads=1,
        linear_num_value_heads=1,
        linear_key_head_dim=4,
        linear_value_head_dim=4,
        window=24,
    )
    HybridSleepForCausalLM(config).save_pretrained("out/demo-seed0/training")
    names = {}
    (snippet,) = blocks("python")
    exec(compile(snippet, "README.md", "exec"), names)
    # 40 tokens of prompt and 99 of the 100 new ones are read: five full windows of 24, which sleep
    # by themselves, and 19 tokens, which are told to.
    slept = [report.tokens for report in names["out"].cache.reports]
    assert slept[:5] == [24] * 5
    assert names["report"].tokens == 19 and names["report"].passes == 4
    # The last turn reads 5 + 19 tokens into a new window, which nothing more makes sleep.
    assert names["cache"].counts.tolist() == [24]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            place = (ROOT / document).parent / path
            assert place.exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.*)$", place.read_text(), re.MULTILINE)
                assert anchor in {h.lower().replace(" ", "-") for h in headings}, target


def test_tree_of_the_readme_names_what_exists():
    (tree,) = [block for block in blocks("") if block.startswith("hybrid_sleep/")]
    top = None
    for line in tree.splitlines():
        entries = re.match(r"\s*(\S+(?: \S+\.py)*)  ", line).group(1).split()
        if not line.startswith(" "):
            top = ROOT / entries[0]
            assert top.is_dir(), line
        else:
            assert all((top / entry).exists() for entry in entries), line


def test_make_targets_that_are_named_exist():
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set()
    for document in DOCUMENTS:
        named |= set(re.findall(r"\bmake ([a-z-]+)\b", (ROOT / document).read_text()))
    assert named and named <= rules


def test_gate_is_the_whole_of_make_test():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    commands = [line for line in script.read_text().splitlines() if "make" in line]
    assert commands == ["exec make test"]
