"""SIGKILL between any two writes of learning and sleeping loses no fact; weights and store fit."""

from __future__ import annotations

import copy
import os
import signal

import pytest
from memories import bits, options, same

from hybrid_sleep.parametric import durable
from hybrid_sleep.parametric.facts import Fact


def steps(small):
    first, second = small.unseen_facts(2, 3)
    changed = Fact(first.subject, first.relation, second.object)
    return (
        (lambda m: m.learn(first), {str(first)}),
        (lambda m: m.learn(second), {str(first), str(second)}),
        (lambda m: m.learn(changed), {str(changed), str(second)}),
        (lambda m: m.sleep(), {str(changed), str(second)}),
        (lambda m: m.forget(second.subject), {str(changed)}),
        (lambda m: m.undo(), {str(changed), str(second)}),
    )


@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_write_loses_no_fact(world, opened, tmp_path, monkeypatch, stride):
    work = steps(world[2])
    passed: list[str] = []

    def run(folder, note=lambda step: None):
        with opened(copy.deepcopy(world[0]), folder) as memory:
            for number, (step, _) in enumerate(work):
                step(memory)
                note(number)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "reached", passed.append)
        run(tmp_path / "whole")
    assert {"after facts", "within pristine.safetensors", "before commit", "after undo"} <= {
        *passed
    }
    for last in range(0, len(passed), stride):
        folder, progress = tmp_path / f"{last}", tmp_path / f"{last}.steps"
        child = os.fork()
        if child == 0:
            try:
                left = [last]

                def reached(point, left=left):
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

                durable.reached = reached
                run(folder, lambda step, progress=progress: progress.write_text(f"{step}"))
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        done = int(progress.read_text()) if progress.exists() else -1
        model = copy.deepcopy(world[0])
        # Opening compares the weights that the folder gives with the digest of its last commit.
        with opened(model, folder, options=None if done >= 0 else options()) as memory:
            kept = {str(x.fact) for x in memory.facts() if x.state != "retired"}
            allowed = [work[done][1] if done >= 0 else set()]
            if done + 1 < len(work):
                allowed += [work[done + 1][1], allowed[0] | work[done + 1][1]]
            assert kept in allowed, (passed[last], done)
            before = bits(model)
            again = copy.deepcopy(world[0])
            memory.close()
            with opened(again, folder, options=None if done >= 0 else options()):
                assert same(before, bits(again))


@pytest.fixture(autouse=True)
def one_thread():
    """A forked process has one thread, whatever its parent had."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
