"""Our tasks in lm-eval: the same numbers as from the depth benchmark."""

from __future__ import annotations

import math

import pytest
import torch
from marks import slow
from small import TINY

from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM
from hybrid_sleep.eval import tasks
from hybrid_sleep.eval.measure.accuracy import measure_depth
from hybrid_sleep.eval.tasks import IGNORED, TASKS
from hybrid_sleep.eval.tasks.accuracy import predict

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.evaluator import evaluate

from hybrid_sleep.eval.harness import HybridSleepLM, task_manager
from hybrid_sleep.eval.harness import tasks as ours
from hybrid_sleep.eval.harness.scores import scores
from hybrid_sleep.eval.harness.tokenizer import WordTokenizer, task_words

COUNT, SEED, DEPTHS = 60, 3, (1, 4)
RULE = {"width": 4, "states": 3, "steps": [1, 2]}
# Labels that are the next tokens, with others between them; labels that no token ever shows.
ASKED = {
    "rule110": RULE,
    "depo": {"nodes": 7, "hops": 2, "queries": 1, "alphabet": 9, "shortest": 1, "longest": 1},
    "mqar": {"vocab_size": 12, "length": 16, "pairs": [2, 4]},
    "word_problem": {"group": "S3", "elements": 8, "layout": "tagging", "windows": 2},
}


def learn(task, steps=60):
    """A model that has seen a little of `task`: right sometimes, and not equally at every depth."""
    torch.manual_seed(0)
    config = HybridSleepConfig(
        **TINY,
        vocab_size=task.vocab_size,
        window=task.window,
        sleep_schedule="every_window",
        initializer_range=0.5,
    )
    model = HybridSleepForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    for step in range(steps):
        optimizer.zero_grad()
        model(**task.batch("train", step, 32), sleep_passes=1 + step % 2).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("name", ["rule110", slow("depo"), slow("mqar"), "word_problem"])
def test_lm_eval_gives_the_numbers_of_the_depth_benchmark(name):
    task = tasks.load(name, **ASKED[name])
    model = learn(task)
    examples = list(task.examples("test", SEED, COUNT))
    wanted = measure_depth(model, task, DEPTHS, COUNT, SEED, batch_size=17)
    manager = task_manager({name: ASKED[name]}, count=COUNT, seed=SEED, include_defaults=False)
    loaded = manager.load([ours.PREFIX + name])
    lm = HybridSleepLM(model, tokenizer=WordTokenizer(task_words(task)), batch_size=7)
    for depth in DEPTHS:
        lm.sleep_passes = depth
        found = evaluate(lm, loaded, bootstrap_iters=10, log_samples=True)
        values = found["results"][ours.PREFIX + name]
        chosen = predict(model, torch.tensor([e["input_ids"] for e in examples]), depth)
        expected = task.score(chosen, examples)
        assert values["exact,none"] == wanted[depth].exact == expected["exact"]
        assert values["per_label,none"] == wanted[depth].per_label
        assert values["per_question,none"] == expected["per_question"]
        by_difficulty = scores(found, {})["by_difficulty"]
        assert {int(k): v["share"] for k, v in by_difficulty.items()} == expected["by_difficulty"]
        assert {int(k): v["questions"] for k, v in by_difficulty.items()} == expected["questions"]
        for row, sample in enumerate(found["samples"][ours.PREFIX + name]):
            alone = task.score(chosen[row : row + 1], examples[row : row + 1])
            assert sample["exact"] == alone["exact"]
    # Numbers that any mistake would have changed.
    per_label = [accuracy.per_label for accuracy in wanted.values()]
    assert 0 < min(per_label) and max(per_label) < 1
    assert len(set(per_label)) > 1
    best = max(accuracy.exact for accuracy in wanted.values())
    assert 0 < best < 1 or name in ("mqar", "word_problem")


def test_simple_evaluate_knows_our_tasks_by_name():
    task = tasks.load("rule110", **RULE)
    model = learn(task, steps=5)
    lm = HybridSleepLM(model, 2, tokenizer=WordTokenizer(task_words(task)), batch_size=8)
    found = simple_evaluate(
        model=lm,
        tasks=["hybrid_sleep_rule110"],
        task_manager=task_manager({"rule110": RULE}, count=30, include_defaults=False),
        limit=20,
    )
    values = found["results"]["hybrid_sleep_rule110"]
    assert values["exact,none"] == measure_depth(model, task, [2], 20)[2].exact
    share = values["exact,none"]
    assert values["exact_stderr,none"] == pytest.approx(math.sqrt(share * (1 - share) / 19))
    assert found["n-samples"]["hybrid_sleep_rule110"] == {"original": 30, "effective": 20}


@pytest.mark.parametrize(
    ("input_ids", "labels", "expected"),
    [
        ([5, 6, 7, 8], [-100, -100, 7, 8], [(2, [7, 8])]),
        # A token without a label between two that have one.
        ([5, 6, 7, 8, 9], [-100, 6, -100, 8, -100], [(1, [6, 7, 8])]),
        # Labels that the next token is not.
        ([5, 6, 7, 8], [-100, 0, 1, 2], [(1, [0]), (2, [1]), (3, [2])]),
        ([5, 6, 7, 8], [-100, 6, 1, 8], [(1, [6, 1]), (3, [8])]),
        # Nothing predicts the first token.
        ([5, 6, 7], [5, 6, -100], [(1, [6])]),
    ],
)
def test_supervised_spans_by_hand(input_ids, labels, expected):
    assert list(ours.supervised_spans(input_ids, labels)) == expected


