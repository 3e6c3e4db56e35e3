"""Tasks stay the same token for token, and below what trains and evaluates models on them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest

from hybrid_sleep.eval import tasks

# Of 8 examples of both splits and two seeds each, with their `meta`.
DIGESTS = {
    ("ancestor", '{}'): "4600d837a968529f",
    ("ancestor", '{"order": "random", "nodes": 40, "windows": 2}'): "743afef38d9d5807",
    ("automaton", '{}'): "31fba8c60e842fe6",
    ("automaton", '{"rules": [30, 110], "steps": [0, 7], "windows": 2}'): "530339d4aed8734f",
    ("circuit", '{}'): "216ea9902d1545f4",
    ("circuit", '{"order": "random", "wires": 3, "asked": [2, 5]}'): "b4f7c314936f8e10",
    ("depo", "{}"): "33c7cc17f6cd32dc",
    ("depo", '{"variant": "depo1", "nodes": 20}'): "b37f042e29cc8458",
    ("gsm_infinite", '{"d": 3}'): "a0a8d9957142f7e6",
    ("gsm_infinite", '{"length": 900, "windows": 3, "noise": false}'): "099e5c19bcf17763",
    ("gsm_symbolic", "{}"): "7e9d9d11712cf77b",
    ("mqar", '{"pairs": [2, 4], "length": 64}'): "fb1fb3df1e0bc480",
    ("parity", "{}"): "19cb1d1882114a30",
    ("rule110", '{"width": 5, "states": 2, "steps": [0, 2, 4]}'): "8822e0cfe3c8c33a",
    ("word_problem", '{"group": "A5", "layout": "tagging", "windows": 2}'): "5b37607ed26ff54b",
    ("word_problem", "{}"): "48015015d3f0ae81",
}


@pytest.mark.parametrize("name, params", DIGESTS)
def test_draws_are_golden(name, params):
    """Published numbers and checkpoints hold for these very tokens."""
    task, digest = tasks.load(name, **json.loads(params)), hashlib.sha256()
    for split in tasks.SPLITS:
        for seed in (0, 7):
            for example in task.examples(split, seed, 8):
                digest.update(json.dumps(example, sort_keys=True).encode())
    assert digest.hexdigest()[:16] == DIGESTS[name, params]


def test_tasks_import_nothing_that_imports_them():
    """In a fresh process, every module of eval/tasks: no training, and nothing else of eval."""
    program = """
import importlib, pkgutil, sys
from hybrid_sleep.eval import tasks
for module in pkgutil.walk_packages(tasks.__path__, tasks.__name__ + "."):
    importlib.import_module(module.name)
task = tasks.load("gsm_infinite")
task.batch("test", 0, 1)
task.describe(*task.examples("test", 0, 1))
print(*(name for name in sys.modules if name.startswith("hybrid_sleep.")))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = [name.removeprefix("hybrid_sleep.") for name in done.stdout.split()]
    assert "eval.tasks.gsm_infinite.problems" in loaded
    own = [name for name in loaded if f"{name}.".startswith("eval.tasks.") or name == "eval"]
    higher = [name for name in loaded if name.split(".")[0] in ("training", "eval", "cli")]
    assert higher == own
