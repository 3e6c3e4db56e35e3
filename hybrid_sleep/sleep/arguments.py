"""Checks of what a forward pass is given, before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hybrid_sleep.sleep.cache import SleepCache
from hybrid_sleep.sleep.documents import document_ids_of
from hybrid_sleep.sleep.windows import real_tokens

# Token types mean nothing to a causal model; transformers' own drop them as well.
_IGNORED = ("token_type_ids",)
_REASONS = {
    "output_attentions": "attention weights differ by window and pass, and no mixer but attention "
    "has any; output_hidden_states=True gives the hidden states of pass 1",
    "cache_position": "the cache itself counts what it has read",
    "shift_labels": "labels are shifted inside, over pads and within documents; give labels",
    **dict.fromkeys(
        ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
        "packed documents are named by document_ids, or by position_ids that start again",
    ),
}


def refuse_unknown(config: Any, given: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments that no forward pass takes, with the reason if one is known.

    None and False ask for nothing; what stands in `_IGNORED` is dropped as transformers does.
    """
    for name, value in {"output_attentions": config.output_attentions, **given}.items():
        if value is None or value is False or name in _IGNORED:
            continue
        reason = _REASONS.get(name, "see its docstring for what it takes")
        raise ValueError(f"forward() does not take {name}: {reason}")


def check_tokens(
    config: Any, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
) -> torch.Tensor:
    """The one of the two that is given; ValueError for both, none, a wrong shape, dtype or id.

    Ids of a single decoding step on an accelerator are trusted: looking would wait for it.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    name, width, floating = "input_ids [B, T]", tuple[int, ...](), False
    if inputs_embeds is not None:
        name = f"inputs_embeds [B, T, {config.hidden_size}]"
        width, floating = (config.hidden_size,), True
    tokens = inputs_embeds if input_ids is None else input_ids
    assert tokens is not None
    if tokens.ndim != 2 + len(width) or tokens.shape[2:] != width:
        raise ValueError(f"{name} expected, got shape {tuple(tokens.shape)}")
    if 0 in tokens.shape:
        raise ValueError(
            f"{name} is an empty prompt, shape {tuple(tokens.shape)}; every row needs at least "
            "one token, such as bos_token_id"
        )
    if tokens.is_floating_point() != floating or tokens.dtype == torch.bool:
        raise ValueError(f"{name} must be integer ids or float embeddings, got {tokens.dtype}")
    if not floating and (tokens.device.type == "cpu" or tokens.shape[1] > 1):
        low, high = tokens.min().item(), tokens.max().item()
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"input_ids must be token ids in 0..{config.vocab_size - 1}, got "
                f"{low if low < 0 else high}"
            )
    return tokens


def check_labels(config: Any, labels: torch.Tensor, tokens: torch.Tensor) -> None:
    """Raise ValueError unless `labels` are token ids or -100, one for each of `tokens`."""
    if labels.shape != tokens.shape[:2] or labels.is_floating_point():
        raise ValueError(
            f"labels must be integers of the input's shape, {tuple(tokens.shape[:2])}, got "
            f"{labels.dtype} of shape {tuple(labels.shape)}"
        )
    wrong = (labels != -100) & ((labels < 0) | (labels >= config.vocab_size))
    if bool(wrong.any()):
        raise ValueError(
            f"labels must be -100 or token ids in 0..{config.vocab_size - 1}, got "
            f"{labels[wrong][0].item()}"
        )


def documents_given(
    tokens: torch.Tensor,
    document_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    cache: SleepCache | None,
) -> torch.Tensor | None:
    """`document_ids: [B, T]`, as given or as `position_ids` that start again say; None for none.

    cache: what the call goes on with; its rows' positions go on as well.

    Raises ValueError for both, another shape, documents together with a cache, and positions that
    are not those of the tokens: a row's positions follow its windows and cannot be chosen.
    """
    shape = tuple(tokens.shape[:2])
    if position_ids is not None:
        if document_ids is not None:
            raise ValueError("give at most one of document_ids and position_ids")
        if position_ids.shape == (1, shape[1]):
            position_ids = position_ids.expand(shape)
        if position_ids.shape != shape or position_ids.is_floating_point():
            raise ValueError(
                f"position_ids must be integers of the input's shape, {shape}, or [1, {shape[1]}], "
                f"got {position_ids.dtype} of shape {tuple(position_ids.shape)}"
            )
        read = torch.zeros(shape[0], dtype=torch.long)
        if isinstance(cache, SleepCache) and len(cache.positions) == shape[0]:
            read = cache.positions
        document_ids = document_ids_of(position_ids, real_tokens(attention_mask, *shape), read)
    if document_ids is None:
        return None
    if cache is not None:
        raise ValueError(
            "document_ids starts each document with an empty memory, so cache must be None"
        )
    if document_ids.shape != shape:
        raise ValueError(
            f"document_ids must be of the input's shape, {shape}, got {tuple(document_ids.shape)}"
        )
    return document_ids
