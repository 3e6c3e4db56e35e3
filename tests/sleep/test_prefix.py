"""A cache knows the text that it has read, and reads none of it twice."""

import pytest
import torch
from small import small_ids, small_model
from transformers import DynamicCache

from hybrid_sleep import SleepCache
from hybrid_sleep.sleep.history import OPENING, History, history_of

HOW = {"sleep_passes": 2, "return_dict_in_generate": True, "max_new_tokens": 7}


@pytest.fixture(scope="module", params=["hard", "sliding"])
def model(request):
    return small_model(eviction=request.param)


def talk(model, past, new, **how):
    """A first turn, its cache, and the text of a second turn, `new` tokens longer."""
    first = model.generate(past, **HOW, **how)
    return first.cache, torch.cat([first.sequences, new], dim=1), first.sequences[:, -1:]


def test_the_whole_text_is_not_read_twice(model):
    cache, whole, unread = talk(model, small_ids(2, 9), small_ids(2, 3, seed=1))
    fresh = model.generate(torch.cat([unread, whole[:, -3:]], dim=1), cache=cache.copy(), **HOW)
    again = model.generate(whole, cache=cache.copy(), **HOW)
    assert torch.equal(again.sequences[:, : whole.shape[1]], whole)
    assert torch.equal(again.sequences[:, -7:], fresh.sequences[:, -7:])
    assert torch.equal(again.sequences, model.generate(whole, **HOW).sequences)
    assert again.cache.positions.tolist() == [whole.shape[1] + 6] * 2
    for i, S in fresh.cache.fast_weights.items():
        assert torch.equal(again.cache.fast_weights[i], S)
    embeds = model.get_input_embeddings()(whole)
    from_embeds = model.generate(inputs_embeds=embeds, cache=cache.copy(), **HOW)
    assert torch.equal(from_embeds.sequences[:, -7:], fresh.sequences[:, -7:])
    # A cache that was filled from embeddings knows the same text in ids.
    past = model.get_input_embeddings()(small_ids(2, 9))
    filled = model(inputs_embeds=past, sleep_passes=2).cache
    first = torch.cat([small_ids(2, 9), whole[:, 9:10]], dim=1)
    assert torch.equal(
        model.generate(first, cache=filled, **HOW).sequences, model.generate(first, **HOW).sequences
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_different_lengths(model, side):
    """Conversations of other lengths, padded anew for the second turn."""
    lengths, longer = (6, 9), (8, 15)
    texts = [small_ids(n, seed=n) for n in longer]

    def padded(parts):
        width = max(map(len, parts))
        ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
        for row, part in enumerate(parts):
            where = slice(0, len(part)) if side == "right" else slice(width - len(part), width)
            ids[row, where], mask[row, where] = part, 1
        return ids, mask

    ids, mask = padded([t[:n] for t, n in zip(texts, lengths, strict=True)])
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, sleep_passes=2).cache
    ids, mask = padded(texts)
    out = model.generate(ids, attention_mask=mask, cache=cache, **HOW)
    for row, text in enumerate(texts):
        alone = model.generate(text[None], **HOW).sequences[0, -7:]
        assert torch.equal(out.sequences[row, -7:], alone)


def test_beams_and_several_sequences_leave_the_past_out_as_well(model):
    cache, whole, unread = talk(model, small_ids(1, 9), small_ids(1, 3, seed=1))
    new = torch.cat([unread, whole[:, -3:]], dim=1)
    for how in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2, "top_k": 1}):
        again = model.generate(whole, cache=cache.copy(), **HOW, **how).sequences
        fresh = model.generate(new, cache=cache.copy(), **HOW, **how).sequences
        assert torch.equal(again[:, -7:], fresh[:, -7:])


def test_a_mask_over_the_past_says_that_all_is_new(model):
    past = small_ids(1, 3)
    cache = model(past, sleep_passes=2).cache
    repeated = torch.cat([past, small_ids(1, 2, seed=1)], dim=1)
    mask = torch.ones(1, 3 + 5, dtype=torch.long)
    out = model.generate(repeated, attention_mask=mask, cache=cache, **HOW)
    wanted = model.generate(torch.cat([past, repeated], dim=1), **HOW).sequences
    assert torch.equal(out.sequences[:, 5:], wanted[:, 8:])


