"""Rows of text: the same for any number of processes, and after any resume."""

import itertools
import json
import multiprocessing
import pickle
import types

import pytest
import torch
from small import gap, small_config, small_model
from torch.utils.data import DataLoader

from hybrid_sleep.training.text.batches import TextBatches, TextHeldOut, merge_positions
from hybrid_sleep.training.text.config import TextConfig
from hybrid_sleep.training.text.source import open_source
from hybrid_sleep.training.text.tokenizer import load_tokenizer

ROWS, LENGTH, EOS, PAD = 4, 12, 1, 0
TENSORS = ("input_ids", "labels", "document_ids")
KINDS = ("files", "map", "streaming")


def texts(count=37):
    """No two alike, 3 to 40 bytes: shorter and longer than a row."""
    return [f"{i:02}" + "abcdefghijklmnopqrstuvwxyz"[: i * 7 % 20] * (i % 3) for i in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bytes")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """`opened(kind, **changes)`: the same documents from a file or a data set."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("\f".join(texts()[:20]))
    (folder / "b.txt").write_text("\f".join(texts()[20:]))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts())
    (folder / "rows.jsonl").write_text(lines)

    def opened(kind="files", **changes):
        given = {"length": LENGTH, "held_out": 0.0, "shuffle": 5, **changes}
        if kind == "files":
            return open_source(TextConfig(files=[f"{folder}/*.txt"], separator="\f", **given))
        pytest.importorskip("datasets")
        data = {"path": "json", "data_files": str(folder / "rows.jsonl")}
        return open_source(TextConfig(dataset={**data, "streaming": kind == "streaming"}, **given))

    return opened


def encoded(text):
    return [byte + 3 for byte in text.encode()] + [EOS]


def steps(source, tokenizer, count, *, world=1, accumulate=1, start=None, seed=0):
    """`count` steps of all ranks: tensors of all streams in order, and the merged position."""
    ranks = [
        iter(
            TextBatches(
                source,
                tokenizer,
                rows=ROWS,
                accumulate=accumulate,
                seed=seed,
                rank=rank,
                world=world,
                start=start,
            )
        )
        for rank in range(world)
    ]
    for _ in range(count):
        parts = [[next(batches) for _ in range(accumulate)] for batches in ranks]
        whole = {name: torch.cat([p[name] for part in parts for p in part]) for name in TENSORS}
        yield whole, merge_positions([part[-1]["position"] for part in parts])


def by_hand(documents, packing, count):
    """Rows of every stream, for documents in this order, over and over."""
    streams = []
    for stream in range(ROWS):
        mine = itertools.islice(itertools.cycle(documents), stream, None, ROWS)
        rows, row = [], []
        while len(rows) < count:
            tokens = encoded(next(mine))
            while tokens:
                space = LENGTH - sum(map(len, row))
                part, tokens = tokens[:space], tokens[space:]
                row.append(part)
                if len(part) == space or not packing:
                    rows.append(row)
                    row = []
        streams.append(rows)
    return streams


@pytest.mark.parametrize("packing", [True, False])
def test_rows_are_those_packed_by_hand(opened, tokenizer, packing):
    source = opened(shuffle=0, packing=packing)
    streams = by_hand(texts(), packing, 30)
    for step, (batch, _) in enumerate(steps(source, tokenizer, 30)):
        for stream in range(ROWS):
            parts = streams[stream][step]
            rest = LENGTH - sum(map(len, parts))
            assert batch["input_ids"][stream].tolist() == sum(parts, []) + [PAD] * rest
            assert batch["document_ids"][stream].tolist() == (
                sum(([i] * len(part) for i, part in enumerate(parts)), []) + [-1] * rest
            )
            assert batch["labels"][stream].tolist() == (
                sum(([-100, *part[1:]] for part in parts), []) + [-100] * rest
            )


def test_a_lane_cut_at_its_eos_tokens_gives_its_documents_back(opened, tokenizer):
    """Whatever the shuffle, an epoch has every document once, and no two streams the same one."""
    count = len(texts())
    seen = {}
    batches = [batch["input_ids"] for batch, _ in steps(opened(), tokenizer, 60)]
    for stream in range(ROWS):
        row = torch.cat([ids[stream] for ids in batches]).tolist()
        documents, rest = [], row
        while EOS in rest:
            end = rest.index(EOS)
            documents.append(bytes(t - 3 for t in rest[:end]).decode())
            rest = rest[end + 1 :]
        seen |= {stream + ROWS * i: text for i, text in enumerate(documents)}
    expected = [list(range(count))[i : i + 5] for i in range(0, count, 5)]
    epochs = []
    for first in (0, count):
        numbered = [texts().index(seen[first + i]) for i in range(count)]
        epochs.append([numbered[i : i + 5] for i in range(0, count, 5)])
        assert [sorted(block) for block in epochs[-1]] == expected
    assert epochs[0] != epochs[1] and expected not in epochs


