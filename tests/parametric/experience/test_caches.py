"""A sleep over what a model has in its fast weights: fast weights into slow ones."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from editable import VOCAB, tiny_hybrid, tiny_llama, word_tokenizer
from memories import OPEN, bits, same
from small import assert_same, snapshot

from hybrid_sleep import SleepCache
from hybrid_sleep.parametric import CachedContext, Memory, MemoryOptions, StudyOptions
from hybrid_sleep.parametric.experience.context import ids_of, rows_behind
from hybrid_sleep.parametric.experience.questions import Question, answered
from hybrid_sleep.parametric.experience.unfinished import FOLDER
from hybrid_sleep.parametric.measure import greedy
from hybrid_sleep.parametric.mix import Shares
from hybrid_sleep.parametric.sampling import continuations
from hybrid_sleep.training.data import derive_seed

TOKENIZER = word_tokenizer()
TEXT = [1, 5, 9, 6, 14, 20, 8, 25, 12, 7, 30]
STUDY = StudyOptions(
    tokens=1600, samples=8, length=2, shares=Shares(0.8, 0.0, 0.2), foundation=64, measured=4,
    rate=1e-2, strength=0.01,
)  # fmt: skip
ROWS = {"corpus": [[1, 4, 5, 6, 7], [1, 9, 8, 7, 6]], "ordinary": [[1, 10, 11, 12], [1, 3, 5]]}


def options(**changes):
    return MemoryOptions(thresholds=OPEN, study=replace(STUDY, **changes))


def read(model, *texts, passes=2):
    """A cache of rows that were read and slept over."""
    cache = SleepCache(model.config)
    with torch.no_grad():
        model(torch.tensor(texts or [TEXT]), cache=cache)
    model.sleep(cache, passes=passes)
    return cache


def differing(model, cache, count=3):
    """Prompts of two ids whose likeliest answer the cache changes, and that answer."""
    prompts = [(a, b) for a in range(3, 12) for b in range(12, 20)]
    with_it = greedy(model, TOKENIZER, prompts, tokens=1, cache=cache)
    without = greedy(model, TOKENIZER, prompts, tokens=1)
    found = [
        (list(prompt), a)
        for prompt, a, b in zip(prompts, with_it, without, strict=True)
        if a != b
    ]
    assert len(found) >= count
    return found[:count]


@pytest.fixture
def model():
    return tiny_hybrid()


@pytest.fixture
def opened(tmp_path):
    def make(model, folder=tmp_path / "memory", **changes):
        return Memory.open(folder, model, TOKENIZER, **{"options": options(), **ROWS, **changes})

    return make


def test_what_a_cache_gave_is_answered_without_it_after_a_sleep(model, opened, tmp_path):
    cache = read(model)
    questions = differing(model, cache)
    context = CachedContext(cache, [x for x, _ in questions], questions)
    held, reports = snapshot(cache), list(cache.reports)
    with opened(model) as memory:
        before = bits(model)
        record = memory.sleep(kind="experience", caches=[context])
        assert record.outcome == "committed", record
        assert record.read == {
            "experiences": 0, "tokens": 0, "caches": 1, "tokens in caches": len(TEXT), "prompts": 3,
        }  # fmt: skip
        assert (record.gate["without context"], record.gate["with context"]) == (0, 1)
        assert record.gate["before"]["acquired"] == 0 and record.gate["after"]["acquired"] > 0.5
        assert record.gate["study"]["mix"]["rows_of"]["recent"] > 0 and record.ids == []
        right = greedy(model, TOKENIZER, [x for x, _ in questions], tokens=1)
        shares = sum(a == b for a, (_, b) in zip(right, questions, strict=True)) / 3
        assert shares == record.gate["after"]["acquired"]
        # As it was, and of no use any more.
        assert_same(held, snapshot(cache))
        assert cache.reports == reports and not same(before, bits(model))
        with pytest.raises(ValueError, match="version"), torch.no_grad():
            model(torch.tensor([[5]]), cache=cache)
        with pytest.raises(ValueError, match=r"caches\[0\] was made under version"):
            memory.sleep(kind="experience", caches=[context])
        after = bits(model)
    # Not even a trace of prompts or questions is left beside the weights.
    text = b"".join(p.read_bytes() for p in (tmp_path / "memory").glob("*.db*"))
    assert str(questions[0][0]).encode() not in text
    fresh = tiny_hybrid()
    with opened(fresh, options=None) as memory:
        assert same(after, bits(fresh))
        memory.undo()
        assert same(before, bits(fresh))


def test_a_tried_sleep_gives_back_every_bit_and_the_caches_serve_on(model, opened):
    cache = read(model)
    context = CachedContext(cache, questions=differing(model, cache))
    held, before = snapshot(cache), bits(model)
    strict = replace(OPEN, perplexity_ratio=1.0)
    with opened(model, options=replace(options(), thresholds=strict)) as memory:
        tried = memory.sleep(kind="experience", caches=[context], dry_run=True)
        # The same again, as the cache still serves; now the gate alone speaks against it.
        failed = memory.sleep(kind="experience", caches=[context])
        assert tried.outcome == failed.outcome == "rolled back"
        assert "perplexity ratio" in failed.why
        assert same(before, bits(model)) and memory.asked(lambda s: s.weights()) == {}
    assert_same(held, snapshot(cache))
    assert answered(model, TOKENIZER, [Question(*x, cache) for x in context.questions]) == 0
    wanted = answered(
        model, TOKENIZER, [Question(*x, cache) for x in context.questions], with_source=True
    )
    assert wanted == 1


def test_the_teacher_says_what_the_model_with_the_text_in_its_window_says(model, opened):
    # Before any sleep the window holds the text itself, so the cache and the text are the same.
    cache = SleepCache(model.config)
    with torch.no_grad():
        model(torch.tensor([TEXT]), cache=cache)
    prompts = [[4, 5], [8, 9, 10], [3]]
    seen = []
    with opened(model) as memory, pytest.MonkeyPatch.context() as patch:
        from hybrid_sleep.parametric.experience import night

        train = night._train
        patch.setattr(night, "_train", lambda m, study, *a: [seen.extend(study.lessons), train(
            m, study, *a)][1])  # fmt: skip
        memory.sleep(kind="experience", caches=[CachedContext(cache, prompts)], dry_run=True)
    recent = [x for x in seen if x.part == "recent"]
    assert {x.row.origin for x in recent} == {"cache 0"}
    assert {x.ids[: x.row.start] for x in recent} == set(map(tuple, prompts))
    for lesson in {x.row: x for x in recent}.values():
        with torch.no_grad():
            logits = model(torch.tensor([[*TEXT, *lesson.ids]]), use_cache=False).logits[0]
        said = logits.log_softmax(-1)[-lesson.tokens - 1 : -1]
        assert torch.allclose(lesson.teacher, said, atol=1e-10, rtol=0)
    foundations = {x.row: x for x in seen if x.part == "foundation"}
    assert foundations
    for row, lesson in foundations.items():
        with torch.no_grad():
            logits = model(torch.tensor([row.ids]), use_cache=False).logits[0]
        assert torch.allclose(lesson.teacher, logits.log_softmax(-1)[:-1], atol=1e-10, rtol=0)


def test_going_on_from_a_cache_is_going_on_from_its_text(model):
    cache = SleepCache(model.config)
    with torch.no_grad():
        model(torch.tensor([TEXT]), cache=cache)
    held = snapshot(cache)
    prompts = [[4], [8, 9, 10], [3, 7]]
    whole = [[*TEXT, *x] for x in prompts]
    by_cache = greedy(model, TOKENIZER, prompts, tokens=6, cache=cache)
    assert by_cache == greedy(model, TOKENIZER, whole, tokens=6)
    assert by_cache != greedy(model, TOKENIZER, prompts, tokens=6)
    drawn = [
        continuations(model, TOKENIZER, rows, 4, seed=3, cache=held_in)
        for rows, held_in in ((prompts, cache), (whole, None))
    ]
    assert drawn[0] == drawn[1]
    # A prompt that begins as the text does is new all the same.
    assert greedy(model, TOKENIZER, [[*TEXT, 4]], tokens=2, cache=cache) == greedy(
        model, TOKENIZER, [[*TEXT, *TEXT, 4]], tokens=2
    )
    assert_same(held, snapshot(cache))


def test_rows_follow_the_prompts_in_turn_and_end_where_a_text_ends(model):
    cache = read(model)
    given = {"samples": 7, "length": 5, "origin": "cache 0"}
    rows = rows_behind(model, TOKENIZER, CachedContext(cache, [[4, 5], "Where", [9]]), **given)
    begun = [ids_of(TOKENIZER, x) for x in ([4, 5], "Where", [9])]
    assert [row.ids[: row.start] for row in rows] == [begun[i % 3] for i in range(7)]
    assert begun[1] == tuple(TOKENIZER("Question: Where\nAnswer:").input_ids)
    end = TOKENIZER.eos_token_id
    for row in rows_behind(
        model, TOKENIZER, CachedContext(cache), samples=64, length=12, origin="cache 0"
    ):
        new = row.ids[row.start :]
        assert row.ids[: row.start] == (TOKENIZER.bos_token_id,)
        assert end not in new[:-1] and (len(new) == 12 or new[-1] == end)
    # From a cache that still has the text in its window: what is written behind the text itself.
    unslept = SleepCache(model.config)
    with torch.no_grad():
        model(torch.tensor([TEXT]), cache=unslept)
    whole = continuations(
        model, TOKENIZER, [[*TEXT, 4, 5]] * 7, 5, seed=derive_seed("cache 0", 1)
    )
    by_cache = rows_behind(model, TOKENIZER, CachedContext(unslept, [[4, 5]]), seed=1, **given)
    assert [list(row.ids[2:]) for row in by_cache] == [
        new[: len(row.ids) - 2] for new, row in zip(whole, by_cache, strict=True)
    ]
    again = rows_behind(model, TOKENIZER, CachedContext(cache), seed=1, **given)
    assert again == rows_behind(model, TOKENIZER, CachedContext(cache), seed=1, **given)
    assert again != rows_behind(model, TOKENIZER, CachedContext(cache), seed=2, **given)
    many = CachedContext(cache, [[i] for i in range(3, 12)])
    assert len(rows_behind(model, TOKENIZER, many, **given)) == 9


def test_questions_in_words_are_asked_with_the_cache_as_a_turn(model):
    cache = read(model)
    prompt = ids_of(TOKENIZER, "Where does Ada live ?")
    (reply,) = greedy(model, TOKENIZER, [prompt], tokens=24, cache=cache)
    (alone,) = greedy(model, TOKENIZER, [prompt], tokens=24)
    words, others = (set(TOKENIZER.decode(x).split()) for x in (reply, alone))
    word = next(x for x in sorted(words - others) if x.isalpha())
    asked = [Question("Where does Ada live ?", word, cache)]
    assert answered(model, TOKENIZER, asked, with_source=True) == 1
    assert answered(model, TOKENIZER, asked) == 0


def test_caches_and_experience_are_learned_together(model, opened):
    pytest.importorskip("cryptography")
    cache = read(model)
    with opened(model, options=options(band=(0, 100), share=1.0, dreams=0)) as memory:
        memory.experience("Ada lives in Rome.", consent=True)
        questions, left = [("Where does Ada live ?", "Rome")], []
        record = memory.sleep(
            lambda *step: left.append((memory.folder / FOLDER).exists()),
            kind="experience", caches=[CachedContext(cache)], questions=questions,
        )  # fmt: skip
        # What caches say is nowhere on the disk in plain text, nor as ciphertext.
        assert left and not any(left)
        assert record.read["experiences"] == record.read["caches"] == 1
        assert record.gate["study"]["questions"] == 1
        assert record.gate["study"]["mix"]["rows_of"]["recent"] > 8


def test_caches_alone_need_none_of_the_packages_of_experience(model, opened, monkeypatch):
    for name in ("cryptography", "datasketch", "detect_secrets"):
        monkeypatch.setitem(sys.modules, name, None)
    cache = read(model)
    with opened(model, options=options(tokens=100)) as memory:
        before = bits(model)
        record = memory.sleep(kind="experience", caches=[CachedContext(cache)])
        assert record.outcome == "committed"
        assert any("nothing was asked" in note for note in record.notes)
        assert not same(before, bits(model))
        memory.undo()
        assert same(before, bits(model))


def test_a_full_sleep_takes_caches_too(model, opened):
    cache = read(model)
    with opened(model, options=options(tokens=100)) as memory:
        record = memory.sleep(kind="full", caches=[CachedContext(cache)])
        assert any(x.startswith("experience: committed") for x in record.notes)


def moved(model):
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)


@pytest.mark.parametrize(
    ("caches", "message", "more"),
    [
        (lambda m: [read(m)], r"caches\[0\] must be a CachedContext, got SleepCache", {}),
        (lambda m: [CachedContext(SleepCache(m.config))], "must hold one row .*, got 0 rows", {}),
        (lambda m: [CachedContext(read(m)), CachedContext(read(m, TEXT, TEXT))],
         r"caches\[1\] must hold one row .*, got 2 rows", {}),
        (lambda m: [CachedContext(read(tiny_hybrid()))], "made by another model object", {}),
        (lambda m: [CachedContext(read(m)), moved(m)][:1], "was made under version", {}),
        (lambda m: [CachedContext(read(tiny_hybrid(window=32)))], "another config: window", {}),
        (lambda m: [CachedContext(read(m))], "caches must be left out for kind 'facts'",
         {"kind": "facts"}),
        (lambda m: [CachedContext(read(m))], "questions must be about experience, of which there",
         {"questions": [("a", "b")]}),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_changes(model, opened, caches, message, more):
    with opened(model) as memory:
        given = caches(model)
        before = bits(model)
        with pytest.raises(ValueError, match=message):
            memory.sleep(**{"kind": "experience", "caches": given, **more})
        assert same(before, bits(model)) and memory.asked(lambda s: s.head) is None


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (lambda c: (None,), "cache must be a SleepCache, got NoneType"),
        (lambda c: (c, "Where?"), "prompts must be a sequence of prompts, got the text"),
        (lambda c: (c, [[]]), "prompts must be of at least a word or a token"),
        (lambda c: (c, [" "]), "prompts must be of at least a word or a token"),
        (lambda c: (c, [[-1]]), "token id in prompts must be an integer of at least 0, got -1"),
        (lambda c: (c, (), [("Where?", [4])]), "both in words or both in ids"),
        (lambda c: (c, (), [([4], [])]), "questions must be of at least a word or a token"),
    ],
)
def test_a_context_that_cannot_be_is_refused(model, parts, message):
    with pytest.raises(ValueError, match=message):
        CachedContext(*parts(SleepCache(model.config)))


def test_a_model_that_does_not_sleep_and_a_cache_that_is_not_finite_are_refused(model, opened):
    cache = read(model)
    with opened(tiny_llama()) as memory, pytest.raises(ValueError, match="of a model that sleeps"):
        memory.sleep(kind="experience", caches=[CachedContext(cache)])
    layer = next(iter(cache.fast_weights))
    state = cache.states[layer]
    cache.states[layer] = state._replace(S=torch.full_like(state.S, float("nan")))
    with opened(model, folder=memory.folder.parent / "other") as memory, pytest.raises(
        ValueError, match=r"caches\[0\]: the fast weights of layer"
    ):  # fmt: skip
        memory.sleep(kind="experience", caches=[CachedContext(cache)])


def test_a_cache_from_the_disk_is_taken(model, opened, tmp_path):
    read(model).save_pretrained(tmp_path / "cache")
    cache = SleepCache.from_pretrained(tmp_path / "cache", model=model)
    with opened(model, options=options(tokens=100)) as memory:
        assert memory.sleep(kind="experience", caches=[CachedContext(cache)]).commit == 1
    assert VOCAB > max(TEXT)
