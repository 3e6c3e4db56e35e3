"""generate() gives what full forwards give, to every row what it would get alone."""

from __future__ import annotations

import pytest
import torch
from marks import halved
from small import assert_same, gap, small_ids, small_model, snapshot
from transformers import DynamicCache

from hybrid_sleep import SleepCache
from hybrid_sleep.configuration import STATE_SPACES
from hybrid_sleep.sleep.options import EVICTIONS

EXACT = 1e-10
LENGTHS = (13, 4, 8, 1)


def greedy(model, ids: torch.Tensor, count: int, depth: int) -> torch.Tensor:
    """Whole forwards over everything so far, without a cache."""
    with torch.no_grad():
        for _ in range(count):
            logits = model(ids, sleep_passes=depth, use_cache=False).logits[:, -1]
            ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
    return ids


def generate(model, ids, count: int, depth: int, **options):
    return model.generate(
        ids,
        **{
            "max_new_tokens": count,
            "sleep_passes": depth,
            "do_sample": False,
            "return_dict_in_generate": True,
            **options,
        },
    )


def lively(**changes):
    """A model whose greedy answers are not one token for ever."""
    return small_model(**{"noise": 0.4, "seed": 3, **changes})


def padded(ids: torch.Tensor, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows cut to LENGTHS and padded; the ids under pads are arbitrary."""
    width = ids.shape[1]
    mask = (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long()
    if side == "left":
        mask = mask.flip(1)
    if side == "inside":
        mask = torch.zeros_like(ids)
        for b, length in enumerate(LENGTHS):
            mask[b, torch.randperm(width)[:length]] = 1
    out = small_ids(*ids.shape, seed=9)
    for b, length in enumerate(LENGTHS):
        out[b, mask[b].bool()] = ids[b, :length]
    return out, mask


def assert_row_equals(cache: SleepCache, b: int, alone: SleepCache) -> None:
    """Row b remembers what a cache of that row alone does."""
    for name in ("counts", "positions", "sleeps", "kept"):
        assert getattr(cache, name)[b] == getattr(alone, name)[0], name
    for i, S in alone.fast_weights.items():
        assert gap(cache.fast_weights[i][b], S[0]) <= EXACT


@pytest.mark.parametrize(
    ("loop", "eviction", "state_space"), halved([None, (0, 2)], EVICTIONS, STATE_SPACES)
)
def test_greedy_is_the_argmax_of_whole_forwards(state_space, eviction, loop):
    model = lively(state_space=state_space, eviction=eviction, loop=loop)
    ids = small_ids(2, 12)
    wanted = greedy(model, ids, 14, 3)
    assert len(wanted[:, 12:].unique()) > 1
    out = generate(model, ids, 14, 3)
    assert torch.equal(out.sequences, wanted)
    cache = out.cache
    assert cache.positions.tolist() == [25, 25]
    assert cache.sleeps.tolist() == [4, 4]
    assert [r.passes for r in cache.reports] == [3] * 4
    assert torch.equal(generate(model, ids, 14, 3, use_cache=False).sequences, wanted)


def test_depth_comes_from_the_call_or_the_config():
    shallow, deep = lively(sleep_passes=1), lively(sleep_passes=3)
    ids = small_ids(2, 12)
    one, three = generate(shallow, ids, 9, None), generate(deep, ids, 9, None)
    assert torch.equal(three.sequences, generate(shallow, ids, 9, 3).sequences)
    assert torch.equal(one.sequences, generate(deep, ids, 9, 1).sequences)
    assert {r.passes for r in three.cache.reports} == {3}
    assert {r.passes for r in one.cache.reports} == {1}
    auto = generate(shallow, ids, 9, "auto").cache
    assert all(2 <= r.passes <= 16 for r in auto.reports)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_sampling_draws_from_whole_forwards(temperature):
    model = lively()
    ids = small_ids(3, 7)
    torch.manual_seed(5)
    out = generate(model, ids, 10, 2, do_sample=True, top_k=0, temperature=temperature)
    torch.manual_seed(5)
    wanted = ids
    with torch.no_grad():
        for _ in range(10):
            logits = model(wanted, sleep_passes=2).logits[:, -1].float() / temperature
            drawn = torch.multinomial(logits.softmax(-1), 1)
            wanted = torch.cat((wanted, drawn), 1)
    assert torch.equal(out.sequences, wanted)


@pytest.mark.parametrize(
    ("side", "eviction"), halved(["left", "right", "inside"], EVICTIONS)
)
def test_each_row_gets_what_it_gets_alone(side, eviction):
    model = lively(eviction=eviction, loop=(0, 3))
    ids = small_ids(4, 13)
    prompt, mask = padded(ids, side)
    out = generate(model, prompt, 11, 3, attention_mask=mask)
    assert torch.equal(out.sequences[:, :13], prompt)
    for b, length in enumerate(LENGTHS):
        alone = generate(model, ids[b : b + 1, :length], 11, 3)
        assert torch.equal(out.sequences[b, 13:], alone.sequences[0, length:])
        assert_row_equals(out.cache, b, alone.cache)
        slept = [r for r in out.cache.reports if b in r.rows]
        assert len(slept) == len(alone.cache.reports)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pad_token_id_marks_pads_where_no_mask_is_given(side):
    model = lively()
    ids = small_ids(4, 13) % 10
    prompt, mask = padded(ids, side)
    prompt[mask == 0] = 10
    one = generate(model, prompt, 6, 2, pad_token_id=10)
    two = generate(model, prompt, 6, 2, attention_mask=mask)
    assert torch.equal(one.sequences, two.sequences)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_embeddings(side):
    model = lively()
    ids, mask = padded(small_ids(4, 13), side)
    wanted = generate(model, ids, 8, 3, attention_mask=mask).sequences[:, 13:]
    embeds = model.model.embed_tokens(ids).detach()
    out = generate(model, None, 8, 3, inputs_embeds=embeds, attention_mask=mask)
    assert torch.equal(out.sequences[:, -8:], wanted)


class Listener:
    """What transformers asks of a streamer."""

    def __init__(self):
        self.heard, self.ended = [], False

    def put(self, value):
        self.heard.append(value.clone())

    def end(self):
        self.ended = True


def test_streaming():
    model = lively()
    ids = small_ids(1, 8)
    listener = Listener()
    wanted = generate(model, ids, 9, 2, streamer=listener).sequences
    assert listener.ended
    assert torch.equal(listener.heard[0].reshape(1, -1), ids)
    assert torch.equal(torch.cat([x.reshape(1, -1) for x in listener.heard], 1), wanted)


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_finished_rows_read_no_further(eviction):
    model = lively(eviction=eviction)
    ids = small_ids(4, 13)
    prompt, mask = padded(ids, "left")
    free = generate(model, prompt, 20, 2, attention_mask=mask).sequences[:, 13:]

    def stops(token):
        hits = free == token
        return torch.where(hits.any(1), hits.int().argmax(1), 20).tolist()

    eos = max(range(11), key=lambda token: len(set(stops(token))))
    assert len(set(stops(eos))) > 1
    # Were the pads themselves the end token, a row could not forget that it is finished.
    pad = (eos + 1) % 11
    out = generate(model, prompt, 20, 2, attention_mask=mask, eos_token_id=eos, pad_token_id=pad)
    for b, length in enumerate(LENGTHS):
        row = ids[b : b + 1, :length]
        # Without a mask, a pad token in the prompt would count as a pad.
        options = {"attention_mask": torch.ones_like(row), "eos_token_id": eos}
        alone = generate(model, row, 20, 2, **options, pad_token_id=pad)
        said = alone.sequences[0, length:]
        assert len(said) == min(20, stops(eos)[b] + 1)
        assert torch.equal(out.sequences[b, 13 : 13 + len(said)], said)
        assert (out.sequences[b, 13 + len(said) :] == pad).all()
        assert_row_equals(out.cache, b, alone.cache)
    # The next call starts afresh: nobody is finished any more.
    more = small_ids(4, 3, seed=4)
    again = generate(model, more, 4, 2, cache=out.cache)
    for b, length in enumerate(LENGTHS):
        read = int(min(stops(eos)[b], 19))
        past = torch.cat((ids[b, :length], free[b, :read], more[b]))[None]
        assert torch.equal(again.sequences[b, 3:], greedy(model, past, 4, 2)[0, -4:])


@pytest.mark.parametrize(("long_mask", "eviction"), halved([False, True], EVICTIONS))
def test_a_conversation_equals_one_long_run(eviction, long_mask):
    """A turn gives the cache the last answer's last token, which it has not read, and new text."""
    model = lively(eviction=eviction)
    cache = SleepCache(model.config)
    heard = [torch.zeros(0, dtype=torch.long)] * 3
    last = None
    for turn, width in enumerate((7, 3, 6)):
        new = small_ids(3, width, seed=turn)
        mask = torch.ones_like(new)
        mask[1, 1:2], mask[2, 2:] = 0, 0
        if last is not None:
            new, mask = torch.cat((last, new), 1), torch.cat((torch.ones_like(last), mask), 1)
        heard = [torch.cat((x, new[b, mask[b].bool()])) for b, x in enumerate(heard)]
        given = mask
        if long_mask:
            given = torch.cat((torch.ones(3, cache.get_seq_length(), dtype=torch.long), mask), 1)
        out = generate(model, new, 6, 2, cache=cache, attention_mask=given)
        assert out.cache is cache
        for b in range(3):
            wanted = greedy(model, heard[b][None], 6, 2)
            assert torch.equal(out.sequences[b, -6:], wanted[0, -6:]), (turn, b)
        last = out.sequences[:, -1:]
        heard = [torch.cat((x, out.sequences[b, -6:-1])) for b, x in enumerate(heard)]
    for b in range(3):
        alone = model(heard[b][None], sleep_passes=2).cache
        assert_row_equals(cache, b, alone)


def test_several_answers_leave_the_given_cache_alone():
    model = lively()
    past, new = small_ids(2, 8), small_ids(2, 4, seed=1)
    with torch.no_grad():
        cache = model(past, sleep_passes=2).cache
    before = snapshot(cache)
    torch.manual_seed(3)
    out = generate(
        model, new, 7, 2, cache=cache, do_sample=True, top_k=0, num_return_sequences=3
    )
    assert_same(before, snapshot(cache))
    torch.manual_seed(3)
    whole = generate(
        model, torch.cat((past, new), 1), 7, 2, do_sample=True, top_k=0, num_return_sequences=3
    )
    assert torch.equal(out.sequences[:, 4:], whole.sequences[:, 12:])
    beams = generate(model, new, 7, 2, cache=cache, num_beams=3)
    assert_same(before, snapshot(cache))
    whole = generate(model, torch.cat((past, new), 1), 7, 2, num_beams=3)
    assert torch.equal(beams.sequences[:, 4:], whole.sequences[:, 12:])


REFUSED = {
    "assistant_model": lambda model: model,
    "prompt_lookup_num_tokens": lambda model: 2,
    "prefill_chunk_size": lambda model: 4,
    "cache": lambda model: DynamicCache(),
    "cache_implementation": lambda model: "static",
    "sleep_passes": lambda model: 0,
}


@pytest.mark.parametrize("argument", REFUSED)
def test_what_cannot_work_is_refused_by_name(argument):
    model = lively()
    with pytest.raises(ValueError, match=argument):
        model.generate(
            small_ids(1, 6), max_new_tokens=4, **{argument: REFUSED[argument](model)}
        )


@pytest.mark.parametrize("kind", ["static", "quantized", "offloaded", "dynamic"])
def test_no_other_cache_holds_fast_weights(kind):
    with pytest.raises(ValueError, match="cache_implementation"):
        lively().generate(small_ids(1, 6), max_new_tokens=4, cache_implementation=kind)
