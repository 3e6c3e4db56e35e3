"""The cost benchmark: break-even by enumeration, what is compared, energy counters, files."""

from __future__ import annotations

import copy
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from small import assert_same, gap, small_ids, small_model, snapshot

from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM, SleepCache
from hybrid_sleep.eval import flops, tasks
from hybrid_sleep.eval.benchmarks import break_even, cost, cost_report, keeping, questions
from hybrid_sleep.eval.plots import save_figure
from hybrid_sleep.training.config import run_config

SIZES = {"hidden": 16, "layers": 2, "window": 8, "head_dim": 8, "vocabulary": 16}
DEPO = {"nodes": 5, "hops": 3, "queries": 2, "alphabet": 12, "longest": 2}
MODEL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def folder_of(path, task, **model):
    """What training would leave behind, with random weights."""
    run = run_config(
        {
            "model": {**MODEL, **model},
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


@pytest.fixture(autouse=True)
def _no_meter(monkeypatch):
    monkeypatch.setattr(cost, "find_meter", lambda device: None)


@pytest.fixture(scope="module")
def measured(tmp_path_factory, trained_on_depo):
    out = tmp_path_factory.mktemp("cost")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "find_meter", lambda device: None)
        result = cost.run(
            sizes=SIZES, depo=trained_on_depo, depths=(2, 1), windows=(3, 1), cycles=3, repeats=2,
            out=out, command="hybrid-sleep bench cost",
        )  # fmt: skip
    return SimpleNamespace(out=out, result=result, rows=result["rows"])


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
    bench = cost.Bench(model, 2, 1, 1)
    ids = small_ids(1, 12)
    with torch.no_grad():
        cache = SleepCache(model.config)
        for start in (0, 4, 8):
            model(ids[:, start : start + 4], cache=cache)
            model.sleep(cache, 3)
        found = snapshot(bench._past(ids, 3))
        # The columns read in one forward are counted alike, its reports are not.
        assert_same(snapshot(cache), found)
        assert int(bench._past(ids, 1).sleeps) == 3


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_flops_count_what_is_held_after_so_many_sleeps(eviction):
    model = small_model(window=4, eviction=eviction, dtype=torch.float32)
    bench = cost.Bench(model, 2, 2, 1)
    for windows in (1, 3):
        with torch.no_grad():
            kept = int(bench._past(small_ids(1, 4 * windows), 2).kept)
        counted = bench._flops(4 * windows, [2], keeping.keeper_of(model, 100).config)
        logits = flops.logit_flops(model.config)
        assert counted["ask"] == flops.pass_flops(model.config, 2, past=kept) + logits
        assert counted["token"]["slept"] == flops.token_flops(model.config, kept + 2)


def test_a_window_of_two_tokens_can_be_measured():
    result = cost.run(sizes={**SIZES, "window": 2}, depths=(1,), windows=(2,), repeats=2)
    assert (result["question"], result["answer"]) == (1, 1)
    assert [len(times) for times in result["rows"][0]["ratio"].values()] == [2, 2, 2]


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
            read = [task.parse(context + q.asked + q.answer)["queries"] for q in found]
            assert all(len(queries) == 1 for queries in read)
            assert {queries[0] for queries in read} == wanted and len(found) == len(wanted)
            assert [queries[0][0] for queries in read] == [q.hops for q in found]


def test_saved_fast_weights_answer_as_one_forward_does(measured, trained_on_depo):
    task = tasks.load("depo", **DEPO)
    model = HybridSleepForCausalLM.from_pretrained(trained_on_depo).eval()
    rows = {row["passes"]: row for row in measured.rows if row["what"] == "depo"}
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
        assert row["questions"] == row["identical"] == len(every) == 3 * 5 * 3
        assert row["logit_difference"] <= 1e-5
        assert row["accuracy"] == pytest.approx(sum(every) / len(every))
        for hops, answers in right.items():
            assert row["by_hops"][str(hops)] == pytest.approx(sum(answers) / len(answers))
        low, high = row["interval"]
        assert 0 <= low <= row["accuracy"] <= high <= 1
        counted = row["flops"]
        assert counted["each"]["saved"] == pytest.approx(sum(asking) / len(asking))
        # Reading again is reading and asking; only the logits behind the cycle are not needed.
        unneeded = flops.logit_flops(model.config)
        again = counted["once"]["saved"] - unneeded + counted["each"]["saved"]
        assert counted["each"]["reread"] == pytest.approx(again, abs=1e-3)
        assert counted["break_even"]["reread"] == {"pays": "from", "questions": 2}
        assert row["bytes"]["saved"] == model.config.fast_weight_bytes < row["file"]["bytes"]
        kept = row["bytes"]["kept"] - flops.kv_bytes(model.config) * task.context
        assert kept == flops.cache_bytes(model.config, 1) - flops.kv_bytes(model.config) - 4 * 16


def test_verdicts_about_cycles_by_hand():
    read = ((30.0, 10.0), (36.0, 10.0), (33.0, 1.0))
    once = [{"saved": saved, "kept": kept} for saved, kept in read]
    each = {"saved": 2.0, "kept": 6.0, "reread": 32.0, "reread_awake": 12.0}
    found = questions.break_evens(once, [each, each, {**each, "reread_awake": 1.0}])
    # At first 20, 26 and 32 more, 4 less a question.
    assert found["kept"] == {"pays": "from", "questions": 7, "kinds": {"from": 3},
                             "quartiles": [6.0, 7.5], "range": [5, 8]}  # fmt: skip
    assert (found["reread"]["questions"], found["reread"]["range"]) == (2, [1, 2])
    # 30 / 10, 36 / 10 and never.
    awake = found["reread_awake"]
    assert (awake["questions"], awake["range"]) == (4, [3, 4])
    assert awake["kinds"] == {"from": 2, "never": 1}
    assert set(questions.break_evens(once[:1], [each])["kept"]) == {"pays", "questions"}


def test_rows_of_a_small_model(measured):
    result, config = measured.result, HybridSleepConfig(**measured.result["model"]["config"])
    kinds = [(row["what"], row.get("windows", row.get("passes"))) for row in measured.rows]
    assert kinds == [("sleep", 2), ("wake", 1), ("wake", 3), ("depo", 1), ("depo", 2)]
    assert (result["question"], result["answer"]) == (2, 2)
    assert result["complete"] and result["depo"]["floor"] == 1 / 4
    for row in measured.rows[1:3]:
        past = row["past"] = 8 * row["windows"]
        held = row["bytes"]
        assert held["saved"] == config.fast_weight_bytes
        slept = {"slept": True}
        assert held["window"] + held["saved"] == flops.cache_bytes(config, 8, **slept)
        assert held["kept"] == flops.cache_bytes(config, past) - 4 * 16 * past
        assert all(len(times) == 2 for times in row["seconds"]["token"].values())
        assert list(row["seconds"]["read"]) == list(row["flops"]["read"]) == ["1", "2"]
        longer = copy.deepcopy(config)
        longer.window = 1000
        answered = [flops.token_flops(longer, past + place) for place in (2, 3)]
        assert row["flops"]["token"]["kept"] == sum(answered) / 2
        answered = [flops.token_flops(config, place) for place in (2, 3)]
        assert row["flops"]["token"]["slept"] == sum(answered) / 2


def test_rows_that_are_there_are_not_measured_again(measured, tmp_path, monkeypatch):
    asked = []

    def note(_, names):
        asked.append((names["what"], names.get("passes", names.get("windows"))))
        return {}

    monkeypatch.setattr(cost.Bench, "sleep", note)
    monkeypatch.setattr(cost.Bench, "wake", note)
    monkeypatch.setattr(cost, "judge", lambda result: None)
    monkeypatch.setattr(cost, "provenance", lambda device: measured.result["provenance"])
    before = (measured.out / "results.json").read_text()

    def run(**changes):
        (tmp_path / "results.json").write_text(before)
        same = {"sizes": SIZES, "depths": (1, 2), "windows": (1, 3), "repeats": 2}
        return cost.run(**{**same, **changes}, out=tmp_path)["rows"]

    assert run() == json.loads(json.dumps(measured.rows[:3])) and not asked
    run(windows=(1, 5))
    assert asked == [("wake", 5)]
    # Another model, other depths behind a past, another question: other rows.
    shorter = {"sizes": {**SIZES, "window": 4}, "question": 2, "answer": 2}
    for changes in (shorter, {"sizes": {**SIZES, "hidden": 32}}, {"depths": (2, 3)}, {"answer": 1}):
        asked.clear()
        run(**changes)
        assert ("wake", 1) in asked


def test_table_and_figure_come_from_the_json_alone(measured, tmp_path):
    result = json.loads((measured.out / "results.json").read_text())
    result |= {"complete": True, "ended": "done"}
    assert json.loads(json.dumps(measured.result)) == result
    table = cost_report.markdown(result)
    depo = [row for row in result["rows"] if row["what"] == "depo"]
    for row in depo:
        assert f"| **{row['accuracy']:.3f}** | {row['interval'][0]:.3f} to" in table
        assert f"| {row['identical']} of {row['questions']} |" in table
    for verdict in result["break_even"]:
        assert f"**{cost_report.words_of(verdict)}**" in table
    assert "not reported by this device" in table and "joules" not in table
    assert "floor" in table.lower() and "**0.250**" in table
    assert "`hybrid-sleep bench cost`" in table and "Not complete" not in table
    several = {"pays": "from", "questions": 7, "kinds": {"from": 4, "never": 1}, "range": [5, 9]}
    verdicts = [b | several if b["unit"] == "seconds" else b for b in result["break_even"]]
    assert "| **from 7** | 5 to 9; never in 1 |" in cost_report.markdown(
        {**result, "break_even": verdicts}
    )
    assert "Not complete" in cost_report.markdown({**result, "complete": False})
    for rows in (result["rows"], depo, []):
        part = {**result, "rows": rows}
        assert cost_report.markdown(part)
        save_figure(cost_report.figure(part), tmp_path / "cost.png")
        assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_joules_are_shown_where_a_device_counts_them(measured):
    result = json.loads(json.dumps({**measured.result, "energy": "a meter"}))
    for row in result["rows"]:
        if row["what"] == "sleep":
            row["joules"] = 0.125
        elif row["what"] == "wake":
            row["joules"] = {
                "token": {"slept": 0.5, "kept": 1.5},
                "read": {"1": 20, "2": 60},
                "read_kept": 10,
                "ask": 2,
                "ask_kept": 4,
            }
    break_even.judge(result)
    # A question: 2 + 2 tokens of .5, or 4 + 2 of 1.5: 4 saved, for 50.
    table = cost_report.markdown(result)
    assert "| 0.125 |" in table and "| 0.5 | 1.5 |" in table and "**from 13**" in table
    assert "a meter, idle draw" in table


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"depths": (0, 2)}, "depths must be an integer of at least 1, got 0"),
        ({"depths": ()}, r"depths must be .*, got \[\]"),
        ({"windows": (0,)}, "windows must be an integer of at least 1, got 0"),
        ({"windows": ()}, "windows is empty"),
        ({"repeats": 1}, "repeats must be an integer of at least 2, got 1"),
        ({"cycles": 1}, "cycles must be an integer of at least 2, got 1"),
        ({"device": "cuda:99"}, "device='cuda:99'; allowed here: cpu"),
        ({"question": 5, "answer": 4}, "question=5 and answer=4 .* at most 8"),
        ({"question": 0}, "question must be an integer of at least 1, got 0"),
        ({"sizes": {"window": 1}}, "window must be an integer of at least 2, got 1"),
        ({"windows": cost.parse_windows("1, 0")}, "windows must be .* at least 1, got 0"),
        ({"minutes": 0}, "minutes must be a finite number above 0, got 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(changes, named, monkeypatch):
    monkeypatch.setattr(cost.Bench, "sleep", lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match=named):
        cost.run(**{"sizes": SIZES, "windows": (1,), **changes})


def test_windows_are_read_from_text():
    assert cost.parse_windows("1,8, 64") == [1, 8, 64]
    for text in ("", "1,", "1-8", "two"):
        with pytest.raises(ValueError, match=f"windows='{text}'; allowed: such as 1,8,64"):
            cost.parse_windows(text)


def test_checkpoints_that_cannot_serve_are_refused(tmp_path, trained_on_depo, monkeypatch):
    monkeypatch.setattr(cost.Bench, "sleep", lambda *_: pytest.fail("measured"))
    for name in ("model", "depo"):
        with pytest.raises(FileNotFoundError, match="is no folder"):
            cost.run(**{name: tmp_path / "missing"})
    with pytest.raises(ValueError, match="hidden given with model=.*allowed: one"):
        cost.run(model=trained_on_depo, sizes={"hidden": 16})
    rule110 = {"name": "rule110", "params": {"width": 6, "states": 2, "steps": 1}}
    other = folder_of(tmp_path / "other", rule110)
    with pytest.raises(ValueError, match="was trained on rule110; allowed: a model trained on"):
        cost.run(depo=other)
    awake = folder_of(tmp_path / "awake", rule110, layer_types=["full_attention"] * 2)
    with pytest.raises(ValueError, match="has no state-space layer"):
        cost.run(model=awake)


def test_a_trained_model_is_measured_as_well(trained_on_depo):
    result = cost.run(model=trained_on_depo, depths=(2,), windows=(1,), repeats=2)
    assert result["model"]["name"]["checkpoint"] == trained_on_depo.name
    assert [row["what"] for row in result["rows"]] == ["sleep", "wake"] and result["depo"] is None
    assert cost_report.markdown(result).startswith(f"{trained_on_depo.name}: ")


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    result = cost.run(sizes=SIZES, depths=(1, 2), windows=(1, 2), repeats=2, device="cuda")
    assert result["complete"] and result["clock"] == "wall_seconds"
    assert cost_report.markdown(result)
