"""Fast weights outlive the process, a kill does no harm, and nobody reads another's memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from marks import slow
from safetensors import safe_open
from safetensors.torch import save_file
from small import assert_same, small_config, small_ids, small_model, snapshot
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import hybrid_sleep
from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM, HybridSleepModel, SleepCache
from hybrid_sleep.sleep import storage
from hybrid_sleep.sleep.weights import tensors_digest

FILE = storage.FILE_NAME
GATES = ("A_log", "dt_bias")


def ragged_cache(model, sleep_passes: int = 3) -> SleepCache:
    """Rows at different places of their windows, with a past."""
    ids, mask = small_ids(3, 13), torch.ones(3, 13, dtype=torch.long)
    mask[1, :9], mask[2, 8:] = 0, 0
    with torch.no_grad():
        return model(ids, attention_mask=mask, sleep_passes=sleep_passes).cache


def in_new_process(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    home = {"HF_HOME": str(folder / "home"), "HF_MODULES_CACHE": str(folder / "modules")}
    source = str(Path(hybrid_sleep.__file__).resolve().parents[1])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", **home, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def everything_bar_reports(cache: SleepCache) -> dict:
    held = snapshot(cache)
    del held["reports"]
    return {name: value for name, value in held.items() if value is not None}


CONTINUE_THEN_DIE = """
    import os, signal, torch
    from safetensors.torch import save_file
    from hybrid_sleep import HybridSleepForCausalLM, SleepCache
    from hybrid_sleep.sleep import storage

    torch.set_num_threads(1)
    model = HybridSleepForCausalLM.from_pretrained("model").eval()
    cache = SleepCache.from_pretrained("memory", model=model)
    read = torch.load("new.pt")
    with torch.no_grad():
        out = model(read, cache=cache, sleep_passes=3)
    S = {str(i): S.contiguous() for i, S in cache.fast_weights.items()}
    save_file({"logits": out.logits, **S}, "continued.safetensors")

    def half_a_file(tensors, path, metadata):
        save_file(tensors, path, metadata=metadata)
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    storage.save_file = half_a_file
    cache.save_pretrained("memory")
