"""How far it is from `model.sleep()` to a block: what a newcomer has to open to follow a sleep."""

from __future__ import annotations

import ast
import inspect
import traceback
from pathlib import Path

import torch
from small import small_ids, small_model

import hybrid_sleep
from hybrid_sleep.layers.block import Block
from hybrid_sleep.sleep import algorithm, cache, minimal, report

PACKAGE = Path(hybrid_sleep.__file__).parent


@torch.no_grad()
def test_from_sleep_to_a_block_are_at_most_four_files_and_six_hops(monkeypatch):
    stacks = []
    plain = Block.forward

    def watched(self, *args, **kwargs):
        frames = traceback.extract_stack()
        stacks.append([f for f in frames if PACKAGE in Path(f.filename).parents])
        return plain(self, *args, **kwargs)

    model = small_model(loop=(0, 3))
    cache = model(small_ids(1, 5)).cache
    monkeypatch.setattr(Block, "forward", watched)
    model.sleep(cache, passes=3)
    assert len(stacks) == 7  # two passes of three blocks, and the coda
    for stack in stacks:
        names = [frame.name for frame in stack]
        # As many calls as frames: the last one is that of the block.
        assert names[0] == "sleep" and len(names) <= 6, names
        assert len({frame.filename for frame in stack}) <= 4, stack


def test_algorithm_1_fits_on_two_pages():
    assert len(inspect.getsource(algorithm).splitlines()) <= 120


def test_the_minimal_listing_needs_nothing_of_the_package():
    tree = ast.parse(inspect.getsource(minimal))
    names = [
        name
        for node in ast.walk(tree)
        for name in (
            [node.module or ""] if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else []
        )
    ]  # fmt: skip
    assert {name.partition(".")[0] for name in names} <= {
        "__future__", "collections", "dataclasses", "math", "torch", "typing",
    }  # fmt: skip


def test_the_mechanism_asks_no_state_for_its_type():
    for module in (algorithm, cache, report):
        asked = [
            ast.unparse(node)
            for node in ast.walk(ast.parse(inspect.getsource(module)))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"
        ]
        assert [call for call in asked if "SleepOptions" not in call] == []
