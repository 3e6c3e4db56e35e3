"""Methods of continual learning: the same rows for all, and what each adds to plain training."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace

import pytest
import torch

from hybrid_sleep.eval.continual import bench, methods
from hybrid_sleep.eval.continual.automata import BEGIN, RuleStream
from hybrid_sleep.eval.continual.bench import ContinualResult, ContinualRow, measure_row, new_model
from hybrid_sleep.eval.continual.methods import METHODS, Training
from hybrid_sleep.eval.render import continual as shown
from hybrid_sleep.parametric.lessons import lesson_loss, taught
from hybrid_sleep.support.provenance import provenance

STREAM = RuleStream((110, 30), width=4)
FEW = Training(steps=2, rows=8, measured=4)


def learned(name, training=FEW, tasks=2, monkeypatch=None, seen=None, stream=STREAM):
    model = new_model(stream, 0)
    method = METHODS[name](model, stream, training, 0)
    if seen is not None:
        plain = methods.fit

        def noted(model, batches, **how):
            kept = []

            def passed():
                for batch in batches:
                    kept.append(batch)
                    yield batch

            done = plain(model, passed(), **how)
            seen.append(kept)
            return done

        monkeypatch.setattr(methods, "fit", noted)
    for task in range(tasks):
        method.learn(task)
    return model


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(bits(a).values(), bits(b).values(), strict=True))


def test_nothing_learned_changes_no_bit_and_ewc_without_strength_is_plain_training():
    assert same(learned("none"), new_model(STREAM, 0))
    assert same(learned("in-context"), new_model(STREAM, 0))
    plain = learned("fine-tuning")
    assert same(learned("ewc", replace(FEW, strength=0.0)), plain)
    assert not same(learned("ewc", replace(FEW, strength=1e4)), plain)
    # The first task has nothing to protect.
    assert same(learned("ewc", replace(FEW, strength=1e4), 1), learned("fine-tuning", tasks=1))
    assert same(learned("replay", tasks=1), learned("fine-tuning", tasks=1))


def test_replay_has_rows_of_earlier_tasks_in_its_share(monkeypatch):
    seen = []
    learned("replay", monkeypatch=monkeypatch, seen=seen)
    for batch in seen[1]:
        assert sorted(batch["input_ids"][:, 1].tolist()) == [4, 4, 5, 5, 5, 5, 5, 5]


def test_a_sleep_is_taught_by_a_copy_that_learned_and_by_what_it_was(monkeypatch):
    seen = []
    learned("sleep", monkeypatch=monkeypatch, seen=seen)
    # Of each task: the copy's training, then the model's.
    assert len(seen) == 4
    lessons = [x for batch in seen[3] for x in batch["lessons"]]
    recent = [x for x in lessons if x.part == "recent"]
    own = [x for x in lessons if x.part == "foundation"]
    assert (len(recent), len(own)) == (12, 4) and all(x.ids[0] == BEGIN for x in own)
    assert all(x.ids[1] == 5 for x in recent)
    first = [x for batch in seen[1] for x in batch["lessons"]]
    assert {x.part for x in first} == {"recent"} and len(first) == 16
    # The own samples are of the model before: a teacher that it agrees with at first.
    before = learned("sleep", tasks=1)

    part = [copy.copy(x) for x in own[:2]]
    again = taught(before, part)
    assert all(
        torch.allclose(a.teacher, b.teacher, atol=1e-5) for a, b in zip(part, again, strict=True)
    )
    assert abs(float(lesson_loss(before, part).detach())) < 1e-6


def test_joint_training_sees_all_tasks_for_as_many_steps(monkeypatch):
    seen = []
    learned("joint", monkeypatch=monkeypatch, seen=seen)
    assert [len(part) for part in seen] == [2, 4]
    tags = torch.cat([batch["input_ids"][:, 1] for batch in seen[1]])
    assert set(tags.tolist()) == {4, 5} and len(tags) == 32


class Noted(RuleStream):
    """Says which rows it was asked for."""

    def batch(self, task, count, source, *, progress=1.0, after=None):
        self.__dict__.setdefault("asked", []).append((task, count, progress, after))
        return super().batch(task, count, source)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("fine-tuning", [(task, 8, at, None) for task in (0, 1) for at in (0.0, 0.5)]),
        # Stored rows are of the whole task, true or not.
        (
            "replay",
            [(0, 8, 0.0, None), (0, 8, 0.5, None)]
            + [x for at in (0.0, 0.5) for x in ((1, 6, at, None), (0, 2, None, None))],
        ),
        # What is protected is what holds behind the task.
        ("ewc", [(0, 8, 0.0, None), (0, 8, 0.5, None), (0, 4, 1.0, None)]),
        # The copy, then the model, then what is protected.
        ("compress", 2 * [(0, 8, 0.0, None), (0, 8, 0.5, None)] + [(0, 4, 1.0, None)]),
        ("joint", 2 * [(0, 8, 1.0, 1)] + 4 * [(0, 8, 1.0, 2), (1, 8, 1.0, 2)]),
    ],
)
def test_rows_come_in_the_order_of_their_task_and_joint_training_gets_what_is_true(name, asked):
    stream = Noted((110, 30), width=4)
    learned(name, stream=stream)
    assert stream.asked[: len(asked)] == asked


class Padded(RuleStream):
    """Rows of half the rings, behind which two pads stand, and one behind the others."""

    pad = 7

    @property
    def vocab_size(self):
        return 8

    @property
    def length(self):
        return super().length + 2

    def batch(self, task, count, source, *, progress=1.0, after=None):
        rows = super().batch(task, count, source)
        short = torch.cat((rows[::2], torch.full((len(rows[::2]), 2), 7)), dim=1)
        long = torch.cat((rows[1::2], torch.full((len(rows[1::2]), 2), 7)), dim=1)
        long[:, -2] = 0
        return torch.stack((short, long), dim=1).flatten(0, 1)


def test_what_stands_behind_the_end_of_a_row_is_not_learned(monkeypatch):
    stream, seen, measured = Padded((110, 30), width=4), [], []
    method = METHODS["sleep"](new_model(stream, 0), stream, FEW, 0)
    measure = method.guard.measure
    monkeypatch.setattr(
        method.guard, "measure", lambda rows, **how: measured.append(rows) or measure(rows, **how)
    )
    plain = methods.fit

    def noted(model, batches, **how):
        kept = []
        done = plain(model, (kept.append(b) or b for b in batches), **how)
        seen.append(kept)
        return done

    monkeypatch.setattr(methods, "fit", noted)
    method.learn(0)
    method.learn(1)
    # Short rows have 11 tokens and an end, long ones 12.
    labels = torch.cat([batch["labels"] for batch in seen[0]])
    assert (labels != -100).sum(dim=1).tolist() == [12, 13] * 8
    assert (labels == 7).sum(dim=1).tolist() == [1] * 16
    lessons = [x for batch in seen[3] for x in batch["lessons"]]
    ids = [x.ids for x in lessons if x.part == "recent"] + list(map(tuple, measured[1]))
    assert {len(x) for x in ids} == {12, 13} and all(x.index(7) == len(x) - 1 for x in ids)
    # What the model itself writes ends at its first pad as well.
    own = [x.ids for x in lessons if x.part == "foundation"]
    assert any(7 in x for x in own) and all(7 not in x[:-1] for x in own)
    assert all(len(x) == 13 for x in own if 7 not in x)
    trained = sum(len(x.ids) for part in seen[1::2] for b in part for x in b["lessons"])
    assert method.tokens == 2 * int((labels != -100).sum()) + trained
    context = METHODS["in-context"](new_model(stream, 0), stream, FEW, 0).context(0)
    assert context.count(7) == 4 and len(context) == 2 * 12 + 2 * 13


def test_a_row_of_the_result_is_the_same_again_and_is_shown(tmp_path):
    key = {"method": "fine-tuning", "seed": 1, "settings": asdict(FEW)}
    one, two = measure_row(key, STREAM), measure_row(key, STREAM)
    assert one["matrix"] == two["matrix"] and len(one["matrix"]) == 3
    assert one["tokens"] == 2 * FEW.steps * FEW.rows * STREAM.length
    assert [len(x) for x in one["during"]] == [2, 2]


def result(matrices):
    return ContinualResult(
        stream="rules",
        tasks=STREAM.tasks,
        measured=STREAM.measured,
        about=STREAM.about,
        provenance=provenance("cpu"),
        rows=[
            ContinualRow(
                method=name, seed=seed, stream="rules", stream_settings=STREAM.settings,
                settings=asdict(FEW), matrix=matrix, apart=[{}] * 3,
                during=[[[0.5, 0.0]], [[lowest, 0.1]]], floors=[0.1, 0.2], tokens=100, seconds=1.0,
            )
            for name, seed, matrix, lowest in matrices
        ],
    )  # fmt: skip


def test_the_table_says_how_far_a_sleep_goes():
    found = result(
        [
            ("fine-tuning", 0, [[0.0, 0.0], [0.9, 0.0], [0.1, 0.8]], 0.05),
            ("sleep", 0, [[0.0, 0.0], [0.9, 0.0], [0.7, 0.8]], 0.4),
            ("sleep", 1, [[0.0, 0.0], [0.7, 0.2], [0.5, 0.6]], 0.3),
            ("joint", 0, [[0.0, 0.0], [0.9, 0.0], [0.9, 0.9]], 0.6),
        ]
    )
    text = shown.markdown(found)
    lines = [line for line in text.splitlines() if "sleep: distillation" in line]
    # Average of (.75, .55), learning of (.85, .65), transfer -.2 twice, FWT of 0 and .2 above .2.
    assert lines[0].split("|")[2:6] == [
        " 0.650 (0.550 to 0.750) ", " 0.750 (0.650 to 0.850) ", " -0.200 ",
        " -0.100 (-0.200 to 0.000) ",
    ]  # fmt: skip
    # From -.8 to 0, -.2 is three quarters of the way.
    assert "goes 75 % of the way" in text
    assert lines[0].split("|")[8] == " 0.350 (0.300 to 0.400) "
    assert shown.figure(found).axes


def test_many_tasks_have_a_line_each_and_no_two_lines_are_empty():
    names = [f"intents {i}" for i in range(6)]
    matrix = [[round(0.1 * i * (j < i), 2) for j in range(6)] for i in range(7)]
    row = ContinualRow(
        method="ewc", seed=0, stream="x", stream_settings={}, settings=asdict(FEW), matrix=matrix,
        during=[[]] * 6, apart=[{"told": None, "held": x / 10} for x in range(7)],
        floors=[0.0] * 6, tokens=1234, seconds=2.0,
    )  # fmt: skip
    given = {"stream": "x", "tasks": names, "measured": "all", "about": "Six.", "rows": [row]}
    found = ContinualResult(**given, provenance=provenance("cpu"))
    text = shown.markdown(found)
    assert "| intents 1 | 0.200 to 0.600 |" in text and "| EWC | 1,234 | 2 |" in text
    assert "| at the end | told | held |" in text and "| EWC | - | 0.600 |" in text
    assert "share of all;" in text and "Six. Floors: 0.000" in text and "\n\n\n" not in text
    assert shown.figure(found).axes
    assert ContinualResult.from_content(found.content()) == found


def test_a_run_goes_on_where_it_was(tmp_path, monkeypatch):
    made = []

    def scripted(key, stream):
        made.append(key["method"])
        return {
            "matrix": [[0.0, 0.0], [1.0, 0.0], [0.5, 1.0]], "during": [[], []],
            "apart": [{}, {}, {}], "floors": [0.1, 0.1], "tokens": 1, "seconds": 0.0,
        }  # fmt: skip

    monkeypatch.setattr(bench, "measure_row", scripted)
    given = {"seeds": (0,), "out": tmp_path}
    bench.run(STREAM, methods=("none", "ewc"), **given)
    found = bench.run(STREAM, methods=("none", "ewc", "joint"), **given)
    assert made == ["none", "ewc", "joint"]
    assert [row.method for row in found.rows] == made
    with pytest.raises(ValueError, match="methods must be one of"):
        bench.run(STREAM, methods=("luck",), **given)
    with pytest.raises(ValueError, match=r"stream must be of at least 2 tasks, got \['rule 110'\]"):
        bench.run(RuleStream((110,)), **given)