def test_a_text_that_was_changed_is_refused(model):
    past = small_ids(1, OPENING + 5)
    cache = model(past, sleep_passes=2).cache
    before = cache.history.folded()
    for at in (OPENING, OPENING + 4):
        changed = past.clone()
        changed[0, at] = (changed[0, at] + 1) % 11
        with pytest.raises(ValueError, match="row 0 begins like the 37 tokens .* differs"):
            model.generate(torch.cat([changed, past[:, :1]], dim=1), cache=cache, **HOW)
    with pytest.raises(ValueError, match="nothing but what the cache has read"):
        model.generate(past, cache=cache, **HOW)
    assert cache.positions.tolist() == [OPENING + 5] and cache.history.folded() == before
    # Another text of that length is new, and so is a short one that begins alike.
    for new in (small_ids(1, OPENING + 8, seed=5), past[:, :OPENING]):
        out = model.generate(new, cache=cache.copy(), **HOW).sequences[:, -7:]
        whole = model.generate(torch.cat([past, new], dim=1), **HOW).sequences[:, -7:]
        assert torch.equal(out, whole)


def test_rows_that_disagree_are_refused(model):
    past = small_ids(2, 6)
    cache = model(past, sleep_passes=2).cache
    text = torch.cat([past, small_ids(2, 2, seed=1)], dim=1)
    text[1, 0] = (text[1, 0] + 1) % 11
    with pytest.raises(ValueError, match=r"prompts of rows \[0\] begin"):
        model.generate(text, cache=cache, **HOW)


def test_a_chat_of_stock_generate_calls(model):
    """Three turns as transformers' documentation writes them, compared with reading anew."""
    text, cache = small_ids(1, 4), SleepCache(model.config)
    for turn in range(3):
        text = torch.cat([text, small_ids(1, 3, seed=turn)], dim=1)
        wanted = model.generate(text, **HOW).sequences
        text = model.generate(text, cache=cache, **HOW).sequences
        assert torch.equal(text, wanted)
    # A cache of another kind is still refused by name.
    with pytest.raises(ValueError, match="cache must be a SleepCache, got DynamicCache"):
        model.generate(text, cache=DynamicCache(), **HOW)


def test_history_is_the_same_however_a_text_is_cut():
    h, lengths = torch.randn(3, 150, 4), torch.tensor([150, 90, 7])
    steps = torch.arange(150) < lengths[:, None]
    wanted = history_of([(h, steps)], lengths)
    for size in (1, 5, 64):
        history, done = History.empty(3), torch.zeros(3, dtype=torch.long)
        for start in range(0, 150, size):
            new = (lengths - start).clamp(0, min(size, 150 - start))
            history = history.extend(h[:, start : start + size], done, new)
            done = done + new
        assert all(map(torch.equal, history.folded()[:2], wanted[:2]))
    pieces = list(zip(h.split(40, dim=1), steps.split(40, dim=1), strict=True))
    assert all(map(torch.equal, history_of(pieces, lengths)[:2], wanted[:2]))
    short = history_of([(h[:1, :OPENING], steps[:1, :OPENING])], torch.tensor([OPENING]))
    assert short.whole[0] == wanted.opening[0]


def test_history_tells_any_two_texts_apart():
    h = torch.randn(1, 40, 4)
    here, all_of_it = torch.ones(1, 40, dtype=torch.bool), torch.tensor([40])
    seen = {int(history_of([(h, here)], all_of_it).whole)}
    for at in range(40):
        for change in (h[:, at].nextafter(torch.tensor(9.0)), -h[:, at], h[:, at - 1]):
            other = h.clone()
            other[:, at] = change
            seen.add(int(history_of([(other, here)], all_of_it).whole))
        swapped = h.clone()
        swapped[:, [at, at - 1]] = swapped[:, [at - 1, at]]
        seen.add(int(history_of([(swapped, here)], all_of_it).whole))
    assert len(seen) == 1 + 4 * 40


def test_history_outlives_the_process_and_follows_its_rows(model, tmp_path):
    model = small_model(dtype=torch.float32)
    texts = torch.cat([small_ids(2, 8), small_ids(2, 3, seed=1)], dim=1)
    with torch.no_grad():
        cache = model(texts[:, :8], sleep_passes=2).cache
    cache.save_pretrained(tmp_path)
    loaded = SleepCache.from_pretrained(tmp_path, model=model)
    wanted = model.generate(texts, **HOW).sequences
    assert torch.equal(model.generate(texts, cache=loaded, **HOW).sequences, wanted)
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    swapped = model.generate(texts[[1, 0, 1]], cache=cache, **HOW).sequences
    assert torch.equal(swapped, wanted[[1, 0, 1]])


