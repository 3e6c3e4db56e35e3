"""What a model answers, against a greedy loop and losses by hand."""

from __future__ import annotations

import math

import pytest
import torch
from editable import VOCAB, tiny_hybrid, tiny_llama, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from small import small_ids, small_model

from hybrid_sleep.parametric.measure import (
    ask,
    calibration_error,
    chat_prompt,
    encode,
    mentions,
    pad_token,
    perplexity,
    read,
    right_padded,
    states,
)

WORDS = word_tokenizer()


@pytest.mark.parametrize(
    "text, answer, begins, has",
    [
        (" Lisbon", "Lisbon", True, True),
        ("Lisbon.", "Lisbon", True, True),
        (" Lisbon and Oslo", "Lisbon", True, True),
        (" Lisbons", "Lisbon", False, False),
        (" in Lisbon", "Lisbon", False, True),
        (" lisbon", "Lisbon", False, False),
        ("NewLisbon", "Lisbon", False, False),
        (" New York City", "New York", True, True),
        (" New  York", "New York", False, False),
        ("", "Lisbon", False, False),
        ("\n\tC++, I think", "C++", True, True),
        ("C+", "C++", False, False),
        (" axb", "a.b", False, False),
        ("It is C++.", "C++", False, True),
    ],
)
def test_an_answer_counts_in_whole_words(text, answer, begins, has):
    assert states(text, answer) is begins
    assert mentions(text, answer) is has


def greedy(model, prompt, tokens, **forward):
    """The continuation of one prompt, the whole text computed anew for every token."""
    ids = encode(WORDS, prompt)
    found = []
    for _ in range(tokens):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + found]), use_cache=False, **forward).logits
        found.append(int(logits[0, -1].argmax()))
        if found[-1] == 2:
            break
    return WORDS.decode(found, skip_special_tokens=True)


MODELS = {
    "llama": (tiny_llama, {}),
    "ours": (tiny_hybrid, {}),
    "ours, asleep": (lambda: small_model(vocab_size=VOCAB), {"sleep_passes": 3}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_answers_are_those_of_each_prompt_alone(kind):
    make, more = MODELS[kind]
    model = make().train()
    # What a checkpoint may bring along.
    model.generation_config.update(do_sample=True, temperature=0.5, eos_token_id=2)
    prompts = [
        "Ada Byron lives in", "The home of Bo Chan is", "Cy", "Where does Dee Engel live ?",
        "Today Ada Byron lives in Rome . Today",
    ]  # fmt: skip
    got = ask(model, WORDS, prompts, tokens=6, at_once=3, **more)
    assert model.training
    model.eval()
    assert got == [greedy(model, prompt, 6, **more) for prompt in prompts]
    assert len(set(got)) > 1
    assert ask(model, WORDS, prompts, tokens=6, **more) == got
    assert ask(model, WORDS, []) == []


def test_a_question_is_a_users_turn_or_plain_text():
    assert chat_prompt(WORDS, "Where ?") == "Question: Where ?\nAnswer:"
    assert chat_prompt(WORDS, "Where ?", "Be brief.") == "Be brief.\nQuestion: Where ?\nAnswer:"
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert chat_prompt(tokenizer, "Where ?") == "[user] Where ? [assistant]"
    told = chat_prompt(tokenizer, "Where ?", "Be brief.")
    assert told == "[system] Be brief. [user] Where ? [assistant]"


def test_any_token_fills_a_row():
    assert pad_token(WORDS) == 2
    WITH = word_tokenizer()
    WITH.pad_token = "<unk>"
    assert pad_token(WITH) == 0
    assert pad_token(object()) == 0
    ids, mask = right_padded([[5, 6, 7], [8]], "cpu")
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids[0].tolist() == [5, 6, 7] and ids[1, 0] == 8


@pytest.mark.parametrize("kind", MODELS)
def test_perplexity_is_that_of_every_row_alone(kind):
    make, more = MODELS[kind]
    model = make().train()
    rows = [small_ids(n, seed=i, vocab=VOCAB).tolist() for i, n in enumerate((7, 2, 13, 1, 6, 13))]
    got = perplexity(model, [*rows, []], at_once=2, **more)
    assert model.training
    model.eval()
    whole = read(model, [*rows, []], at_once=2, **more)
    assert whole.perplexity == got and 0 < whole.calibration_error < 1
    losses, guesses = [], []
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row]), use_cache=False, **more).logits[0]
        logp = logits.log_softmax(-1)
        losses += [-float(logp[i, row[i + 1]]) for i in range(len(row) - 1)]
        best = [(float(logp[i].max().exp()), int(logp[i].argmax())) for i in range(len(row) - 1)]
        guesses += [(c, g == token) for (c, g), token in zip(best, row[1:], strict=True)]
    assert len(losses) == 6 + 1 + 12 + 5 + 12
    assert got == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    # Rows come in the order that they were given in.
    assert whole.losses.tolist() == pytest.approx(losses, rel=1e-4)
    assert whole.confidences.tolist() == pytest.approx([c for c, _ in guesses], rel=1e-4)
    assert whole.right.tolist() == [right for _, right in guesses]
    with pytest.raises(ValueError, match="rows must hold a token behind another"):
        perplexity(model, [[3], []])


