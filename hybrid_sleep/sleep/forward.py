"""Pass 1: read a batch window by window, with a sleep wherever a row's window is full."""

from __future__ import annotations

from itertools import chain, pairwise
from typing import Protocol

import torch
from torch import nn
from transformers.utils import logging

from hybrid_sleep.layers.stack import recompute, run_blocks
from hybrid_sleep.sleep import algorithm as sleep
from hybrid_sleep.sleep.algorithm import Passes, consolidate
from hybrid_sleep.sleep.cache import SleepCache
from hybrid_sleep.sleep.documents import Documents
from hybrid_sleep.sleep.windows import TokenBlock, cut, spread

logger = logging.get_logger(__name__)


class Backbone(sleep.Backbone, Protocol):
    """What reading needs of a model."""

    embed_tokens: nn.Embedding
    training: bool


def check_supervised(
    backbone: Backbone, supervised: torch.Tensor | None, tokens: torch.Tensor, passes: Passes
) -> torch.Tensor | None:
    """Bool `[B, T]` on the CPU: tokens whose windows do not sleep. None: every full window sleeps.

    Raises ValueError unless `supervised` is None or bool of the shape of `tokens`. Warns, once,
    where a training step cannot know what is supervised.
    """
    shape = tuple(tokens.shape[:2])
    if supervised is not None and (supervised.shape != shape or supervised.dtype != torch.bool):
        raise ValueError(
            f"supervised must be bool of the input's shape, {shape}, got {supervised.dtype} of "
            f"shape {tuple(supervised.shape)}"
        )
    if backbone.config.sleep_schedule == "every_window":
        return None
    if supervised is not None:
        return supervised.cpu()
    learns = backbone.training and torch.is_grad_enabled()
    if learns and passes != 1 and shape[1] > backbone.config.window:
        logger.warning_once(
            "sleep_schedule='context_windows' has no effect in this training step: forward() got "
            "neither labels nor `supervised`, so windows sleep that the loss is computed on as "
            "well. Where the loss is computed elsewhere (label smoothing, compute_loss_func, trl's "
            "trainers), give supervised=(labels != -100), which a data collator wrapped in "
            "hybrid_sleep.training.MarkSupervised does, or set config.sleep_schedule to "
            "'every_window'"
        )
    return None


def read(
    backbone: Backbone,
    tokens: torch.Tensor,
    real: torch.Tensor | None,
    cache: SleepCache,
    passes: Passes,
    *,
    supervised: torch.Tensor | None = None,
    every_layer: bool = False,
    first: int = 0,
) -> torch.Tensor:
    """Hidden states `[B, T - first, D]` of the columns from `first` on, zeros at pads.

    every_layer: `[B, T - first, (1 + layers) D]` instead, embeddings and what each layer gives.

    tokens: ids `[B, T]` or embeddings `[B, T, D]`; real: bool `[B, T]`, False at pads, None for
    none; supervised: see `check_supervised`, their windows only evict. `cache` takes what was read;
    it is as it was if anything raises.
    """
    batch, columns = tokens.shape[:2]
    as_before = vars(cache.copy())
    windows = backbone.checkpointing.window and torch.is_grad_enabled()
    kept: list[tuple[TokenBlock, torch.Tensor]] = []
    try:
        blocks = cut(cache.counts, real, columns, backbone.config.window)
        for block, following in pairwise(chain((None,), blocks, (None,))):
            step = (block, following, tokens, supervised, every_layer, passes)
            if windows:
                h, after = recompute(_after, backbone, cache.copy(), *step)
                vars(cache).update(vars(after))
            else:
                h = _step(backbone, cache, *step)
            if block is not None:
                kept = [pair for pair in kept if pair[0].last_column >= first] + [(block, h)]
    except BaseException:
        vars(cache).update(as_before)
        raise
    cache.columns += columns
    if kept:
        return spread(kept, first, columns)
    return _zeros(backbone, tokens, every_layer, batch, columns - first)