"""


@pytest.mark.parametrize("eviction", ["hard", slow("sliding")])
def test_another_process_continues_with_the_same_bits(tmp_path, eviction):
    """And where that process dies while it saves, the old memory is whole."""
    from safetensors.torch import load_file

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = small_model(eviction=eviction, loop=(0, 3), dtype=torch.float32)
        cache = ragged_cache(model)
        model.save_pretrained(tmp_path / "model")
        cache.save_pretrained(tmp_path / "memory")
        kept = (tmp_path / "memory" / FILE).read_bytes()
        before = everything_bar_reports(cache)
        new = small_ids(3, 9, seed=1)
        torch.save(new, tmp_path / "new.pt")
        done = in_new_process(CONTINUE_THEN_DIE, tmp_path)
        assert done.returncode == -signal.SIGKILL, done.stderr
        with torch.no_grad():
            logits = model(new, cache=cache, sleep_passes=3).logits
    finally:
        torch.set_num_threads(threads)
    there = load_file(tmp_path / "continued.safetensors")
    assert torch.equal(there.pop("logits"), logits)
    assert {int(i) for i in there} == set(cache.fast_weights)
    for i, S in there.items():
        assert torch.equal(S, cache.fast_weights[int(i)])
    assert (tmp_path / "memory" / FILE).read_bytes() == kept
    again = SleepCache.from_pretrained(tmp_path / "memory", model=model)
    assert_same(before, everything_bar_reports(again))


def break_save_file(monkeypatch):
    def halfway(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "save_file", halfway)


def break_fsync(monkeypatch):
    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)


def break_replace(monkeypatch):
    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)


@pytest.mark.parametrize("broken", [break_save_file, break_fsync, break_replace])
def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch, broken):
    model = small_model(dtype=torch.float32)
    cache = ragged_cache(model)
    cache.save_pretrained(tmp_path)
    kept, before = (tmp_path / FILE).read_bytes(), everything_bar_reports(cache)
    model(small_ids(3, 4), cache=cache)
    with monkeypatch.context() as patch:
        broken(patch)
        with pytest.raises((OSError, KeyboardInterrupt)):
            cache.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).read_bytes() == kept
    assert_same(before, everything_bar_reports(SleepCache.from_pretrained(tmp_path, model=model)))
    cache.save_pretrained(tmp_path)
    assert (tmp_path / FILE).read_bytes() != kept


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("loop", [None, (0, 2)])
def test_what_is_loaded_is_what_was_saved(tmp_path, eviction, loop):
    model = small_model(eviction=eviction, loop=loop)
    for cache in (ragged_cache(model), model(small_ids(1, 3)).cache):
        cache.save_pretrained(tmp_path)
        loaded = SleepCache.from_pretrained(tmp_path, model=model)
        assert_same(everything_bar_reports(cache), everything_bar_reports(loaded))
        model.sleep(cache, passes=2)
        cache.save_pretrained(tmp_path)
        loaded = SleepCache.from_pretrained(tmp_path, model=model)
        new = small_ids(cache.batch_size, 7)
        a = model(new, cache=cache, sleep_passes=2).logits
        assert torch.equal(a, model(new, cache=loaded, sleep_passes=2).logits)


def edit(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-6


def train(model):
    model(small_ids(1, 4), labels=small_ids(1, 4)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()


CHANGES = {"a bump": lambda model: model.bump_weights_version(), "an edit": edit, "a step": train}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_memory_of_other_weights_is_refused(tmp_path, change):
    model = small_model()
    cache = ragged_cache(model)
    cache.save_pretrained(tmp_path)
    version = model.weights_version
    change(model)
    assert model.weights_version > version
    before = snapshot(cache)
    with pytest.raises(ValueError, match="cache.*version"):
        model(small_ids(3, 2), cache=cache)
    with pytest.raises(ValueError, match="cache.*version"):
        model.generate(small_ids(3, 2), cache=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="cache.*version"):
        model.sleep(cache, passes=2)
    with pytest.raises(ValueError, match="cache.*version"):
        cache.save_pretrained(tmp_path / "other")
    assert_same(before, snapshot(cache))
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="weights"):
        SleepCache.from_pretrained(tmp_path, model=model)


def test_memory_of_another_model_is_refused(tmp_path):
    model, twin = small_model(seed=0), small_model(seed=0)
    cache = ragged_cache(model)
    cache.save_pretrained(tmp_path)
    new = small_ids(3, 2)
    with pytest.raises(ValueError, match="cache"):
        twin(new, cache=cache)
    # The same weights may read it from disk, others may not.
    logits = twin(new, cache=SleepCache.from_pretrained(tmp_path, model=twin)).logits
    assert torch.equal(logits, model(new, cache=cache).logits)
    with pytest.raises(ValueError, match="weights"):
        SleepCache.from_pretrained(tmp_path, model=small_model(seed=1))
    for changes in ({"window": 6}, {"eviction": "sliding"}, {"loop": (0, 2)}):
        other = small_model(**changes)
        other.load_state_dict(model.state_dict())
        (name,) = changes
        with pytest.raises(ValueError, match=name):
            SleepCache.from_pretrained(tmp_path, model=other)
        with pytest.raises(ValueError, match=name):
            other(new, cache=cache)


def test_what_is_no_cache_is_refused(tmp_path):
    model = small_model()
    with pytest.raises(FileNotFoundError, match=FILE):
        SleepCache.from_pretrained(tmp_path, model=model)
    with pytest.raises(ValueError, match="cache has read nothing"):
        SleepCache(model.config).save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / FILE)
    with pytest.raises(ValueError, match="format"):
        SleepCache.from_pretrained(tmp_path, model=model)


def test_models_come_back_bit_for_bit(tmp_path):
    for tied, eviction in ((True, "hard"), (False, "sliding")):
        model = small_model(
            tie_word_embeddings=tied, eviction=eviction, loop=(1, 3), sleep_passes=2,
            dtype=torch.float32,
        )  # fmt: skip
        model.bump_weights_version()
        folder = tmp_path / str(tied)
        model.save_pretrained(folder)
        ids = small_ids(2, 12)
        wanted = model(ids).logits
        for kind in (HybridSleepForCausalLM, AutoModelForCausalLM):
            loaded = kind.from_pretrained(folder)
            assert type(loaded) is HybridSleepForCausalLM
            assert torch.equal(loaded(ids).logits, wanted)
            assert loaded.config.weights_version == 1
            assert loaded.config.loop == (1, 3)
            shared = loaded.lm_head.weight is loaded.model.embed_tokens.weight
            assert shared is tied
        backbone = AutoModel.from_pretrained(folder)
        assert type(backbone) is HybridSleepModel
        assert torch.equal(backbone(ids).last_hidden_state, model.model(ids).last_hidden_state)
        assert type(AutoConfig.from_pretrained(folder)) is HybridSleepConfig


REMOTE = """
    import sys, torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert "hybrid_sleep" not in sys.modules
    model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True).eval()
    ids = torch.arange(12)[None] % 11
    kept = {"sequences": model.generate(ids, max_new_tokens=8, do_sample=False, sleep_passes=3)}
    torch.save(kept, "remote.pt")