@pytest.mark.parametrize(
    ("bins", "error"),
    [
        # |1 - (.55 + .6) / 2| and |1 / 2 - (.8 + .9) / 2|, of half of the guesses each.
        (2, (0.425 + 0.35) / 2),
        # |3 / 4 - (.55 + .6 + .8 + .9) / 4|
        (1, 0.0375),
        # Two of the first, and one of each of the others.
        (3, 2 / 4 * 0.425 + 0.8 / 4 + 0.1 / 4),
        (4, (0.45 + 0.4 + 0.8 + 0.1) / 4),
        (15, (0.45 + 0.4 + 0.8 + 0.1) / 4),
    ],
)
def test_calibration_error_by_hand(bins, error):
    confidences, right = torch.tensor([0.9, 0.55, 0.8, 0.6]), torch.tensor([1, 1, 0, 1]).bool()
    assert calibration_error(confidences, right, bins) == pytest.approx(error, abs=1e-7)


def test_guesses_as_confident_as_they_are_right_have_no_error():
    # In whatever order: what is as confident shares a bin's accuracy.
    for right in ([1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1]):
        assert calibration_error(torch.full((4,), 0.5), torch.tensor(right).bool(), 2) == 0
    assert calibration_error(torch.ones(3), torch.zeros(3).bool()) == 1
    with pytest.raises(ValueError, match="right must be one for each of one or more guesses"):
        calibration_error(torch.ones(0), torch.ones(0).bool())


GUESSES = st.lists(
    st.tuples(st.sampled_from([0.1, 0.4, 0.5, 0.8, 0.95]), st.booleans()), min_size=1
)


@given(guesses=GUESSES, bins=st.integers(1, 6), turn=st.randoms())
def test_calibration_error_by_its_definition_in_any_order(guesses, bins, turn):
    ranked = sorted(c for c, _ in guesses)
    share = {c: [right for d, right in guesses if d == c] for c in ranked}
    bins_made, at = min(bins, len(ranked)), 0
    expected = 0.0
    for b in range(bins_made):
        size = len(ranked) // bins_made + (b < len(ranked) % bins_made)
        own = ranked[at : at + size]
        accuracy = sum(sum(share[c]) / len(share[c]) for c in own) / size
        expected += size / len(ranked) * abs(accuracy - sum(own) / size)
        at += size
    turn.shuffle(guesses)
    values = torch.tensor([c for c, _ in guesses], dtype=torch.float64)
    right = torch.tensor([r for _, r in guesses])
    assert calibration_error(values, right, bins) == pytest.approx(expected, abs=1e-12)
