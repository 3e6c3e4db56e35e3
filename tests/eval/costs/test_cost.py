"""The cost benchmark: what is compared, FLOPs by hand, verdicts about cycles, files."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from small import TINY, assert_same, gap, small_ids, small_model, snapshot
from torch import nn

from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM, SleepCache
from hybrid_sleep.eval import results, tasks
from hybrid_sleep.eval.costs import call as calls
from hybrid_sleep.eval.costs import cost, keeping, questions
from hybrid_sleep.eval.costs.break_even import Verdict
from hybrid_sleep.eval.costs.call import Call
from hybrid_sleep.eval.measure import flops
from hybrid_sleep.eval.render import cost as pages
from hybrid_sleep.support.plots import save_figure
from hybrid_sleep.training.config import run_config

SIZES = {"hidden": 16, "layers": 2, "window": 8, "head_dim": 8, "vocabulary": 16}
DEPO = {"nodes": 5, "hops": 3, "queries": 2, "alphabet": 12, "longest": 2}


def folder_of(path, task, **model):
    """What training would leave behind, with random weights."""
    run = run_config(
        {
            "model": {**TINY, **model},
            "task": task,
            "train": {"steps": 1, "batch_size": 2, "lr_muon": 0.02, "lr_adamw": 0.003},
            "sleep_passes": {"uniform": [1, 3]},
            "output_dir": str(path),
        }
    )
    made = small_model(HybridSleepConfig(**run.model), dtype=torch.float32)
    made.save_pretrained(path)
    (path / "run.yaml").write_text(run.to_yaml())
    return path


@pytest.fixture(scope="module")
def trained_on_depo(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("depo"), {"name": "depo", "params": DEPO})


@pytest.fixture(scope="module")
def measured(tmp_path_factory, trained_on_depo):
    out = tmp_path_factory.mktemp("cost")
    result = cost.run(
        Call(repeats=2, out=out, command="hybrid-sleep bench cost"),
        sizes=SIZES, depo=trained_on_depo, depths=(2, 1), windows=(3, 1), cycles=3,
    )  # fmt: skip
    return SimpleNamespace(out=out, result=result, rows=result.rows)


def run(repeats=2, device="cpu", minutes=None, out=None, **given):
    return cost.run(Call(repeats=repeats, device=device, minutes=minutes, out=out), **given)


def test_a_keeper_sees_all_of_the_past_with_the_same_weights():
    for changes in ({}, {"eviction": "sliding", "loop": (1, 3)}, {"state_space": "mamba2"}):
        model = small_model(window=4, **changes)
        keeper = keeping.keeper_of(model, 20)
        theirs = dict(model.named_parameters())
        assert all(x.data_ptr() == theirs[n].data_ptr() for n, x in keeper.named_parameters())
        assert model.config.window == 4
        config = copy.deepcopy(model.config)
        config.window, config.eviction = 1000, "hard"
        whole = HybridSleepForCausalLM(config).double().eval()
        whole.load_state_dict(model.state_dict())
        ids = small_ids(1, 17)
        with torch.no_grad():
            wanted = whole(ids).logits
            cache = keeping.KeepingCache(keeper.config)
            for part in (ids[:, :9], ids[:, 9:10], ids[:, 10:16]):
                out = keeper(part, cache=cache)
            twin = cache.copy()
            out = keeper(ids[:, 16:], cache=cache)
            assert gap(out.logits[:, 0], wanted[:, 16]) <= 1e-10
            # The copy went its own way, and holds no hidden states.
            assert int(twin.counts) == 16 and isinstance(twin, keeping.KeepingCache)
        hidden = 8 * 17 * 12
        reference = SleepCache(config)
        whole(ids, cache=reference)
        assert cache.nbytes() == reference.nbytes() - hidden
        assert sum(x.nbytes for x in keeping.appended(twin)) == 17 * flops.kv_bytes(config, 8)


def test_what_is_compared_is_what_it_is_called():
    model = small_model(window=4, dtype=torch.float32)
    ids = small_ids(1, 12)
    with torch.no_grad():
        cache = SleepCache(model.config)
        for start in (0, 4, 8):
            model(ids[:, start : start + 4], cache=cache)
            model.sleep(cache, 3)
        # The columns of one forward pass are counted alike, its reports are not.
        assert_same(snapshot(cache), snapshot(keeping.consolidated(model, ids, 3)))
        assert int(keeping.consolidated(model, ids, 1).sleeps) == 3


def by_hand(model, tokens, pairs):
    """FLOPs of a forward pass with one token's logits: each weight is used once a token, each
    visible pair twice a head, and a token reads, writes and reads `S: [H, K, V]`."""
    config = model.config
    weights = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, nn.Linear))
    state = 2 * config.linear_num_value_heads * config.linear_key_head_dim
    kinds = Counter(config.layer_types)
    return (
        2 * tokens * weights
        + kinds["full_attention"] * 4 * pairs * config.num_attention_heads * config.head_dim
        + kinds["linear_attention"] * tokens * 3 * state * config.linear_value_head_dim
        + 2 * config.hidden_size * config.vocab_size
    )


@pytest.mark.parametrize(
    ("eviction", "asked", "answered"),
    [
        # A question of 2 tokens sees 1 + 2, an answer of 2 the question, itself and each other.
        ("hard", 1 + 2, (3, 4)),
        # With 3 tokens held there are always more than a window of 4.
        ("sliding", 4 + 4, (4, 4)),
    ],
)
def test_flops_of_questions_by_hand(eviction, asked, answered):
    model = small_model(window=4, eviction=eviction, dtype=torch.float32)
    bench = cost.Bench(model, 2, 2, 2)
    for windows in (1, 3):
        past = 4 * windows
        counted = bench._flops(past, [2], keeping.keeper_of(model, past + 4).config)
        assert counted["ask"] == by_hand(model, 2, asked)
        assert counted["token"]["slept"] == sum(by_hand(model, 1, n) for n in answered) / 2
        # With everything kept a token sees all that was before it.
        assert counted["ask_kept"] == by_hand(model, 2, 2 * past + 3)
        kept = [by_hand(model, 1, past + n) for n in (3, 4)]
        assert counted["token"]["kept"] == sum(kept) / 2
        assert counted["read_kept"] == by_hand(model, past, past * (past + 1) // 2)


def test_a_window_of_two_tokens_can_be_measured():
    result = run(sizes={**SIZES, "window": 2}, depths=(1,), windows=(2,))
    assert (result.question, result.answer) == (1, 1)
    assert [len(times) for times in result.rows[0].ratio.values()] == [2, 2, 2]


def test_a_question_as_the_task_itself_reads_it():
    for params in (DEPO, {"variant": "depo2", "nodes": 4, "hops": 6}):
        task = tasks.load("depo", **params)
        for example in task.examples("test", 3, 4):
            context = example["input_ids"][: task.context]
            edges = task.parse(example["input_ids"])["edges"]
            found = questions.questions_of(task, edges)
            ring = [edges[0][0]]
            while len(ring) < task.nodes:
                ring += [after for before, after in edges if before == ring[-1]]
            wanted = {
                (hops, ring[i], (ring * 9)[i + hops])
                for i in range(task.nodes)
                for hops in task.test_hops
            }
            read = [task.parse(context + q.tokens + q.answer)["queries"] for q in found]
            assert all(len(queries) == 1 for queries in read)
            assert {queries[0] for queries in read} == wanted and len(found) == len(wanted)
            assert [queries[0][0] for queries in read] == [q.hops for q in found]


def test_saved_fast_weights_answer_as_one_forward_does(measured, trained_on_depo):
    task = tasks.load("depo", **DEPO)
    model = HybridSleepForCausalLM.from_pretrained(trained_on_depo).eval()
    rows = {row.passes: row for row in measured.result.rows_of(questions.DepoRow)}
    assert list(rows) == [1, 2]
    for passes, row in rows.items():
        right, asking = {hops: [] for hops in task.test_hops}, []
        for ids in task.batch("test", 0, 3)["input_ids"].tolist():
            follows = dict(task.parse(ids)["edges"])
            for start, hops in itertools.product(follows, task.test_hops):
                end = start
                for _ in range(hops):
                    end = follows[end]
                asked = [task.asked + hops, *start, task.answer]
                whole = torch.tensor([ids[: task.context] + asked + list(end)])
                chosen = model(whole, sleep_passes=passes).logits[0].argmax(-1).tolist()
                right[hops].append(chosen[-len(end) - 1 : -1] == list(end))
                # All but the last letter is read, and all letters are predicted.
                asking.append(
                    flops.pass_flops(model.config, len(asked) + len(end) - 1)
                    + flops.logit_flops(model.config, len(end))
                )
        every = [answer for hops in task.test_hops for answer in right[hops]]
        assert row.questions == row.identical == len(every) == 3 * 5 * 3
        assert row.logit_difference <= 1e-5
        assert row.accuracy == pytest.approx(sum(every) / len(every))
        for hops, answers in right.items():
            assert row.by_hops[hops] == pytest.approx(sum(answers) / len(answers))
        low, high = row.interval
        assert 0 <= low <= row.accuracy <= high <= 1
        counted = row.flops
        assert counted.each["saved"] == pytest.approx(sum(asking) / len(asking))
        # Recomputing is prefill and question; only the logits behind the cycle are not needed.
        unneeded = flops.logit_flops(model.config)
        again = counted.once["saved"] - unneeded + counted.each["saved"]
        assert counted.each["recomputed"] == pytest.approx(again, abs=1e-3)
        assert counted.break_even("recomputed") == Verdict("from", 2)
        assert row.bytes["saved"] == model.config.fast_weight_bytes < row.file.bytes
        kept = row.bytes["kept"] - flops.kv_bytes(model.config) * task.context
        assert kept == flops.cache_bytes(model.config, 1) - flops.kv_bytes(model.config) - 4 * 16


def test_verdicts_about_cycles_by_hand():
    read = ((30.0, 10.0), (36.0, 10.0), (33.0, 1.0))
    once = [{"saved": saved, "kept": kept} for saved, kept in read]
    each = {"saved": 2.0, "kept": 6.0, "recomputed": 32.0, "recomputed_n1": 12.0}
    found = questions.break_evens(once, [each, each, {**each, "recomputed_n1": 1.0}])
    # At first 20, 26 and 32 more, 4 less a question.
    assert found["kept"] == Verdict("from", 7, {"from": 3}, quartiles=[6.0, 7.5], range=[5, 8])
    assert (found["recomputed"].questions, found["recomputed"].range) == (2, [1, 2])
    # 30 / 10, 36 / 10 and never.
    at_n1 = found["recomputed_n1"]
    assert (at_n1.questions, at_n1.range) == (4, [3, 4])
    assert at_n1.kinds == {"from": 2, "never": 1}
    assert questions.break_evens(once[:1], [each])["kept"].kinds is None


def test_rows_of_a_small_model(measured):
    result, config = measured.result, HybridSleepConfig(**measured.result.model.config)
    kinds = [
        (row.what, row.windows if row.what == "decode" else row.passes) for row in result.rows
    ]
    assert kinds == [("sleep", 2), ("decode", 1), ("decode", 3), ("depo", 1), ("depo", 2)]
    assert (result.question, result.answer) == (2, 2)
    assert result.complete and result.depo.floor == 1 / 4
    for row in result.rows_of(cost.DecodeRow):
        past = row.past = 8 * row.windows
        held = row.bytes
        assert held["saved"] == config.fast_weight_bytes
        assert held["window"] + held["saved"] == flops.cache_bytes(config, 8, slept=True)
        assert held["kept"] == flops.cache_bytes(config, past) - 4 * 16 * past
        assert all(len(times) == 2 for times in row.seconds.token.values())
        assert list(row.seconds.read) == list(row.flops.read) == [1, 2]


def test_rows_that_are_there_are_not_measured_again(measured, tmp_path, monkeypatch):
    asked = []

    def note(_, key):
        asked.append((key["what"], key.get("passes", key.get("windows"))))
        raise KeyboardInterrupt

    monkeypatch.setattr(cost.Bench, "sleep", note)
    monkeypatch.setattr(cost.Bench, "decode", note)
    monkeypatch.setattr(calls, "provenance", lambda device: measured.result.provenance)
    before = (measured.out / "results.json").read_text()

    def rows_after(**changes):
        (tmp_path / "results.json").write_text(before)
        same = {"sizes": SIZES, "depths": (1, 2), "windows": (1, 3)}
        return run(**{**same, **changes}, out=tmp_path).rows

    assert rows_after() == measured.rows[:3] and not asked
    rows_after(windows=(1, 5))
    assert asked == [("decode", 5)]
    # Other depths behind a past, another answer: other rows.
    for changes in ({"depths": (2, 3)}, {"answer": 1}):
        asked.clear()
        assert rows_after(**changes)[0].what == "sleep"
        assert asked[0][0] == ("sleep" if "depths" in changes else "decode")
    # Another model, or another question: all rows.
    shorter = {"sizes": {**SIZES, "window": 4}, "question": 2, "answer": 2}
    for changes in (shorter, {"sizes": {**SIZES, "hidden": 32}}):
        asked.clear()
        with pytest.raises(KeyboardInterrupt):
            rows_after(**changes)
        assert asked == [("sleep", 2)]


def test_tables_and_figure_come_from_the_json_alone(measured, tmp_path):
    path, table, _ = results.save(measured.result, tmp_path)
    result = results.read(path, cost.Cost)
    assert result == measured.result
    text = table.read_text()
    for row in result.rows_of(questions.DepoRow):
        assert f"| **{row.accuracy:.3f}** | {row.interval[0]:.3f} to" in text
        assert f"| {row.identical} of {row.questions} |" in text
    assert "floor" in text.lower() and "**0.250**" in text
    assert "`hybrid-sleep bench cost`" in text and "Not complete" not in text
    for rows in (result.rows, result.rows_of(questions.DepoRow), []):
        part = dataclasses.replace(result, rows=rows, ended="time is up")
        assert "Not complete (time is up)" in pages.markdown(part)
        save_figure(pages.figure(part), tmp_path / "cost.png")
        assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_a_cell_of_the_break_even_table_by_hand(measured):
    """Rounds whose times are made up: 10 and 30 more at first, 2 less a question; then never."""
    row = copy.deepcopy(measured.result.rows_of(cost.DecodeRow)[0])
    row.depths, row.answer = [2], 1
    row.seconds = cost.Seconds(
        token={"fresh": [1.0] * 3, "slept": [1.0] * 3, "kept": [2.0, 2.0, 0.5]}, copying=[0.0] * 3,
        read={2: [15.0, 35.0, 15.0]}, read_kept=[5.0] * 3, ask=[1.0] * 3, ask_kept=[2.0, 2.0, 1.0],
    )  # fmt: skip
    text = pages.markdown(dataclasses.replace(measured.result, rows=[row]))
    # 15 against 5 + 4 - 2 = 7 a question; 35 against 7; 15 against 5 + 1.5 - 2.
    assert "| **from 15** | 5 to 15; never in 1 |" in text
    assert "| **from 4** | 3 to 5 |" in text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"depths": (0, 2)}, "depths must be an integer of at least 1, got 0"),
        ({"depths": ()}, r"depths must be .*, got \[\]"),
        ({"windows": (0,)}, "windows must be an integer of at least 1, got 0"),
        ({"windows": ()}, "windows must be one or more integers .* got none"),
        ({"repeats": 1}, "repeats must be an integer of at least 2, got 1"),
        ({"cycles": 1}, "cycles must be an integer of at least 2, got 1"),
        ({"device": "cuda:99"}, "device='cuda:99'; allowed here: cpu"),
        ({"question": 5, "answer": 4}, "question and answer must be at most 8 .* got 5 and 4"),
        ({"question": 0}, "question must be an integer of at least 1, got 0"),
        ({"sizes": {"window": 1}}, "window must be an integer of at least 2, got 1"),
        ({"windows": (1, 0)}, "windows must be .* at least 1, got 0"),
        ({"minutes": 0}, "minutes must be a finite number above 0, got 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(changes, named, monkeypatch):
    monkeypatch.setattr(cost.Bench, "sleep", lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match=named):
        run(**{"sizes": SIZES, "windows": (1,), **changes})


def test_checkpoints_that_cannot_serve_are_refused(tmp_path, trained_on_depo, monkeypatch):
    monkeypatch.setattr(cost.Bench, "sleep", lambda *_: pytest.fail("measured"))
    for name in ("model", "depo"):
        with pytest.raises(FileNotFoundError, match="must be the folder of a trained model, got"):
            run(**{name: tmp_path / "missing"})
    with pytest.raises(ValueError, match="hidden must be left out where a model is given"):
        run(model=trained_on_depo, sizes={"hidden": 16})
    rule110 = {"name": "rule110", "params": {"width": 6, "states": 2, "steps": 1}}
    other = folder_of(tmp_path / "other", rule110)
    with pytest.raises(ValueError, match="depo must be a model trained on depo.*on rule110"):
        run(depo=other)
    attention = folder_of(tmp_path / "attention", rule110, layer_types=["full_attention"] * 2)
    with pytest.raises(ValueError, match="model must have a state-space layer"):
        run(model=attention)


def test_a_trained_model_is_measured_as_well(trained_on_depo):
    result = run(model=trained_on_depo, depths=(2,), windows=(1,))
    assert result.model.run["checkpoint"] == trained_on_depo.name
    assert [row.what for row in result.rows] == ["sleep", "decode"] and result.depo is None
    assert pages.markdown(result).startswith(f"{trained_on_depo.name}: ")


@pytest.mark.gpu
def test_on_a_gpu():
    result = run(sizes=SIZES, depths=(1, 2), windows=(1, 2), device="cuda")
    assert result.complete and result.clock == "wall_seconds"
    assert pages.markdown(result)
