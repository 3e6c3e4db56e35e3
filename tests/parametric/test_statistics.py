"""The second moment of keys against brute force in fp64, and what its sketch promises."""

from __future__ import annotations

import hashlib
import json

import pytest
import scipy.stats
import torch
from editable import VOCAB, tiny_hybrid, tiny_llama, word_tokenizer
from small import small_ids, small_model

from hybrid_sleep.parametric.sites import find_sites, site_at
from hybrid_sleep.parametric.solve import Spectrum
from hybrid_sleep.parametric.statistics import (
    KeyStatistics,
    SecondMoment,
    Sketch,
    collect,
    load_or_collect,
    own_samples,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(spectrum: Spectrum) -> torch.Tensor:
    """The matrix that a spectrum stands for."""
    V, d = spectrum.vectors, len(spectrum.vectors)
    rest = torch.eye(d, dtype=torch.float64) - V @ V.T
    return V @ torch.diag(spectrum.values) @ V.T + spectrum.floor * rest


def decaying(count: int, d: int, seed: int = 0) -> torch.Tensor:
    """Keys whose directions fade, as those of a model do."""
    basis = torch.linalg.qr(randn(d, d, seed=seed + 1))[0]
    return randn(count, d, seed=seed) * torch.logspace(0, -2, d, dtype=torch.float64) @ basis.T


def test_the_moment_is_the_mean_of_outer_products():
    keys = randn(50, 9)
    moment = SecondMoment(9)
    for part in keys.float().split([3, 40, 7]):
        moment.add(part)
    wanted = sum(torch.outer(k, k) for k in keys.float().double()) / 50
    torch.testing.assert_close(moment.total / moment.count, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dense(moment.spectrum()), wanted, rtol=1e-10, atol=1e-10)
    assert moment.count == 50 and moment.spectrum().mean == pytest.approx(
        float((keys**2).sum() / 50 / 9), rel=1e-5
    )


@pytest.mark.parametrize("rows", [4, 12, 20])
@pytest.mark.parametrize("split", [1, 7, 200])
def test_a_sketch_keeps_its_bound(rows, split):
    d, keys = 24, decaying(200, 24)
    sketch = Sketch(d, rows)
    for part in keys.split(split):
        sketch.add(part)
        assert len(sketch.held) <= 2 * rows
    spectrum, exact = sketch.spectrum(), keys.T @ keys
    assert spectrum.vectors.shape == (d, rows)
    error = torch.linalg.matrix_norm(exact - 200 * dense(spectrum), 2)
    values = torch.linalg.eigvalsh(exact).flip(0)
    bound = min(float(values[j:].sum()) / (2 * (rows - j)) for j in range(rows))
    assert 0 < error <= bound
    assert float(error) <= 200 * spectrum.floor * (1 + 1e-9)


@pytest.mark.parametrize("rank, rows", [(5, 8), (8, 8), (16, 99)])
def test_a_sketch_of_enough_rows_is_exact(rank, rows):
    d = 16
    keys = randn(120, rank) @ randn(rank, d, seed=1)
    sketch = Sketch(d, rows)
    for part in keys.split(11):
        sketch.add(part)
    spectrum = sketch.spectrum()
    assert spectrum.floor < 1e-12
    torch.testing.assert_close(dense(spectrum), keys.T @ keys / 120, rtol=1e-9, atol=1e-9)


def test_what_a_sketch_leaves_out_is_the_floor():
    d, rows = 40, 8
    keys = decaying(300, d)
    sketch = Sketch(d, rows)
    sketch.add(keys)
    spectrum = sketch.spectrum()
    assert spectrum.floor > 0
    # Every direction has at least the floor, so that none that keys do use counts as free.
    assert float(torch.linalg.eigvalsh(dense(spectrum))[0]) == pytest.approx(spectrum.floor)
    again = sketch.spectrum()
    torch.testing.assert_close(dense(again), dense(spectrum), rtol=1e-10, atol=1e-12)
    # And keys may still come.
    sketch.add(keys)
    assert sketch.count == 600
    with pytest.raises(ValueError, match="rows must be"):
        Sketch(4, 0)


def test_the_floor_is_the_middle_of_what_may_be_missing():
    sketch = Sketch(12, 4)
    sketch.add(torch.eye(12))
    spectrum = sketch.spectrum()
    # Twelve directions alike: four would have been as good as any others, so none is kept.
    assert spectrum.floor * 12 == pytest.approx(0.5)
    torch.testing.assert_close(12 * dense(spectrum), 0.5 * torch.eye(12, dtype=torch.float64))


def keys_by_hand(model, site, corpus, **forward):
    """Keys `[T, d]` of rows one by one, without pads."""
    found = []
    hook = model.get_submodule(site.name).register_forward_pre_hook(
        lambda module, given: found.append(given[0].reshape(-1, site.inputs))
    )
    with torch.no_grad():
        for row in corpus:
            model(input_ids=torch.tensor([row]), use_cache=False, **forward)
    hook.remove()
    return torch.cat(found)


def rows_of(lengths, vocab=VOCAB):
    return [small_ids(n, seed=i, vocab=vocab).tolist() for i, n in enumerate(lengths)]


MODELS = {
    "llama": tiny_llama,
    "ours": tiny_hybrid,
    # Windows of 5 that sleep, so that rows of one batch would be cut at places of their own.
    "ours, asleep": lambda: small_model(vocab_size=VOCAB, sleep_passes=3),
    "ours, shared": lambda: tiny_hybrid(distinct_layers=2),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("rows", [None, 6])
def test_collect_counts_every_key_of_a_real_token_once(kind, rows):
    model = MODELS[kind]().train()
    sites = find_sites(model)[:2]
    corpus = rows_of([7, 3, 12, 7, 7, 1, 12, 7, 7, 7, 7, 7, 7])
    told = []
    got = collect(
        model, sites, [[corpus[0], [], *corpus[1:]]], "digest", rows=rows,
        progress=lambda *at: told.append(at),
    )  # fmt: skip
    assert model.training and told[-1] == (13, 13) and told == sorted(told)
    model.eval()
    for site in sites:
        keys = keys_by_hand(model, site, corpus)
        exact = keys.T @ keys / len(keys)
        made_from, spectrum = got[site].made_from, got[site].spectrum
        assert made_from["tokens"] == len(keys)
        if rows is None:
            torch.testing.assert_close(dense(spectrum), exact, rtol=1e-9, atol=1e-9)
            assert made_from["method"] == "second moment"
        else:
            error = torch.linalg.matrix_norm(dense(spectrum) - exact, 2)
            assert float(error) <= spectrum.floor * (1 + 1e-9)
            assert made_from["method"] == "sketch of 6 rows"
        assert (made_from["model"], made_from["site"]) == ("digest", site.name)
    if "asleep" in kind:
        assert got[sites[0]].made_from["tokens"] > sum(map(len, corpus))


@pytest.mark.parametrize("rows", [None, 6])
def test_corpora_count_alike_however_long_they_are(rows):
    model = tiny_llama()
    site = site_at(model, 1)
    long, short = rows_of([12, 7, 12, 9, 12]), rows_of([7, 3])
    got = collect(model, [site], [long, [], short], "digest", rows=rows)[site]
    keys = [keys_by_hand(model, site, corpus) for corpus in (long, short)]
    exact = sum(k.T @ k / len(k) for k in keys) / 2
    assert got.made_from["tokens"] == sum(map(len, keys))
    error = torch.linalg.matrix_norm(dense(got.spectrum) - exact, 2)
    assert float(error) <= (1e-9 if rows is None else got.spectrum.floor * (1 + 1e-9))


def test_a_corpus_is_known_by_its_tokens():
    model = tiny_llama()
    site = site_at(model, 0)
    corpus = rows_of([9, 9, 12])

    def digest(corpus):
        return collect(model, [site], [corpus], "x")[site].made_from["corpus"]

    assert digest(corpus) == digest(list(corpus))
    assert digest(corpus) != digest([*corpus[:2], [*corpus[2][:-1], 0]])
    ordered = sorted(corpus, key=len)
    assert digest(corpus) == hashlib.sha256(json.dumps([ordered]).encode()).hexdigest()
    with pytest.raises(ValueError, match="corpora must have as many tokens .* 20, .* got 19"):
        collect(model, [site], [rows_of([9, 10])], "x")


def test_they_are_saved_whole_and_refused_for_another_model_or_site(tmp_path):
    model = tiny_llama()
    first, second = find_sites(model)[:2]
    got = collect(model, [first], [rows_of([30])], "digest", rows=6)[first]
    path = tmp_path / "folder" / "x.safetensors"
    path.parent.mkdir()
    got.save(path)
    back = KeyStatistics.load(path)
    assert back.made_from == got.made_from and back.spectrum.floor == got.spectrum.floor > 0
    assert torch.equal(back.spectrum.vectors, got.spectrum.vectors)
    assert torch.equal(back.spectrum.values, got.spectrum.values)
    back.check("digest", first)
    with pytest.raises(ValueError, match="of this model, 'other', got those of 'digest'"):
        back.check("other", first)
    with pytest.raises(ValueError, match="of this site, .*layers.1.*, got those of .*layers.0"):
        back.check("digest", second)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="x.safetensors is damaged"):
        KeyStatistics.load(path)
    with pytest.raises(FileNotFoundError, match="is missing"):
        KeyStatistics.load(tmp_path / "none")


def test_what_is_missing_is_collected_and_what_is_there_is_not(tmp_path):
    model = tiny_llama()
    first, second, _ = find_sites(model)
    asked = []

    def corpus():
        asked.append(1)
        return [rows_of([30])]

    one = load_or_collect(tmp_path, model, [first], "digest", corpus)
    two = load_or_collect(tmp_path, model, [first, second], "digest", corpus)
    again = load_or_collect(tmp_path, model, [first, second], "digest", corpus)
    assert len(asked) == 2 and list(again) == [first, second]
    assert torch.equal(one[first].spectrum.vectors, two[first].spectrum.vectors)
    with pytest.raises(ValueError, match="of this model"):
        load_or_collect(tmp_path, model, [first], "other", corpus)


@pytest.mark.parametrize("make", [tiny_llama, tiny_hybrid])
def test_samples_are_what_the_model_says_with_nothing_held_back(make):
    # More tokens than the 50 that generate() would choose from by itself.
    model = make(vocab_size=80)
    tokenizer = word_tokenizer()
    # What a checkpoint may bring along, and what would make every row end or repeat less.
    config = model.generation_config
    config.update(
        eos_token_id=[2, 5], top_k=3, min_p=0.2, temperature=0.3, no_repeat_ngram_size=1,
        do_sample=True, pad_token_id=0,
    )  # fmt: skip
    told = []
    rows = own_samples(
        model, tokenizer, 4000, length=2, at_once=512, progress=lambda *at: told.append(at)
    )
    assert len(rows) == 2000 and all(len(row) == 2 for row in rows) and told[-1] == (2000, 2000)
    assert {row[0] for row in rows} == {tokenizer.bos_token_id}
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[tokenizer.bos_token_id]])).logits[0, -1]
    expected = 2000 * logits.softmax(-1)
    seen = torch.bincount(torch.tensor([row[1] for row in rows]), minlength=80)
    often = expected >= 5
    assert often.sum() > 5
    rest = [[float(x[~often].sum())] * (not bool(often.all())) for x in (seen, expected)]
    result = scipy.stats.chisquare(
        seen[often].tolist() + rest[0], expected[often].tolist() + rest[1]
    )
    assert result.pvalue > 0.01
    assert model.generation_config is config and config.top_k == 3


