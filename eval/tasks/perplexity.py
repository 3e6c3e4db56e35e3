"""How well a model predicts text at each sleep depth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval.tasks.accuracy import check_depths

if TYPE_CHECKING:
    import torch

POSITION_BINS = 8
LAST_WINDOW = 8


def measure_perplexity(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    depths: Iterable[int],
    *,
    bytes_from: int | None = None,
) -> dict[int, dict[str, Any]]:
    """The loss of `model` on text at each of `depths`, from pass 1, sleeping at every full window.

    batches: with `input_ids: [B, T]` and, where rows hold several documents or pads,
    `document_ids: [B, T]` (-1 at pads), such as those of a `TextHeldOut`. Every token is predicted
    but the first of each document. Returns by depth:
        loss: mean negative log likelihood of a token, in nats; perplexity: e to it.
        tokens: how many were predicted.
        by_position: mean loss in 8 equal parts of the window (fewer if it is shorter), by the place
            of the token that predicts.
        by_window: mean loss by the window of its document that the predicting token is in, 0, 1,
            2...; the entry of window 8 has all later ones too. Only long documents have later
            windows: compare depths at one window, rather than windows at one depth.
        bits_per_byte: if `bytes_from` is given: ids from there on are a byte each, those below
            special tokens, which count as no byte, but their bits do.
    A mean over no token is None. The model is put in eval mode and left as it was found. Raises
    ValueError for depths that are not distinct integers of at least 1, and if nothing is predicted.
    """
    import torch

    from hybrid_sleep.sleep.documents import positions_in_document

    depths = check_depths(depths)
    window = model.config.window
    bins = min(POSITION_BINS, window)
    device = next(model.parameters()).device
    # Sum of losses and number of tokens by place in the window and by window.
    sums = {depth: torch.zeros(2, bins, LAST_WINDOW + 1, dtype=torch.float64) for depth in depths}
    byte_count = 0
    training = model.training
    model.eval()
    try:
        for batch in batches:
            ids, documents = batch["input_ids"].to(device), batch.get("document_ids")
            if documents is None:
                documents = torch.zeros_like(ids)
            documents = documents.to(device)
            position = positions_in_document(documents)
            predicts, place = position[:, 1:] > 0, position[:, :-1]
            cell = place % window * bins // window * (LAST_WINDOW + 1)
            cell = (cell + (place // window).clamp(max=LAST_WINDOW))[predicts].cpu()
            if bytes_from is not None:
                byte_count += int((ids[:, 1:][predicts] >= bytes_from).sum())
            given = {"input_ids": ids, "use_cache": False}
            if bool((documents != 0).any()):
                given["document_ids"] = documents
            for depth in depths:
                with torch.no_grad():
                    logits = model(**given, sleep_passes=depth).logits[:, :-1]
                    losses = torch.nn.functional.cross_entropy(
                        logits[predicts].float(), ids[:, 1:][predicts], reduction="none"
                    ).cpu()
                total, count = sums[depth].view(2, -1)
                total.index_add_(0, cell, losses.double())
                count.index_add_(0, cell, torch.ones(len(cell), dtype=torch.float64))
    finally:
        model.train(training)
    results = {}
    for depth, (total, count) in sums.items():
        tokens = int(count.sum())
        if not tokens:
            raise ValueError("batches must hold a token behind another, got none")
        loss = float(total.sum()) / tokens
        results[depth] = {
            "loss": loss,
            "perplexity": torch.tensor(loss, dtype=torch.float64).exp().item(),
            "tokens": tokens,
            "by_position": _means(total.sum(1), count.sum(1)),
            "by_window": _means(total.sum(0), count.sum(0)),
        }
        if byte_count:
            results[depth]["bits_per_byte"] = float(total.sum()) / math.log(2) / byte_count
    return results


def _means(total: torch.Tensor, count: torch.Tensor) -> list[float | None]:
    """Means of groups, None for an empty one; empty groups at the end are left out."""
    means = [t / c if c else None for t, c in zip(total.tolist(), count.tolist(), strict=True)]
    while means and means[-1] is None:
        means.pop()
    return means
