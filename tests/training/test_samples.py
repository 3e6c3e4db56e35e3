"""Samples far past the window, against drawing each token by hand."""

import math

import pytest
import torch
from small import small_config, small_model

from hybrid_sleep.training.data import derive_seed
from hybrid_sleep.training.text.samples import samples
from hybrid_sleep.training.text.tokenizer import load_tokenizer

WINDOW = 5


@pytest.fixture(scope="module")
def model():
    return small_model(small_config(vocab_size=259, sleep_schedule="every_window"))


def test_samples_are_drawn_from_the_models_own_distribution(model):
    """Each token again by hand: a whole forward over all that came before, the same random draw."""
    tokenizer = load_tokenizer("bytes")
    prompts, count = ["ab", "c"], 4 * WINDOW
    texts = samples(model, tokenizer, prompts, tokens=count, passes=2, seed=7)
    state = torch.get_rng_state()
    assert texts == samples(model, tokenizer, prompts, tokens=count, passes=2, seed=7)
    assert torch.equal(state, torch.get_rng_state())
    assert texts[0] == samples(model, tokenizer, prompts[:1], tokens=count, passes=2, seed=7)[0]
    assert texts != samples(model, tokenizer, prompts, tokens=count, passes=2, seed=8)
    assert texts != samples(model, tokenizer, prompts, tokens=count, passes=1, seed=7)

    for place, prompt in enumerate(prompts):
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])
        before = ids.shape[1]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(derive_seed("sample", 7, place))
            for _ in range(count):
                logits = model(input_ids=ids, sleep_passes=2, use_cache=False).logits[:, -1].float()
                logits[:, tokenizer.eos_token_id] = -math.inf
                drawn = torch.multinomial((logits / 0.8).softmax(-1), 1)
                ids = torch.cat([ids, drawn], dim=1)
        assert texts[place] == tokenizer.decode(ids[0, before:], skip_special_tokens=True)


def test_samples_hold_only_tokens_that_the_tokenizer_knows(monkeypatch):
    """Of 2000 tokens of the model it knows 259, about one in eight of what it would draw."""
    model, tokenizer = small_model(small_config(vocab_size=2000)), load_tokenizer("bytes")
    written, generate = [], model.generate
    monkeypatch.setattr(
        model, "generate", lambda *args, **kw: written.append(generate(*args, **kw)) or written[-1]
    )
    (text,) = samples(model, tokenizer, ["a"], tokens=20)
    new = written[0][0, 1:]
    assert len(new) == 20 and new.max() < len(tokenizer)
    assert text == tokenizer.decode(new, skip_special_tokens=True)


def test_a_prompt_without_tokens_is_refused(model):
    with pytest.raises(ValueError, match="prompt must have one or more tokens, got ''"):
        samples(model, load_tokenizer("bytes"), ["a", ""], tokens=2)
    with pytest.raises(ValueError, match="tokens must be an integer of at least 1, got 0"):
        samples(model, load_tokenizer("bytes"), ["a"], tokens=0)
