"""The benchmark of fast weights into slow ones: its texts, what it measures, and a run of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from hybrid_sleep import SleepCache
from hybrid_sleep.eval import results
from hybrid_sleep.eval.bridge import bench
from hybrid_sleep.eval.bridge.arms import ARMS, Night
from hybrid_sleep.eval.bridge.bench import BridgeResult, Course, slept_over
from hybrid_sleep.eval.bridge.model import (
    Training,
    accuracy,
    answered,
    trained_model,
    weighted_loss,
)
from hybrid_sleep.eval.bridge.texts import Day, Texts
from hybrid_sleep.eval.render.bridge import markdown
from hybrid_sleep.support.provenance import provenance

TEXTS = Texts(24, 2)
LITTLE = Training(steps=2, rows=4, answers=1, hidden=16)
SHORT = Night(tokens=100, samples=4, measured=4, rows=4)


@pytest.fixture(scope="module")
def model():
    return trained_model(TEXTS, LITTLE, 0)


def test_a_text_says_its_pairs_and_then_asks_for_each_in_another_order():
    rows = TEXTS.rows("train", 3, 200).tolist()
    assert TEXTS.window == 5 and TEXTS.answers.tolist() == [7, 9]
    orders = set()
    for row in rows:
        assert len(row) == 10 and row[0] == row[5] == 0
        said, asked = (dict(zip(row[i : i + 3 : 2], row[i + 1 : i + 4 : 2])) for i in (1, 6))  # noqa: B905
        assert said == asked and len(said) == 2
        assert all(1 <= k < 12 for k in said) and all(12 <= v < 24 for v in said.values())
        orders.add(list(said) == list(asked))
    assert orders == {True, False}
    pairs = [
        {frozenset(zip(r[1:5:2], r[2:5:2], strict=True)) for r in TEXTS.rows(s, 3, 200).tolist()}
        for s in ("train", "test")
    ]
    assert pairs[0].isdisjoint(pairs[1])


def test_days_have_no_key_in_common_and_questions_about_all_of_theirs():
    days = TEXTS.days(0, 4)
    keys = [key for day in days for key, _ in day.pairs]
    assert len(keys) == len(set(keys)) == 8
    assert days == TEXTS.days(0, 4) and days != TEXTS.days(1, 4) != TEXTS.days(1, 4, "train")
    day = days[0]
    assert list(day.text) == [0, *(x for pair in day.pairs for x in pair)]
    assert day.questions == [([0, k], [v]) for k, v in day.pairs]
    with pytest.raises(ValueError, match="days must be texts without a key in common, 5 of 2"):
        TEXTS.days(0, 6)
    with pytest.raises(ValueError, match="pairs must be"):
        Texts(24, 0)


def test_words_are_a_token_each_and_a_turn_is_what_is_said():
    tokenizer, row = TEXTS.tokenizer(), TEXTS.rows("train", 0, 1)[0].tolist()
    text = TEXTS.words(row)
    assert text.split()[0] == "<s>" and text.split()[1][0] == "k" and text.split()[2][0] == "v"
    assert tokenizer(text, add_special_tokens=False).input_ids == row
    assert tokenizer.decode(row, skip_special_tokens=False) == text
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "k5"}], tokenize=False)
    assert tokenizer(turn).input_ids == [0, 5]


def test_the_loss_is_the_mean_over_the_weighted_places_behind_a_sleep(model):
    rows = TEXTS.rows("train", 1, 3)
    weights = torch.zeros(10)
    weights[[7, 8]] = torch.tensor([1.0, 0.5])
    with torch.no_grad():
        found = weighted_loss(model, {"input_ids": rows, "weights": weights})
        by_hand = 0.0
        for row in rows:
            cache = SleepCache(model.config)
            model(row[None, :5], cache=cache)
            model.sleep(cache, passes=2)
            said = model(row[None, 5:], cache=cache).logits[0].log_softmax(-1)
            by_hand -= float(said[1, row[7]] + 0.5 * said[2, row[8]]) / (3 * 1.5)
    assert float(found) == pytest.approx(by_hand, rel=1e-5)


def test_what_is_answered_is_counted_by_hand(model):
    day = TEXTS.days(0, 1)[0]
    cache = slept_over(model, day, 2)
    assert int(cache.sleeps[0]) == 1 and cache.slots == 0

    def likeliest(question, past):
        with torch.no_grad():
            return int(model(torch.tensor([question]), cache=past).logits[0, -1].argmax())

    for held in (cache, None):
        says = [
            likeliest(q, SleepCache(model.config) if held is None else held.copy())
            for q, _ in day.questions
        ]
        asked = [(q, [says[0]]) for q, _ in day.questions]
        assert answered(model, asked, held) == sum(x == says[0] for x in says) / len(says)
        assert answered(model, [(q, [s]) for (q, _), s in zip(day.questions, says, strict=True)],
                        held) == 1  # fmt: skip
    rows = TEXTS.rows("test", 1_000_000, 250)
    right = 0
    with torch.no_grad():
        for row in rows[:40]:
            logits = model(row[None], use_cache=False).logits[0]
            right += sum(int(logits[i - 1].argmax()) == int(row[i]) for i in (7, 9))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Texts, "rows", lambda *a: rows[:40])
            assert accuracy(model, TEXTS) == right / 80


def test_a_share_is_of_the_gain_over_all_days():
    made = Course(
        arm="sleep", floor=[0.0, 0.5], ceiling=[1.0, 0.75], kept=[0.5, 0.75], last=[0.25, 0.5],
        unrelated=[1, 1, 1], nights=[], seconds=0.0,
    )  # fmt: skip
    assert made.share(made.kept) == pytest.approx(0.75 / 1.25)
    assert made.share(made.last) == pytest.approx(0.25 / 1.25)
    assert replace(made, ceiling=[0.0, 0.5]).share(made.kept) is None


def test_a_run_measures_every_arm_goes_on_and_is_shown(tmp_path):
    given = {"texts": TEXTS, "days": 2, "training": LITTLE, "night": SHORT, "out": tmp_path}
    result = bench.run(seeds=(0,), **given)
    assert result.complete and [c.arm for c in result.rows[0].courses] == list(ARMS)
    by_arm = {c.arm: c for c in result.rows[0].courses}
    for c in by_arm.values():
        assert len(c.floor) == len(c.ceiling) == len(c.kept) == len(c.last) == 2
        assert len(c.unrelated) == 3
        # Every arm begins with the same model.
        assert (c.floor[0], c.ceiling[0]) == (by_arm["none"].floor[0], by_arm["none"].ceiling[0])
    none = by_arm["none"]
    assert none.kept == none.floor == none.last and len(set(none.unrelated)) == 1
    assert none.nights == ["nothing to do"] * 2 and by_arm["fine-tuning"].nights == ["trained"] * 2
    for arm in ("sleep", "unguarded", "own-text"):
        assert all(x.startswith(("committed", "rolled back")) for x in by_arm[arm].nights)
    kept = json.loads((tmp_path / "results.json").read_text())["rows"][0]
    again = bench.run(seeds=(0, 1), **given)
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0] == kept
    assert len(again.rows) == 2
    paths = results.save(again, tmp_path)
    assert {p.name for p in paths} == {"results.json", "results.md", "bridge.png"}
    text = (tmp_path / "results.md").read_text()
    assert all(arm.label in text for arm in ARMS.values())


def test_the_table_says_what_was_reached():
    def row(seed, kept, after):
        made = Course(
            arm="sleep", floor=[0.0], ceiling=[1.0], kept=[kept], last=[kept],
            unrelated=[0.9, after], nights=["committed"], seconds=2.0,
        )  # fmt: skip
        return bench.BridgeRow(
            seed=seed, arms=["sleep"], vocab_size=24, pairs=2, days=1, passes=2, split="test",
            training={"steps": 2}, night={"rate": 0.1}, parameters=10, training_seconds=1.0,
            courses=[made],
        )  # fmt: skip

    def shown(*rows):
        return markdown(BridgeResult(rows=list(rows), provenance=provenance("cpu")))

    assert "in 2 of 2 seeds, unrelated texts within 2 points in 2: the aim is reached" in shown(
        row(0, 0.5, 0.89), row(1, 1.0, 0.95)
    )
    assert "in 1 of 2 seeds, unrelated texts within 2 points in 1: the aim is missed" in shown(
        row(0, 0.25, 0.9), row(1, 1.0, 0.85)
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"arms": ("nap",)}, "arms must be one of"),
        ({"days": 0}, "days must be"),
        ({"days": 40}, "days must be texts without a key in common"),
        ({"passes": 0}, "passes must be"),
        ({"split": "dev"}, "split must be one of 'test', 'train'"),
        ({"seeds": (-1,)}, "seeds must be"),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        bench.run(**given)
    assert Day((0, 1, 12), ((1, 12),)).questions == [([0, 1], [12])]
