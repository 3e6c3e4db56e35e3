"""Pass 1: the ordinary forward over a batch, window by window, with a sleep at every boundary."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers.utils import logging

from hybrid_sleep.sleep.algorithm import consolidate
from hybrid_sleep.sleep.backbone import Backbone
from hybrid_sleep.sleep.branches import branch, rows_by_depth, shares_first_window
from hybrid_sleep.sleep.cache import SleepCache
from hybrid_sleep.sleep.checkpointing import recompute
from hybrid_sleep.sleep.decoding import decode
from hybrid_sleep.sleep.documents import Documents
from hybrid_sleep.sleep.options import Depths
from hybrid_sleep.sleep.pass_one import pass_one
from hybrid_sleep.sleep.windows import TokenBlock, cut, unpack

logger = logging.get_logger(__name__)


def check_supervised(
    backbone: Backbone, supervised: torch.Tensor | None, tokens: torch.Tensor, passes: Depths
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
    if backbone.options.schedule == "every_window":
        return None
    if supervised is not None:
        return supervised.cpu()
    learns = backbone.training and torch.is_grad_enabled()
    if learns and passes != 1 and shape[1] > backbone.options.window:
        logger.warning_once(
            "sleep_schedule='context_windows' has no effect in this training step: forward() got "
            "neither labels nor `supervised`, so windows sleep that the loss is computed on as "
            "well. Where the loss is computed elsewhere (label smoothing, compute_loss_func, trl's "
            "trainers), give supervised=(labels != -100), which a data collator wrapped in "
            "hybrid_sleep.training.MarkSupervised does, or set config.sleep_schedule to "
            "'every_window'"
        )
    return None


def forward(
    backbone: Backbone,
    tokens: torch.Tensor,
    real: torch.Tensor | None,
    cache: SleepCache,
    passes: Depths,
    *,
    supervised: torch.Tensor | None = None,
    every_layer: bool = False,
    first: int = 0,
) -> torch.Tensor:
    """Hidden states `[B, T - first, D]` of the columns from `first` on, zeros at pads.

    every_layer: `[B, T - first, (1 + layers) D]` instead, embeddings and what each layer gives.

    tokens: ids `[B, T]` or embeddings `[B, T, D]`; real: bool `[B, T]`, False at pads, None for
    none; supervised: see `check_supervised`, their windows only evict. `cache` takes in the tokens;
    it is as it was if anything raises. passes: N, or a tuple of one for each of several groups of
    rows; what training groups have in common at the start is then computed once (`branches`).
    """
    batch, columns = tokens.shape[:2]
    plain = supervised is None and not every_layer and first == 0
    if (h := decode(backbone, cache, tokens, real, plain=plain)) is not None:
        return h
    if isinstance(passes, tuple) and shares_first_window(
        backbone, tokens, real, cache, passes, supervised
    ):
        return _forward_branched(
            backbone, tokens, cache, passes, supervised, every_layer=every_layer, first=first
        )
    by_window = backbone.checkpointing.window and torch.is_grad_enabled()
    outputs: list[tuple[TokenBlock, torch.Tensor]] = []
    with cache.transaction():
        for block in cut(cache.counts, real, columns, backbone.options.window):
            arguments = (block, tokens, supervised, every_layer, passes)
            if by_window:
                # A step ends behind its sleep, so that between steps, where the cache is kept for
                # the backward, it holds nothing but what crosses a boundary.
                h, after = recompute(_step_of_copy, backbone, cache.copy(), *arguments)
                cache.assign(after)
            else:
                h = _step(backbone, cache, *arguments)
            if h is not None:
                outputs = [pair for pair in outputs if pair[0].last_column >= first]
                outputs.append((block, h))
        cache.columns += columns
    cache.single = columns == 1
    if outputs:
        return unpack(outputs, first, columns)
    return _zeros(backbone, tokens, every_layer, batch, columns - first)


def _forward_branched(
    backbone: Backbone,
    tokens: torch.Tensor,
    cache: SleepCache,
    depths: tuple[int, ...],
    supervised: torch.Tensor | None,
    *,
    every_layer: bool,
    first: int,
) -> torch.Tensor:
    """`forward` of groups that begin with the same window, which is read and slept on once."""
    window, rows = backbone.options.window, len(tokens) // len(depths)
    with cache.transaction():
        trunk = SleepCache(backbone.options)
        trunk.owner = cache.owner
        trunk.open(rows)
        opening = tokens[:rows, :window]
        # Nothing follows the window within this call, so that it stays open.
        h = forward(backbone, opening, None, trunk, 1, every_layer=every_layer)
        cache.assign(branch(backbone, trunk, depths))
        rest = forward(
            backbone,
            tokens[:, window:],
            None,
            cache,
            depths,
            supervised=None if supervised is None else supervised[:, window:],
            every_layer=every_layer,
            first=max(0, first - window),
        )
    return torch.cat([h.repeat(len(depths), 1, 1)[:, first:], rest], dim=1)


def forward_documents(
    backbone: Backbone,
    tokens: torch.Tensor,
    documents: Documents,
    cache: SleepCache | None,
    passes: Depths,
    *,
    supervised: torch.Tensor | None = None,
    every_layer: bool = False,
) -> torch.Tensor:
    """As `forward`, each document as a row of its own: `[B, T, D]`, zeros outside of documents.

    cache: takes one row per document, which then go together; None takes documents of
    similar length together, each group only as far as its longest.
    """
    parts, source, offset = [], torch.zeros(tokens.shape[:2], dtype=torch.long), 1
    groups: Iterable[torch.Tensor] = documents.by_length()
    if cache is not None and len(documents.length):
        groups = [torch.arange(len(documents.length))]
    for members in groups:
        row, column, real = documents.layout(members)
        here = row.to(tokens.device), column.to(tokens.device)
        part = SleepCache(backbone.options) if cache is None else cache
        part.open(len(members))
        h = forward(
            backbone,
            tokens[here],
            None if bool(real.all()) else real,
            part,
            passes,
            supervised=None if supervised is None else supervised[row, column],
            every_layer=every_layer,
        )
        slots = offset + torch.arange(real.numel()).view(real.shape)
        source[row.expand_as(column)[real], column[real]] = slots[real]
        offset += real.numel()
        parts.append(h.flatten(0, 1))
    # Slot 0 is the zero that pads show.
    none = torch.zeros_like(parts[0][:1]) if parts else _zeros(backbone, tokens, every_layer, 1)
    parts.insert(0, none)
    h = torch.cat(parts).index_select(0, source.flatten().to(tokens.device))
    return h.view(*source.shape, -1)


def _zeros(
    backbone: Backbone, tokens: torch.Tensor, every_layer: bool, *shape: int
) -> torch.Tensor:
    """Zeros `[*shape, D]`, or as many D as `every_layer` gives, of the dtype of embeddings."""
    # Of no tokens: offloaded weights lie on no device, so only the backbone knows how to embed.
    none = backbone.embed(tokens[:1, :1]) if tokens.ndim == 2 else tokens
    layers = backbone.options.layers(len(backbone.blocks))
    width = none.shape[-1] * (1 + layers if every_layer else 1)
    return torch.zeros(*shape, width, dtype=none.dtype, device=tokens.device)


def _step_of_copy(
    backbone: Backbone, before: SleepCache, *arguments: Any
) -> tuple[torch.Tensor | None, SleepCache]:
    """`_step` that leaves `before` as it is and returns the cache after it."""
    after = before.copy()
    return _step(backbone, after, *arguments), after


def _step(
    backbone: Backbone,
    cache: SleepCache,
    block: TokenBlock,
    tokens: torch.Tensor,
    supervised: torch.Tensor | None,
    every_layer: bool,
    passes: Depths,
) -> torch.Tensor | None:
    """Pass 1 over a block, then sleep for the rows whose window must make room."""
    h = None
    if int(block.lengths.max()):
        h = _pass_one(backbone, cache, block, tokens, supervised, every_layer)
    if len(block.full):
        _cross(backbone, cache, block.full, passes)
    return h


def _cross(backbone: Backbone, cache: SleepCache, full: torch.Tensor, passes: Depths) -> None:
    """Let the rows in `full` sleep; those whose window was supervised only evict.

    Algorithm 1 consolidates windows without loss only: a window that is predicted on gets its one
    pass, and the loss of a sleep's passes is not what a user would have seen.
    """
    only_evict = cache.supervised[full]
    sleeping = rows_by_depth(full[~only_evict], len(cache.counts), passes)
    for rows, depth in ((full[only_evict], 1), *sleeping):
        if len(rows):
            consolidate(backbone, cache, rows, depth)
    windows = backbone.truncation.windows
    if windows is not None and torch.is_grad_enabled():
        due = full[cache.sleeps[full] % windows == 0]
        if len(due):
            cache.detach(due)


def _pass_one(
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
    h = backbone.embed(part) if tokens.ndim == 2 else part
    if cache.owner is not None:
        # A cache that is not returned needs no history.
        cache.history = cache.history.extend(h, cache.positions, block.lengths)
    context = backbone.context(
        cache.kept + cache.counts,
        block.lengths,
        cache.slots,
        cache.first_position + cache.counts,
        h,
        sleeping=False,
    )
    outputs, hidden, after = pass_one(backbone, h, cache.states, context, every_layer=every_layer)
    cache.append(after, hidden, block.lengths)
    return torch.cat(outputs, dim=-1) if every_layer else outputs[-1]