def test_rows_are_the_same_for_any_number_of_processes_and_parts(opened, tokenizer):
    source = opened()
    alone = list(steps(source, tokenizer, 25))
    for world, accumulate in ((2, 1), (4, 1), (1, 2), (2, 2), (1, 4)):
        for one, other in zip(
            alone, steps(source, tokenizer, 25, world=world, accumulate=accumulate), strict=True
        ):
            assert all(torch.equal(one[0][name], other[0][name]) for name in TENSORS)
            assert one[1]["streams"] == other[1]["streams"]
    other_seed = list(steps(source, tokenizer, 25, seed=1))
    assert any(
        not torch.equal(one["input_ids"], other["input_ids"])
        for (one, _), (other, _) in zip(alone, other_seed, strict=True)
    )


def test_a_rank_reads_its_lanes_in_order_micro_batch_by_micro_batch(opened, tokenizer):
    ((whole, _),) = steps(opened(), tokenizer, 1)
    for rank in range(2):
        batches = iter(
            TextBatches(opened(), tokenizer, rows=ROWS, accumulate=2, rank=rank, world=2)
        )
        for part in range(2):
            row = next(batches)["input_ids"]
            assert torch.equal(row, whole["input_ids"][[2 * rank + part]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [1, 7, 18, 41])
def test_resumed_equals_uninterrupted(opened, tokenizer, kind, stop):
    """Through several epochs, for every kind of source and changing numbers of processes."""
    source = opened(kind, held_out=0.2)
    whole = list(steps(source, tokenizer, stop + 12))
    position = whole[stop - 1][1]
    for world, accumulate in ((1, 1), (2, 2), (4, 1)):
        saved = json.loads(json.dumps(position))
        assert saved == position
        again = steps(opened(kind, held_out=0.2), tokenizer, 6, world=world, start=saved)
        for (batch, later), (expected, at) in zip(again, whole[stop : stop + 6], strict=True):
            assert all(torch.equal(batch[name], expected[name]) for name in TENSORS)
            assert later["streams"] == at["streams"] and later["step"] == at["step"]
        # The resumed run stops too, and goes on in other parts.
        last = steps(source, tokenizer, 6, accumulate=accumulate, start=later)
        for (batch, _), (expected, _) in zip(last, whole[stop + 6 :], strict=True):
            assert all(torch.equal(batch[name], expected[name]) for name in TENSORS)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_data_set_gives_the_rows_of_files_with_the_same_documents(opened, tokenizer, kind):
    from_files, others = opened(held_out=0.2), opened(kind, held_out=0.2)
    for (one, _), (other, _) in zip(
        steps(from_files, tokenizer, 40), steps(others, tokenizer, 40), strict=True
    ):
        assert all(torch.equal(one[name], other[name]) for name in TENSORS)


def test_a_position_of_an_earlier_version_goes_on(opened, tokenizer):
    """Which named streams and chunks otherwise."""
    source = opened()
    *_, (_, position), (expected, _) = steps(source, tokenizer, 4)
    old = {"lanes" if name == "streams" else name: value for name, value in position.items()}
    old["size"] = {"pieces" if name == "chunks" else name: n for name, n in old["size"].items()}
    assert "lanes" in old and "pieces" in old["size"]
    ((again, _),) = steps(source, tokenizer, 1, start=json.loads(json.dumps(old)))
    assert all(torch.equal(again[name], expected[name]) for name in TENSORS)


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_reads_on_near_the_slowest_stream(opened, tokenizer, kind, monkeypatch):
    source = opened(kind)
    *_, (_, position) = steps(source, tokenizer, 14)
    oldest = min(document for document, _ in position["streams"])
    assert oldest - 5 < position["source"]["first"] <= oldest
    assert len(json.dumps(position)) < 1000
    blocks, read = [], []
    every, one = source.blocks, source.read
    monkeypatch.setattr(source, "blocks", lambda *a: (blocks.append(b) or b for b in every(*a)))
    monkeypatch.setattr(source, "read", lambda handle: read.append(handle) or one(handle))
    next(steps(source, tokenizer, 1, start=position))
    newest = max(document for document, _ in position["streams"])
    assert len(blocks) <= (newest - oldest) // 5 + 4
    assert len(read) <= 4 * ROWS


@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_may_have_one_worker(opened, tokenizer, monkeypatch, kind):
    plain = list(itertools.islice(TextBatches(opened(), tokenizer, rows=ROWS), 5))
    # What a worker that is not forked gets is pickled.
    batches = pickle.loads(pickle.dumps(TextBatches(opened(kind), tokenizer, rows=ROWS)))
    for workers in (0, 1):
        context = multiprocessing.get_context("fork") if workers else None
        loader = iter(
            DataLoader(
                batches, batch_size=None, num_workers=workers, multiprocessing_context=context
            )
        )
        for expected in plain:
            batch = next(loader)
            assert all(torch.equal(batch[name], expected[name]) for name in TENSORS)
            assert batch["position"]["streams"] == expected["position"]["streams"]
    monkeypatch.setattr(
        "hybrid_sleep.training.text.batches.get_worker_info",
        lambda: types.SimpleNamespace(num_workers=2),
    )
    with pytest.raises(ValueError, match="num_workers must be 0 or 1, .*, got 2"):
        next(iter(batches))


def test_positions_are_merged_only_if_whole(opened, tokenizer):
    def at(rank, count, accumulate=1):
        batches = TextBatches(
            opened(), tokenizer, rows=ROWS, accumulate=accumulate, rank=rank, world=2
        )
        return list(itertools.islice(batches, count))[-1]["position"]

    whole = merge_positions([at(1, 3), at(0, 3)])
    assert whole["step"] == 3 and len(whole["streams"]) == ROWS
    for parts in (
        [at(0, 3)],
        [at(1, 3)],
        [at(0, 3), at(0, 3)],
        [at(0, 3), at(1, 2)],
        [at(0, 3, 2), at(1, 3, 2)],
    ):
        with pytest.raises(ValueError, match="positions must be those of all 4 streams"):
            merge_positions(parts)


def test_what_cannot_be_shared_out_or_resumed_is_named(opened, tokenizer):
    source = opened()
    with pytest.raises(ValueError, match="train.batch_size must be a multiple of 6, .*, got 4"):
        TextBatches(source, tokenizer, rows=4, accumulate=2, world=3)
    with pytest.raises(ValueError, match="rank must be in 0..1, of 2 processes, got 2"):
        TextBatches(source, tokenizer, rows=4, rank=2, world=2)
    ((_, position),) = steps(source, tokenizer, 1)
    with pytest.raises(
        ValueError, match="rows of the text must be 4, as where it is to go on, got 8"
    ):
        TextBatches(source, tokenizer, rows=8, start=position)
    with pytest.raises(ValueError, match="seed of the text must be 0, .*, got 1"):
        TextBatches(source, tokenizer, rows=4, seed=1, start=position)
    with pytest.raises(ValueError, match="size of the text must be"):
        TextBatches(opened(held_out=0.1), tokenizer, rows=4, start=position)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packing", [True, False])
def test_held_out_rows_are_never_trained_on(opened, tokenizer, kind, packing):
    source = opened(kind, held_out=0.2, packing=packing)
    held = TextHeldOut(source, tokenizer, depths=(1,), batch_size=3)
    batches = list(held.batches())
    rows = torch.cat([batch["input_ids"] for batch in batches])
    assert len(rows) == len(held) and max(len(b["input_ids"]) for b in batches) == 3
    real = torch.cat([batch["document_ids"] for batch in batches]) >= 0
    aside = [source.read(handle).content for handle in source.held_out()]
    # Whole documents, one after another, every one once.
    assert rows[real].tolist() == sum(map(encoded, aside), [])
    trained = set()
    for stream in range(ROWS):
        row = torch.cat([b["input_ids"][stream] for b, _ in steps(source, tokenizer, 60)])
        text = bytes(t - 3 if t >= 3 else 10 for t in row.tolist()).decode()
        trained |= set(text.replace("\n\n", "\n").split("\n"))
    assert len(aside) in (7, 8) and not trained & set(aside)
    source = opened(kind, held_out=0.2, packing=packing)
    few = TextHeldOut(source, tokenizer, depths=(1,), count=4)
    assert torch.equal(next(few.batches())["input_ids"], rows[:4]) and len(few) == 4


def test_nothing_held_out_is_an_error(opened, tokenizer):
    with pytest.raises(
        ValueError, match="text.held_out must be a share that keeps a document .*, got 0.0"
    ):
        len(TextHeldOut(opened(), tokenizer, depths=(1,)))
    with pytest.raises(ValueError, match="count must be an integer of at least 1, got 0"):
        TextHeldOut(opened(), tokenizer, depths=(1,), count=0)


@pytest.mark.parametrize("packing", [True, False])
def test_a_model_reads_every_document_of_a_row_as_if_it_were_alone(opened, tokenizer, packing):
    """Loss and gradients of a packed batch are those of its documents, one call each."""
    config = small_config(vocab_size=259, sleep_schedule="every_window")
    model = small_model(config)
    batch, _ = list(steps(opened(packing=packing), tokenizer, 3))[-1]
    assert packing == bool((batch["document_ids"] > 0).any())
    loss = model(**batch, sleep_passes=2).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    losses, count = [], 0
    for ids, documents in zip(batch["input_ids"], batch["document_ids"], strict=True):
        for number in range(int(documents.max()) + 1):
            alone = ids[documents == number][None]
            logits = model(input_ids=alone, sleep_passes=2, use_cache=False).logits
            chosen = logits[0, :-1].log_softmax(-1).gather(1, alone[0, 1:, None])
            losses.append(-chosen.sum())
            count += alone.shape[1] - 1
    expected = sum(losses) / count
    expected.backward()
    # transformers' loss is fp32, whatever the model is.
    assert gap(loss, expected) < 1e-6
    for name, parameter in model.named_parameters():
        assert gap(gradients[name], parameter.grad) < 1e-6, name
