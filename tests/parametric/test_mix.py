"""Shares of tokens against their definition, and weights against rows that are there twice."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from dreaming import dream
from editable import tiny_gpt2, tiny_hybrid, tiny_llama, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_sleep.parametric.dreams.dream import Check
from hybrid_sleep.parametric.dreams.losses import row_losses
from hybrid_sleep.parametric.mix import PARTS, Row, Shares, foundation, mix, weighted_mean


def rows_of(lengths, part="recent"):
    return [
        Row(tuple(range(n)), weight=1.0 + i % 2 / 2, origin=f"{part} {i}")
        for i, n in enumerate(lengths)
    ]


def parts(*numbers):
    return dict(zip(PARTS, (*numbers, 0), strict=True))


LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=8)
WEIGHTS = st.tuples(*[st.integers(0, 20)] * 4).filter(any)


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[LENGTHS] * 4), WEIGHTS, st.integers(100, 3000), st.integers(0, 5))
def test_shares_are_kept_to_within_a_row(lengths, weights, tokens, seed):
    given_ = zip(PARTS, lengths, strict=True)
    material = {part: rows_of(own, part) for part, own in given_}
    shares = Shares(*(w / sum(weights) for w in weights))
    got = mix(material, tokens, shares, seed=seed)
    longest = max(map(max, lengths))
    total = sum(got.tokens.values())
    for part in PARTS:
        own = [mixed.row for mixed in got.rows if mixed.part == part]
        assert got.tokens[part] == sum(len(row.ids) for row in own)
        assert got.rows_of[part] == len(own)
        assert got.asked[part] == pytest.approx(tokens * getattr(shares, part))
        half = max(len(row.ids) for row in material[part]) / 2
        assert abs(got.tokens[part] - got.asked[part]) <= half + 1e-9
        assert abs(got.tokens[part] - getattr(shares, part) * total) <= longest + 1e-9
        # Whole rows, as given, each as often as any other but for one.
        often = Counter(own)
        assert set(often) <= set(material[part])
        times = [often[row] for row in material[part]]
        assert max(times) - min(times) <= 1
        assert got.passes[part] == pytest.approx(len(own) / len(material[part]))
        assert got.shares[part] == pytest.approx(got.tokens[part] / total)
    assert got.missing == ()
    again = mix({part: list(own) for part, own in material.items()}, tokens, shares, seed=seed)
    assert again == got


def test_the_order_is_shuffled_by_the_seed():
    material = {part: rows_of([5] * 400, part) for part in PARTS}
    one, two = (mix(material, 1000, seed=seed) for seed in (0, 1))
    assert one.rows_of == two.rows_of == parts(90, 90, 20)
    for got in (one, two):
        for half in (got.rows[:100], got.rows[100:]):
            assert 30 < sum(mixed.part == "recent" for mixed in half) < 60
        assert {m.row.weight for m in got.rows} == {1.0, 1.5}
        assert all(m.row.origin.startswith(m.part) for m in got.rows)
    assert [m.part for m in one.rows] != [m.part for m in two.rows]
    drawn = [{m.row.origin for m in got.rows} for got in (one, two)]
    assert drawn[0] != drawn[1] and all(len(names) == 200 for names in drawn)
    data = json.loads(json.dumps(one.to_dict()))
    assert data["tokens"] == parts(450, 450, 100)
    assert data["shares"] == parts(0.45, 0.45, 0.1)
    assert "rows" not in data


def test_a_share_without_material_is_refused_or_reported():
    material = {"recent": rows_of([10] * 9), "dream": []}
    with pytest.raises(ValueError, match="material must have rows .* none of dream, foundation"):
        mix(material, 300)
    got = mix(material, 300, redistribute=True)
    assert got.missing == ("dream", "foundation") and got.to_dict()["missing"] == [*got.missing]
    assert got.tokens == parts(300, 0, 0)
    material["foundation"] = rows_of([10] * 9)
    got = mix(material, 550, redistribute=True)
    assert got.asked == pytest.approx(parts(450, 0, 100))
    assert got.tokens == parts(450, 0, 100)
    # A share of 0 needs nothing.
    got = mix(material, 100, Shares(0.5, 0.0, 0.5))
    assert got.missing == () and got.tokens == parts(50, 0, 50)
    with pytest.raises(ValueError, match="rows of a part with a share"):
        mix({}, 300, redistribute=True)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Shares(0.5, 0.4, 0.2), "shares must add up to 1, got 1.1"),
        (lambda: Shares(1.2, -0.2, 0.0), "dream must be a finite number of at least 0"),
        (lambda: mix({"old": rows_of([5])}, 10), r"material must be of recent, .* got \['old'\]"),
        (lambda: mix({}, 0), "tokens must be"),
        (lambda: mix({p: rows_of([50]) for p in PARTS}, 20), "tokens must be enough for a row"),
        (lambda: Row((1,)), "ids must have a token to predict from 1 on, got 1"),
        (lambda: Row((1, 2, 3), start=3), "ids must have a token to predict from 3 on"),
        (lambda: Row((1, 2), start=-1), "start must be"),
        (lambda: Row((1, 2), weight=0.0), "weight must be a finite number above 0"),
    ],
)
def test_what_is_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_dreams_are_taken_if_they_are_kept():
    one = dream()
    assert Row.of_dream(one) == Row(one.ids, one.start, 1.0, one.id)
    with pytest.raises(ValueError, match="dreams to train on must be kept, got dream-.*: helps"):
        Row.of_dream(one.checked(Check("helps", False)))


@pytest.mark.parametrize("make", [tiny_llama, tiny_hybrid])
def test_foundations_of_a_corpus_or_of_the_model_itself(make):
    model, tokenizer = make(), word_tokenizer()
    own = foundation(model, tokenizer, 40, length=8, seed=2)
    assert [len(row.ids) for row in own] == [8] * 5 and {r.origin for r in own} == {"own samples"}
    assert foundation(model, tokenizer, 40, length=8, seed=2) == own
    assert foundation(model, tokenizer, 40, length=8, seed=3) != own
    given_ = foundation(model, tokenizer, 40, [[1, 2], [], [5], [4, 5, 6]])
    assert [row.ids for row in given_] == [(1, 2), (4, 5, 6)]
    assert {row.origin for row in given_} == {"corpus"}
    with pytest.raises(ValueError, match="corpus must have a row of two tokens"):
        foundation(model, tokenizer, 40, [[1]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (7,), (1013,), (5, 3)])
def test_a_weight_of_one_is_none_bit_for_bit(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    one, two = (losses.clone().requires_grad_() for _ in range(2))
    weighted = weighted_mean(one, torch.ones(shape))
    plain = two.mean()
    assert torch.equal(weighted, plain) and weighted.dtype == dtype
    weighted.backward()
    plain.backward()
    assert torch.equal(one.grad, two.grad)


def test_a_weight_of_three_halves_is_three_rows_beside_two():
    model = tiny_gpt2()
    rows = [((1, 5, 6, 7), 1), ((1, 9, 4), 2)]
    weighted = weighted_mean(row_losses(model, rows), torch.tensor([1.5, 1.0]))
    weighted.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    copied = row_losses(model, [rows[0]] * 3 + [rows[1]] * 2).mean()
    copied.backward()
    assert weighted.item() == pytest.approx(copied.item(), rel=1e-12)
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-10, atol=1e-12)
    # Unlike a mean of w l, all weights may be as large as they like.
    losses = torch.tensor([1.0, 3.0])
    assert weighted_mean(losses, torch.tensor([7.0, 7.0])).item() == 2.0
    assert weighted_mean(losses, torch.tensor([0.0, 2.0])).item() == 3.0
    assert weighted_mean(losses, torch.tensor([3, 1])).item() == 1.5


@pytest.mark.parametrize(
    "weights, message",
    [
        ([1.0], r"weights must have the shape of losses, \(2,\), got \(1,\)"),
        ([1.0, -1.0], "weights must be finite, at least 0"),
        ([0.0, 0.0], "not all 0"),
        ([1.0, float("nan")], "weights must be finite"),
        ([1.0, float("inf")], "weights must be finite"),
    ],
)
def test_weights_out_of_range(weights, message):
    with pytest.raises(ValueError, match=message):
        weighted_mean(torch.tensor([1.0, 2.0]), torch.tensor(weights))