def test_supervised_spans_show_every_label_what_comes_before_it():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        ids = torch.randint(0, 3, (9,), generator=generator).tolist()
        labels = torch.randint(-1, 3, (9,), generator=generator).tolist()
        labels = [IGNORED if label < 0 else label for label in labels]
        asked = {}
        for start, tokens in ours.supervised_spans(ids, labels):
            for i, token in enumerate(tokens):
                asked[start + i] = (ids[:start] + tokens[:i], token)
        for place in range(1, 9):
            if labels[place] != IGNORED:
                assert asked[place] == (ids[:place], labels[place])


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_has_a_tokenizer_that_reads_what_it_says(name):
    task = tasks.load(name, **ASKED.get(name, {}))
    words = task_words(task)
    tokenizer = WordTokenizer(words)
    assert len(words) == task.vocab_size
    ids = torch.randint(0, task.vocab_size, (200,)).tolist()
    text = tokenizer.decode(ids)
    assert text == " ".join(words[i] for i in ids)
    assert tokenizer(text).input_ids == ids
    assert tokenizer(f" {text}\n<pad>").input_ids == [*ids, tokenizer.pad_token_id]
    assert tokenizer.pad_token_id >= task.vocab_size
    assert tokenizer.decode([*ids, tokenizer.pad_token_id], skip_special_tokens=True) == " ".join(
        words[i] for i in ids if words[i] != "<end>"
    )
    example = next(task.examples("test", 0, 1))
    assert tokenizer.decode(example["input_ids"]).split() == [
        words[i] for i in example["input_ids"]
    ]


@pytest.mark.parametrize("words", [["a", "a"], ["a b"], [""]])
def test_words_that_are_no_tokens_are_refused(words):
    with pytest.raises(ValueError, match="words must be different and without spaces"):
        WordTokenizer(words)


def test_all_tasks_are_there_and_take_parameters():
    manager = task_manager(ASKED, count=2, include_defaults=False)
    assert ours.names() == [f"hybrid_sleep_{name}" for name in sorted(TASKS)]
    assert set(ours.names()) <= set(manager.task_index)
    for name in ASKED:
        (task,) = manager.load([ours.PREFIX + name])["tasks"].values()
        assert task.config.metadata["params"] == tasks.load(name, **ASKED[name]).params
        first, second = task.eval_docs
        examples = list(tasks.load(name, **ASKED[name]).examples("test", 0, 2))
        assert [first["input_ids"], second["input_ids"]] == [e["input_ids"] for e in examples]
    with pytest.raises(ValueError, match="name must be one of '.*, got 'chess'"):
        task_manager({"chess": {}}, include_defaults=False)
    with pytest.raises(ValueError, match="width must be an integer of at least 3 .*, got 2"):
        task_manager({"rule110": {"width": 2}}, include_defaults=False)
    with pytest.raises(ValueError, match="count must be an integer of at least 1, got 0"):
        task_manager(count=0, include_defaults=False)


def test_a_model_that_tells_nothing_of_single_tokens_is_refused():
    manager = task_manager({"rule110": RULE}, count=1, include_defaults=False)
    (task,) = manager.load(["hybrid_sleep_rule110"])["tasks"].values()
    with pytest.raises(ValueError, match="rule110 must be evaluated by --model hybrid_sleep"):
        task.process_results(task.eval_docs[0], [(-1.0, True)])
    with pytest.raises(ValueError, match="must have no chat template and no text before it"):
        task.construct_requests(task.eval_docs[0], "something else")


def test_in_words_replies_are_parsed():
    params = {"ops": [2], "length": 128, "windows": 2}
    manager = task_manager({"gsm_infinite": params}, text=True, count=3, include_defaults=False)
    (task,) = manager.load(["hybrid_sleep_gsm_infinite"])["tasks"].values()
    example = next(tasks.load("gsm_infinite", **params).examples("test", 0, 1))["meta"]
    doc, answer = task.eval_docs[0], example["answer"]
    asked = f"{example['problem']}\n{example['question']}\nAnswer:"
    assert task.fewshot_context(doc, 0) == asked and task.doc_to_target(doc) == str(answer)
    for reply, right in (
        (f" {answer}.", 1), (rf"1 + 1 = 2, \boxed{{{answer}}}", 1), (f" {answer + 1}", 0), ("", 0)
    ):  # fmt: skip
        expected = {"exact": right, "per_question": [[2, right, 1]]}
        assert task.process_results(doc, [reply]) == expected
    task.set_fewshot_seed(0)
    shots = task.fewshot_context(doc, 2).split("\n\n")
    assert len(shots) == 3 and shots[-1] == asked
    train = [d["context"] for d in task.training_docs()]
    assert all(shot.rpartition(" ")[0] in train for shot in shots[:2])


def test_a_task_without_words_is_not_asked_in_words():
    manager = task_manager({"rule110": RULE}, text=True, count=1, include_defaults=False)
    with pytest.raises(ValueError, match="rule110 must be .* as it has no problems in words"):
        manager.load(["hybrid_sleep_rule110"])