def test_samples_behind_a_text_are_what_the_model_goes_on_with():
    model, tokenizer = tiny_llama(vocab_size=80), word_tokenizer()
    begun = [[9, 4, 7], [3]]
    rows = own_samples(model, tokenizer, 4000, length=1, behind=begun, at_once=3000)
    assert len(rows) == 4000
    for text in begun:
        after = [row[-1] for row in rows if row[:-1] == text]
        assert len(after) == 2000
        with torch.no_grad():
            p = model(input_ids=torch.tensor([text])).logits[0, -1].double().softmax(-1)
        seen = torch.bincount(torch.tensor(after), minlength=80)
        # The share of each token, within what 2,000 draws leave open.
        assert ((seen / 2000 - p).abs() < 5 * (p / 2000).sqrt() + 0.002).all()


def test_samples_go_on_behind_an_end_and_depend_on_the_seed_alone():
    model, tokenizer = tiny_llama(), word_tokenizer()
    model.generation_config.eos_token_id = 2
    with torch.no_grad():
        model.lm_head.weight.zero_()
        # Every token as likely, the end among them.
    torch.manual_seed(5)
    state = torch.get_rng_state()
    rows = own_samples(model, tokenizer, 640, length=32)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(row) for row in rows] == [32] * 20
    ended = [row for row in rows if 2 in row[1:-1]]
    assert ended and any(row[-1] != row[-2] for row in ended)
    torch.manual_seed(77)
    assert own_samples(model, tokenizer, 640, length=32) == rows
    assert own_samples(model, tokenizer, 640, length=32, seed=1) != rows
    with pytest.raises(ValueError, match="tokens must be"):
        own_samples(model, tokenizer, 0)
