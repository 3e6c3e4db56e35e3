"""What is sampled against the softmax, with every filter that a checkpoint may ask for."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from editable import tiny_hybrid, tiny_llama, word_tokenizer

from hybrid_sleep.parametric.sampling import continuations

VOCAB = 100
DRAWS = 4000
HOSTILE = {
    "top_k": 50, "top_p": 0.8, "min_p": 0.05, "temperature": 0.5, "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1, "eos_token_id": [2, 7], "pad_token_id": 0, "do_sample": False,
    "max_length": 5, "suppress_tokens": [4],
}  # fmt: skip


def made(make):
    model = make(vocab_size=VOCAB)
    with torch.no_grad():
        # Close to flat, so that much lies behind the first fifty.
        model.get_output_embeddings().weight.mul_(0.5)
    model.generation_config.update(**HOSTILE)
    return model


def p_value(model, prompt, tokens):
    with torch.no_grad():
        expected = DRAWS * model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    assert float(expected.min()) > 5
    seen = torch.bincount(torch.tensor(tokens), minlength=VOCAB)
    return scipy.stats.chisquare(seen.tolist(), expected.tolist()).pvalue


@pytest.mark.parametrize("make", [tiny_llama, tiny_hybrid])
def test_draws_are_of_the_whole_softmax_at_temperature_1(make):
    model, tokenizer = made(make), word_tokenizer()
    # The second one is repeated in its row, and rows of two lengths stand in one batch.
    prompts = [[9, 4, 7], [11, 3, 3, 5, 2]]
    written = continuations(model, tokenizer, prompts * DRAWS, 1, seed=5, at_once=2500)
    for i, prompt in enumerate(prompts):
        assert p_value(model, prompt, [row[0] for row in written[i::2]]) > 0.01


def test_the_test_would_see_a_filter(monkeypatch):
    model, tokenizer = made(tiny_llama), word_tokenizer()
    generate = model.generate
    filtered = lambda *a, **given: generate(*a, **{**given, "top_k": 50})  # noqa: E731
    monkeypatch.setattr(model, "generate", filtered)
    written = continuations(model, tokenizer, [[9, 4, 7]] * DRAWS, 1, seed=5, at_once=2500)
    assert p_value(model, [9, 4, 7], [row[0] for row in written]) < 1e-50


def test_rows_go_on_behind_an_end_to_their_full_length_and_nothing_is_changed():
    model, tokenizer = made(tiny_llama).train(), word_tokenizer()
    config = model.generation_config
    torch.manual_seed(3)
    state = torch.get_rng_state()
    told = []
    prompts = [[1, 5], [1], [1, 5, 6]] * 20
    got = continuations(
        model, tokenizer, prompts, 30, seed=1, at_once=16, progress=lambda *at: told.append(at)
    )
    assert [len(row) for row in got] == [30] * 60
    assert any(2 in row[:-1] for row in got) and any(len(set(row)) < 30 for row in got)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert model.generation_config is config and config.top_k == 50
    assert all(p.requires_grad for p in model.parameters())
    assert told == [(16, 60), (32, 60), (48, 60), (60, 60)]
    torch.manual_seed(9)
    assert continuations(model, tokenizer, prompts, 30, seed=1, at_once=16) == got
    assert continuations(model, tokenizer, prompts, 30, seed=2, at_once=16) != got


def test_each_row_gets_what_was_written_behind_it():
    model, tokenizer = tiny_llama(vocab_size=32), word_tokenizer()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # Whatever token stands last says itself again.
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        hidden = torch.linalg.qr(
            torch.randn(32, 32, dtype=torch.float64, generator=generator)
        )[0][:, :16]
        model.model.embed_tokens.weight.copy_(hidden)
        model.lm_head.weight.copy_(hidden * 200)
    prompts = [[9, 4, 7], [3], [5, 6], [8, 8, 8, 2], [4]]
    got = continuations(model, tokenizer, prompts, 2, at_once=2)
    assert got == [[p[-1]] * 2 for p in prompts]


def test_what_cannot_be_is_refused_and_the_config_comes_back(monkeypatch):
    model, tokenizer = tiny_llama(), word_tokenizer()
    config = model.generation_config
    for given in ({"tokens": 0}, {"tokens": 1, "at_once": 0}):
        with pytest.raises(ValueError, match=f"{list(given)[-1]} must be"):
            continuations(model, tokenizer, [[1]], **given)
    with pytest.raises(ValueError, match="begun must be texts of at least one token"):
        continuations(model, tokenizer, [[1], []], 2)
    assert continuations(model, tokenizer, [], 2) == []

    def broken(*args, **given):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(KeyboardInterrupt):
        continuations(model, tokenizer, [[1]], 2)
    assert model.generation_config is config
