"""lm-eval's requests: every answer is that of a plain forward over each text alone."""

from __future__ import annotations

import copy
import functools
import json
import pickle

import pytest
import torch
from small import small_model
from transformers import ByT5Tokenizer

from hybrid_sleep.eval.harness.batches import group_by_prefix
from hybrid_sleep.eval.harness.likelihood import Likelihood
from hybrid_sleep.eval.harness.tokenizer import WordTokenizer

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from hybrid_sleep.eval.harness import HybridSleepLM

# Token 0, which pads are filled with, is a word like any other.
WORDS = [*"abcdefghij", "<end>"]
END = 10
WINDOW = 5
MODELS = {
    "hard, delta net": {},
    "sliding, mamba2": {"eviction": "sliding", "state_space": "mamba2"},
    "coda, two-way": {"loop": (1, 3), "sleep_attention": "bidirectional"},
}
CASES = [
    ("hard, delta net", 1),
    ("hard, delta net", 3),
    ("sliding, mamba2", 3),
    ("coda, two-way", 2),
]
NEW_TOKENS = 5

TASKS = {
    "choices": """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}, cache_dir: CACHE}
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "replies": """
task: replies
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}, cache_dir: CACHE}
test_split: test
output_type: generate_until
doc_to_text: context
doc_to_target: text
generation_kwargs: {until: ["c", "e f"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "texts": """
task: texts
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}, cache_dir: CACHE}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
}


def word(*shape, seed):
    """Random words, none of them the end."""
    generator = torch.Generator().manual_seed(seed)
    return [WORDS[i] for i in torch.randint(0, END, shape, generator=generator).tolist()]


def documents():
    """Contexts of 1 to 17 tokens and choices of 1 to 6: boundaries lie in every row's padding."""
    found = []
    for i in range(7):
        choices = [" ".join(word(1 + (i + 2 * j) % 6, seed=100 * i + j)) for j in range(2)]
        # One continuation begins another, and one comes twice.
        choices += [choices[1] + " a", choices[0]]
        found.append(
            {
                "context": " ".join(word(1 + (i * 5) % 17, seed=i)),
                "choices": choices,
                "gold": i % 2,
                "text": " ".join(word(1 + (i * 7) % 19, seed=50 + i)),
            }
        )
    return found


DOCUMENTS = documents()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's own tasks: YAML files over local data."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.json"
    data.write_text("\n".join(json.dumps(document) for document in DOCUMENTS))
    for name, text in TASKS.items():
        text = text.replace("DATA", str(data)).replace("CACHE", str(folder / "cache"))
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def manager(folder):
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def models():
    return {name: small_model(vocab_size=len(WORDS), **kw) for name, kw in MODELS.items()}


def lm_of(model, passes=2, **kwargs):
    return HybridSleepLM(model, passes, tokenizer=WordTokenizer(WORDS), **kwargs)


def ids_of(text):
    return [WORDS.index(part) for part in text.split()]


def alone(model, context, target, passes):
    """Log probability of `target` behind `context`, and which tokens are the likeliest."""
    with torch.no_grad():
        logits = model(torch.tensor([context + target]), sleep_passes=passes).logits[0]
    behind = logits.log_softmax(-1)[len(context) - 1 : -1]
    score = sum(behind[i, token].item() for i, token in enumerate(target))
    return score, [int(behind[i].argmax()) == token for i, token in enumerate(target)]


def written(model, context, passes):
    """Greedy words behind `context`, a whole forward for each, and why they ended."""
    new = []
    while len(new) < NEW_TOKENS:
        with torch.no_grad():
            logits = model(torch.tensor([context + new]), sleep_passes=passes).logits
        new.append(int(logits[0, -1].argmax()))
        if new[-1] == END:
            return " ".join(WORDS[i] for i in new[:-1]), "end"
        text = " ".join(WORDS[i] for i in new)
        if "c" in text or "e f" in text:
            return text.split("c")[0].split("e f")[0], "until"
    return " ".join(WORDS[i] for i in new), "length"


def answers(found, name):
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return [[resps[0] for resps in sample["resps"]] for sample in samples]


@pytest.fixture(scope="module")
def expected(models):
    """What each document gets alone: choices, text, reply and why the reply ended."""

    @functools.cache
    def of(kind, passes):
        model, found = models[kind], []
        for document in DOCUMENTS:
            context = ids_of(document["context"])
            choices = [alone(model, context, ids_of(c), passes) for c in document["choices"]]
            text, _ = alone(model, [END], ids_of(document["text"]), passes)
            found.append((choices, text, *written(model, context, passes)))
        return found

    return of


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(("kind", "passes"), CASES)
def test_every_request_gets_what_it_gets_alone(manager, models, expected, kind, passes, batch_size):
    lm = lm_of(models[kind], passes, batch_size=batch_size)
    found = evaluate(lm, manager.load(list(TASKS)), bootstrap_iters=0, log_samples=True)
    asked = [answers(found, name) for name in ("choices", "texts", "replies")]
    for wanted, got, (score,), (reply,) in zip(expected(kind, passes), *asked, strict=True):
        choices, text, written_alone, _ = wanted
        for (log_probability, right), (got_score, greedy) in zip(choices, got, strict=True):
            assert got_score == pytest.approx(log_probability, abs=1e-10)
            assert greedy is all(right)
        assert score == pytest.approx(text, abs=1e-10)
        assert reply == written_alone


def test_replies_end_in_every_way(expected):
    """Or the test above would not have seen a row that writes on while another has ended."""
    assert {row[3] for case in CASES for row in expected(*case)} == {"end", "until", "length"}


def test_depth_changes_the_answers_and_calls_leave_nothing_behind(models):
    model = models["hard, delta net"]
    lm = lm_of(model, 1, batch_size=3)
    requests = [
        Instance("loglikelihood", {}, (document["context"], " " + document["text"]), 0)
        for document in DOCUMENTS
    ]
    first = lm.loglikelihood(requests, disable_tqdm=True)
    lm.sleep_passes = 4
    deeper = lm.loglikelihood(requests, disable_tqdm=True)
    lm.sleep_passes = None
    assert lm.sleep_passes == model.config.sleep_passes == 1
    assert lm.loglikelihood(requests, disable_tqdm=True) == first
    differ = [a[0] != b[0] for a, b in zip(first, deeper, strict=True)]
    lengths = [len(ids_of(d["context"] + " " + d["text"])) - 1 for d in DOCUMENTS]
    # What fits into the first window, which predicts before it ever sleeps, does not depend on N.
    assert differ == [length > WINDOW for length in lengths] and {True, False} == set(differ)


def test_texts_that_begin_others_are_not_read_again(models, monkeypatch):
    model = models["hard, delta net"]
    lm = lm_of(model, 2, batch_size=4)
    read, real = [], lm._backbone
    monkeypatch.setattr(
        lm, "_backbone", lambda rows, **kw: read.extend(map(list, rows)) or real(rows, **kw)
    )
    text = word(12, seed=7)
    requests = [
        Instance("loglikelihood", {}, (" ".join(text[:at]), f" {text[at]}"), 0)
        for at in range(1, 12)
    ]
    requests.append(Instance("loglikelihood", {}, (" ".join(text[:4]), " e e"), 0))
    got = lm.loglikelihood(requests, disable_tqdm=True)
    assert sorted(read) == sorted([ids_of(" ".join(text[:11])), ids_of(" ".join(text[:4]) + " e")])
    for request, (score, greedy) in zip(requests, got, strict=True):
        expected, right = alone(model, *map(ids_of, request.args), 2)
        assert score == pytest.approx(expected, abs=1e-10) and greedy is all(right)
    assert [len(answer.correct) for answer in got] == [1] * 11 + [2]


def test_a_context_is_read_once_for_all_its_continuations(models, monkeypatch):
    model = models["hard, delta net"]
    lm = lm_of(model, 3, batch_size=5)
    read, real = [], lm._backbone
    monkeypatch.setattr(
        lm, "_backbone", lambda rows, **kw: read.append(list(map(len, rows))) or real(rows, **kw)
    )
    contexts = [" ".join(word(n, seed=n)) for n in (9, 11)]
    requests = [
        Instance("", {}, (context, " " + " ".join([WORDS[n], *word(n - 1, seed=n)])), 0)
        for context in contexts
        for n in (1, 2, 4, 6)
    ]
    got = lm.loglikelihood(requests, disable_tqdm=True)
    for request, (score, greedy) in zip(requests, got, strict=True):
        expected, right = alone(model, *map(ids_of, request.args), 3)
        assert score == pytest.approx(expected, abs=1e-10) and greedy is all(right)
    # A continuation of one token needs no reading but its context's. The last row is a batch alone.
    assert read == [[11, 9], [5, 3, 1, 5, 3], [10]]


def test_beginnings_are_found_as_by_comparing_every_pair():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        rows = [
            torch.randint(0, 2, (n,), generator=generator).tolist()
            for n in torch.randint(1, 5, (9,), generator=generator).tolist()
        ]
        grouped = group_by_prefix(rows)
        begins = [
            [other != row and other[: len(row)] == row for other in rows] for row in rows
        ]
        longest = {tuple(row) for row, b in zip(rows, begins, strict=True) if not any(b)}
        assert sorted(grouped) == sorted(longest)
        assert sorted(i for group in grouped.values() for i in group) == list(range(len(rows)))
        for leaf, group in grouped.items():
            assert all(list(leaf[: len(rows[i])]) == rows[i] for i in group)


def test_a_tokenizer_that_ends_every_text_does_not_end_a_prompt():
    """ByT5 puts an eos token behind whatever it encodes; a continuation would come behind it."""
    model = small_model(vocab_size=259)
    lm = HybridSleepLM(model, 2, tokenizer=ByT5Tokenizer(extra_ids=0), batch_size=2)
    context, target = [b + 3 for b in b"a sleeping"], [b + 3 for b in b" model"]
    pair = Instance("loglikelihood", {}, ("a sleeping", " model"), 0)
    ((score, greedy),) = lm.loglikelihood([pair], disable_tqdm=True)
    expected, right = alone(model, context, target, 2)
    assert score == pytest.approx(expected, abs=1e-10) and greedy is all(right)
    ids, mask = lm.tok_batch_encode(["abc", "a"])
    assert ids.tolist() == [[100, 101, 102], [0, 0, 100]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    (text,) = lm.loglikelihood_rolling([Instance("", {}, ("abc",), 0)], disable_tqdm=True)
    assert text == pytest.approx(alone(model, [1], [100, 101, 102], 2)[0], abs=1e-10)


def test_automatic_batch_size_halves_until_it_fits(models, monkeypatch):
    lm = lm_of(models["hard, delta net"], 2, batch_size="auto", max_batch_size=12)
    real, sizes = lm._backbone, []

    def read(rows, **kwargs):
        sizes.append((len(rows), max(map(len, rows))))
        if len(rows) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(rows, **kwargs)

    monkeypatch.setattr(lm, "_backbone", read)
    requests = [
        Instance("loglikelihood", {}, (d["context"], " " + d["text"]), 0) for d in DOCUMENTS
    ]
    got = lm.loglikelihood(requests, disable_tqdm=True)
    longest = max(len(ids_of(d["context"] + " " + d["text"])) - 1 for d in DOCUMENTS)
    assert sizes[:3] == [(12, longest), (6, longest), (3, longest)]
    assert [size for size, _ in sizes[3:]] == [3, 3, 1]
    assert got == lm_of(models["hard, delta net"], 2, batch_size=3).loglikelihood(
        requests, disable_tqdm=True
    )
    replies = [
        Instance("", {}, (d["context"], {"until": ["c"], "max_gen_toks": 3}), 0) for d in DOCUMENTS
    ]
    assert len(lm.generate_until(replies, disable_tqdm=True)) == len(DOCUMENTS)
    assert lm.batch_size == "auto"


def test_other_errors_are_not_taken_for_a_lack_of_memory(models, monkeypatch):
    lm = lm_of(models["hard, delta net"], 2, batch_size="auto")

    def broken(rows, **kwargs):
        raise RuntimeError("a defect")

    monkeypatch.setattr(lm, "_backbone", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        lm.loglikelihood([Instance("", {}, ("a", " b"), 0)], disable_tqdm=True)


def test_of_a_text_that_is_too_long_the_end_is_read(models, caplog):
    model = models["hard, delta net"]
    lm = lm_of(model, 2, max_length=6)
    context, target = word(9, seed=1), word(3, seed=2)
    pair = Instance("", {}, (" ".join(context), " " + " ".join(target)), 0)
    ((score, _),) = lm.loglikelihood([pair], disable_tqdm=True)
    expected, _ = alone(model, ids_of(" ".join(context[-4:])), ids_of(" ".join(target)), 2)
    assert score == pytest.approx(expected, abs=1e-10)
    assert "1 texts truncated to their last 7 tokens (max_length)" in caplog.text
    # A text longer than that is predicted in parts, each behind the last token of the one before.
    text = word(8, seed=3)
    (score,) = lm.loglikelihood_rolling([Instance("", {}, (" ".join(text),), 0)], disable_tqdm=True)
    ids = ids_of(" ".join(text))
    parts = alone(model, [END], ids[:6], 2)[0] + alone(model, ids[1:6], ids[6:], 2)[0]
    assert score == pytest.approx(parts, abs=1e-10)


def test_a_text_longer_than_what_lm_eval_would_truncate_to_is_scored_whole():
    """lm-eval scores texts longer than 2048 tokens in parts, unless a model says it takes more."""
    model = small_model(vocab_size=len(WORDS), window=700)
    text = word(2100, seed=4)
    (score,) = lm_of(model, 2).loglikelihood_rolling(
        [Instance("", {}, (" ".join(text),), 0)], disable_tqdm=True
    )
    whole, _ = alone(model, [END], ids_of(" ".join(text)), 2)
    assert score == pytest.approx(whole, abs=1e-8)


def test_an_answer_survives_copies():
    answer = Likelihood(-1.5, [True, False])
    assert answer == (-1.5, False)
    for same in (copy.deepcopy(answer), pickle.loads(pickle.dumps(answer))):
        assert same == answer and same.correct == (True, False)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("a zebra", " b"), "a text must have tokens of the model, 0..10, got '<unk>', token 12"),
        (("a b", ""), "a continuation .*must have at least one token .*got 0 of 2 tokens"),
    ],
)
def test_what_cannot_be_asked_is_refused(models, pair, message):
    lm = lm_of(models["hard, delta net"])
    with pytest.raises(ValueError, match=message):
        lm.loglikelihood([Instance("", {}, pair, 0)], disable_tqdm=True)
    with pytest.raises(ValueError, match="sleep_passes must be an integer of at least 1"):
        lm.sleep_passes = 0


def test_a_text_without_context_needs_a_token_before_it(models):
    tokenizer = WordTokenizer([f"w{i}" for i in range(len(WORDS))])
    model = models["hard, delta net"]
    request = [Instance("", {}, ("w1 w2",), 0)]
    with pytest.raises(ValueError, match=r"prefix_token_id, .* must be .* 0..10, got 11"):
        HybridSleepLM(model, tokenizer=tokenizer).loglikelihood_rolling(request)
    lm = HybridSleepLM(model, tokenizer=tokenizer, prefix_token_id=3)
    (score,) = lm.loglikelihood_rolling(request, disable_tqdm=True)
    assert score == pytest.approx(alone(model, [3], [1, 2], 1)[0], abs=1e-10)