"""


def test_remote_code_finds_the_package(tmp_path):
    model = small_model(dtype=torch.float32, noise=0.4)
    model.save_pretrained(tmp_path / "model")
    done = in_new_process(REMOTE, tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    ids = torch.arange(12)[None] % 11
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False, sleep_passes=3)
    assert torch.equal(torch.load(tmp_path / "remote.pt")["sequences"], wanted)


@pytest.mark.parametrize("state_space", ["gated_deltanet", "mamba2"])
def test_half_precision_keeps_fast_weights_and_gates_wide(tmp_path, state_space):
    small_model(small_config(state_space=state_space), dtype=torch.float32).save_pretrained(
        tmp_path
    )
    model = HybridSleepForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        wide = name.endswith(GATES)
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
    cache = ragged_cache(model)
    assert cache.hidden.dtype == torch.bfloat16
    model.sleep(cache, passes=3)
    assert all(S.dtype == torch.float32 for S in cache.fast_weights.values())
    cache.save_pretrained(tmp_path)
    loaded = SleepCache.from_pretrained(tmp_path, model=model)
    new = small_ids(3, 6)
    logits = model(new, cache=cache, sleep_passes=2).logits
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, model(new, cache=loaded, sleep_passes=2).logits)
    single = HybridSleepForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    first = slice(0, model.config.window)
    wide, narrow = single(new[:, first]).logits, model(new[:, first]).logits.float()
    assert (wide - narrow).norm() < 0.05 * wide.norm()


def test_an_edit_that_torch_does_not_count_is_found_on_loading(tmp_path):
    """`parameter.data` hides its edits from a running model, but not from the file's digest."""
    model = small_model()
    ragged_cache(model).save_pretrained(tmp_path)
    model.lm_head.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="weights"):
        SleepCache.from_pretrained(tmp_path, model=model)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def emptied(path):
    path.write_bytes(b"")


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def folder(path):
    path.unlink()
    path.mkdir()


def one_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def rewritten(change):
    def damage(path):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata()
        change(tensors, metadata)
        save_file(tensors, path, metadata=metadata)

    return damage


DAMAGES = {
    "cut": (cut, "is damaged: "),
    "emptied": (emptied, "is damaged: it is empty"),
    "pointer": (pointer, "is a pointer of Git LFS"),
    "folder": (folder, "is a folder; allowed: a file"),
    "one bit": (one_bit, "tensors are not those that were saved"),
    "a tensor gone": (rewritten(lambda t, m: t.pop("states.1.S")), "tensors are not those"),
    "rows gone": (rewritten(lambda t, m: t.pop("rows.counts")), "tensors are not those"),
    "columns gone": (rewritten(lambda t, m: m.pop("columns")), "metadata .*columns"),
    "no config": (rewritten(lambda t, m: m.update(config="{")), "metadata cannot be read"),
    "config a list": (rewritten(lambda t, m: m.update(config="[]")), "its config is a list"),
    "version a word": (rewritten(lambda t, m: m.update(weights_version="x")), "metadata cannot"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, damage, message):
    model = small_model()
    ragged_cache(model).save_pretrained(tmp_path)
    path = tmp_path / FILE
    damage(path)
    with pytest.raises((ValueError, IsADirectoryError), match=f"{FILE} .*{message}"):
        SleepCache.from_pretrained(tmp_path, model=model)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_files_of_format_2_load(tmp_path, eviction):
    """They called the states of two kinds of layers by names of their own."""
    model = small_model(eviction=eviction, loop=(0, 3))
    cache = ragged_cache(model)
    cache.save_pretrained(tmp_path)
    old_names = {"tails.0": "q_tail", "tails.1": "kv_tail", "slots.0": "k", "slots.1": "v"}

    def as_format_2(tensors, metadata):
        for name in [*tensors]:
            kind, _, field = name.partition(".")
            layer, _, field = field.partition(".")
            if kind in ("states", "opening"):
                kind = "memory" if kind == "states" else kind
                tensors[f"{kind}.{layer}.{old_names.get(field, field)}"] = tensors.pop(name)
        metadata.update(format="hybrid_sleep.cache.2", contents=tensors_digest(tensors))

    rewritten(as_format_2)(tmp_path / FILE)
    loaded = snapshot(SleepCache.from_pretrained(tmp_path, model=model))
    assert_same(loaded | {"reports": 0}, snapshot(cache) | {"reports": 0})


def test_files_from_before_passes_handed_on_less_than_all_load(tmp_path):
    cache = ragged_cache(model := small_model())
    cache.save_pretrained(tmp_path)

    def without(tensors, metadata):
        config = json.loads(metadata["config"])
        assert config.pop("sleep_carry") == "both"
        assert config.pop("distinct_passes") == 1
        assert config.pop("linear_allow_neg_eigval") is False
        assert config.pop("token_fields") is None
        metadata["config"] = json.dumps(config)

    rewritten(without)(tmp_path / FILE)
    loaded = snapshot(SleepCache.from_pretrained(tmp_path, model=model))
    assert_same(loaded | {"reports": 0}, snapshot(cache) | {"reports": 0})
    model.config.sleep_carry = "fast_weights"
    with pytest.raises(ValueError, match=r"sleep_carry='both' \(model: 'fast_weights'\)"):
        SleepCache.from_pretrained(tmp_path, model=model)