def read_documents(
    backbone: Backbone,
    tokens: torch.Tensor,
    documents: Documents,
    cache: SleepCache | None,
    passes: Passes,
    *,
    supervised: torch.Tensor | None = None,
    every_layer: bool = False,
) -> torch.Tensor:
    """As `read`, each document as a row of its own: `[B, T, D]`, zeros outside of documents.

    cache: takes one row per document, which are then read together; None reads documents of
    similar length together, each group only as far as its longest.
    """
    parts, source, offset = [], torch.zeros(tokens.shape[:2], dtype=torch.long), 1
    groups = documents.by_length()
    if cache is not None and len(documents.length):
        groups = [torch.arange(len(documents.length))]
    for members in groups:
        row, column, real = documents.layout(members)
        here = row.to(tokens.device), column.to(tokens.device)
        memory = SleepCache(backbone.config) if cache is None else cache
        memory.open(len(members))
        h = read(
            backbone,
            tokens[here],
            None if bool(real.all()) else real,
            memory,
            passes,
            supervised=None if supervised is None else supervised[row, column],
            every_layer=every_layer,
        )
        slots = offset + torch.arange(real.numel()).view(real.shape)
        source[row.expand_as(column)[real], column[real]] = slots[real]
        offset += real.numel()
        parts.append(h.flatten(0, 1))
    # Slot 0 is the zero that pads show.
    parts.insert(0, _zeros(backbone, tokens, every_layer, 1))
    h = torch.cat(parts).index_select(0, source.flatten().to(tokens.device))
    return h.view(*source.shape, -1)


def _zeros(
    backbone: Backbone, tokens: torch.Tensor, every_layer: bool, *shape: int
) -> torch.Tensor:
    """Zeros `[*shape, D]`, or as many D as `every_layer` gives, of the dtype of embeddings.

    Offloaded weights lie on no device, so only their dtype is looked at.
    """
    width = backbone.config.hidden_size * (1 + len(backbone.blocks) if every_layer else 1)
    dtype = backbone.embed_tokens.weight.dtype
    return torch.zeros(*shape, width, dtype=dtype, device=tokens.device)


def _after(
    backbone: Backbone, before: SleepCache, *step: object
) -> tuple[torch.Tensor | None, SleepCache]:
    """`_step` that leaves `before` as it is and returns the cache after it."""
    after = before.copy()
    return _step(backbone, after, *step), after


def _step(
    backbone: Backbone,
    cache: SleepCache,
    block: TokenBlock | None,
    following: TokenBlock | None,
    tokens: torch.Tensor,
    supervised: torch.Tensor | None,
    every_layer: bool,
    passes: Passes,
) -> torch.Tensor | None:
    """Read a block, then let the rows sleep whose window must make room for the following one.

    A step ends behind its sleep, so that between steps of equally long rows, where `window`
    checkpointing keeps the cache, it holds nothing but what crosses a boundary.
    """
    h = None if block is None else _read(backbone, cache, block, tokens, supervised, every_layer)
    if following is not None and len(following.full):
        _cross(backbone, cache, following.full, passes)
    return h


def _cross(
    backbone: Backbone, cache: SleepCache, full: torch.Tensor, passes: Passes
) -> None:
    """Let the rows in `full` sleep; those whose window was supervised only evict."""
    learns = torch.is_grad_enabled()
    stays_awake = cache.supervised[full]
    sleeping = full
    if bool(stays_awake.any()):
        consolidate(
            backbone, cache, full[stays_awake], 1, report=not learns, name="cache"
        )
        sleeping = full[~stays_awake]
    if len(sleeping):
        consolidate(
            backbone, cache, sleeping, passes, report=not learns, name="cache"
        )
    windows = backbone.truncation.windows
    if learns and windows is not None:
        due = full[cache.sleeps[full] % windows == 0]
        if len(due):
            cache.detach(due)


def _read(
    backbone: Backbone,
    cache: SleepCache,
    block: TokenBlock,
    tokens: torch.Tensor,
    supervised: torch.Tensor | None,
    every_layer: bool,
) -> torch.Tensor:
    """Pass 1 over one block; returns its last hidden states, or those of every layer joined."""
    part = block.take(tokens)
    if supervised is not None:
        cache.supervised = cache.supervised | (block.take(supervised) & block.real).any(1)
    h = backbone.embed_tokens(part) if tokens.ndim == 2 else part
    if cache.owner is not None:
        # A cache that no one will see again needs no history.
        cache.history = cache.history.extend(h, cache.positions, block.lengths)
    context = backbone.context(
        cache.kept + cache.counts,
        block.lengths,
        cache.slots,
        cache.first_position + cache.counts,
        h,
        sleeping=False,
    )
    layers, group = backbone.blocks, backbone.checkpointing.group
    _, end = backbone.config.loop_range
    memory = {i: m for i, m in enumerate(cache.memory) if m is not None}
    # Where every layer is asked for, each is a range of its own.
    stops = range(1, len(layers) + 1) if every_layer else sorted({end, len(layers)})
    outputs, after, start = [h], {}, 0
    for stop in stops:
        h, new = run_blocks(layers, range(start, stop), h, memory, context, group=group)
        outputs.append(h)
        after |= new
        if stop == end:
            hidden = h
        start = stop
    cache.append(after, hidden, block.lengths)
    return torch.cat(outputs, dim=-1) if every_layer else h
