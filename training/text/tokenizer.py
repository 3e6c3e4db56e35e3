"""Text to tokens: bytes, or any tokenizer of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hybrid_sleep.training.text.source import Document

BYTES = "bytes"
FIRST_BYTE = 3  # of the ids of `bytes`; pad, eos and unk come before


def load_tokenizer(name: str) -> Any:
    """The tokenizer a run names: `bytes` (259 ids, needs no file), a folder, or a hub name.

    Raises ValueError if there is none of that name within reach, if it has no end of text, or if it
    comes with code of its own, which is not run.
    """
    from transformers import AutoTokenizer, ByT5Tokenizer

    # So that transformers knows a model of ours and does not ask whether to run its code.
    from hybrid_sleep import HybridSleepForCausalLM  # noqa: F401

    if name == BYTES:
        return ByT5Tokenizer(extra_ids=0)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers, huggingface_hub and tokenizers all raise their own
        reason = str(error).strip().partition("\n")[0]
        if "trust_remote_code" in str(error):
            reason = "it comes with code of its own, which is not run"
        raise ValueError(
            f"text.tokenizer must be {BYTES}, a folder with a saved tokenizer, or a name on the "
            f"hub if that can be reached, got {name!r} ({reason})"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"text.tokenizer must have an eos token to end a document with, as {BYTES} has, got "
            f"{name!r}, which has none"
        )
    return tokenizer


def reads_bytes(tokenizer: Any) -> bool:
    """Whether every token but the special ones is one byte of UTF-8."""
    from transformers import ByT5Tokenizer

    return isinstance(tokenizer, ByT5Tokenizer)


class Encoder:
    """Tokens of a document: its text, whatever it says, is never read as special tokens.

    The eos token stands behind each document that ends; the bos token in front where the tokenizer
    puts one there by itself. `pad` fills rows. Raises ValueError for ready tokens out of range.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.eos = tokenizer.eos_token_id
        self.pad = self.eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        bos = tokenizer.bos_token_id
        self.first = [bos] if bos is not None and tokenizer("a").input_ids[0] == bos else []

    def __call__(self, document: Document) -> np.ndarray:
        """int64 `[n]`, n >= 1 for a document that is not blank."""
        content, ends = document
        if isinstance(content, str):
            ids = self.tokenizer(
                content, add_special_tokens=False, split_special_tokens=True, verbose=False
            ).input_ids
            return np.array([*self.first, *ids, *[self.eos] * ends], dtype=np.int64)
        count = len(self.tokenizer)
        whole = all(type(token) is int for token in content)
        if not whole or not 0 <= min(content) <= max(content) < count:
            raise ValueError(
                f"text.dataset must hold token ids in 0..{count - 1}, those of text.tokenizer, got "
                f"a document of {content[:8]}..."
            )
        ids = np.array(content, dtype=np.int64)
        return np.append(ids, self.eos) if ends and ids[-1] != self.eos else ids
