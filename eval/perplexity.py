"""How well a model predicts text at each sleep depth, and text that it writes itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval.depth import check_depths
from hybrid_sleep.eval.tasks.base import check_int
from hybrid_sleep.training.data import derive_seed
from hybrid_sleep.training.text.source import Document
from hybrid_sleep.training.text.tokenizer import Encoder, reads_bytes

if TYPE_CHECKING:
    import torch

POSITION_BINS = 8
LAST_WINDOW = 8
TEMPERATURE = 0.8
SPECIAL_IDS = 3


def measure_perplexity(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    depths: Iterable[int],
    *,
    tokenizer: Any = None,
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
        bits_per_byte: if `tokenizer` reads bytes. Eos tokens count as no byte, but their bits do.
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
            # The special tokens of a tokenizer of bytes come first.
            byte_count += int((ids[:, 1:][predicts] >= SPECIAL_IDS).sum())
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
            raise ValueError("batches hold no token behind another; allowed: at least one pair")
        loss = float(total.sum()) / tokens
        results[depth] = {
            "loss": loss,
            "perplexity": torch.tensor(loss, dtype=torch.float64).exp().item(),
            "tokens": tokens,
            "by_position": _means(total.sum(1), count.sum(1)),
            "by_window": _means(total.sum(0), count.sum(0)),
        }
        if tokenizer is not None and reads_bytes(tokenizer) and byte_count:
            results[depth]["bits_per_byte"] = float(total.sum()) / math.log(2) / byte_count
    return results


def samples(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    tokens: int,
    passes: int | None = None,
    seed: int = 0,
) -> list[str]:
    """What `model` writes behind each prompt: `tokens` tokens drawn at temperature 0.8.

    It sleeps at every full window, `passes` deep (None: its config's depth), so a text may be many
    windows long; it is not ended by an eos token. Each text depends on its prompt and (`seed`,
    place in `prompts`) alone. Raises ValueError for a prompt without tokens.
    """
    import torch

    check_int("tokens", tokens, 1)
    device = next(model.parameters()).device
    encoder = Encoder(tokenizer)
    encoded = []
    for prompt in prompts:
        ids = encoder(Document(prompt, ends=False))
        if not len(ids):
            raise ValueError(f"prompt {prompt!r} has no tokens; allowed: at least one")
        encoded.append(torch.from_numpy(ids)[None].to(device))
    # A vocabulary may be wider than the tokenizer's, which cannot decode the rest.
    unknown = list(range(len(tokenizer), model.config.vocab_size))
    texts = []
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for place, ids in enumerate(encoded):
                torch.manual_seed(derive_seed("sample", seed, place))
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    temperature=TEMPERATURE,
                    top_k=0,
                    max_new_tokens=tokens,
                    min_new_tokens=tokens,
                    suppress_tokens=unknown or None,
                    eos_token_id=encoder.eos,
                    pad_token_id=encoder.pad,
                    sleep_passes=passes,
                )
                new = out[0, ids.shape[1] :].tolist()
                texts.append(tokenizer.decode(new, skip_special_tokens=True))
    finally:
        model.train(training)
    return texts


def _means(total: torch.Tensor, count: torch.Tensor) -> list[float | None]:
    """Means of groups, None for an empty one; empty groups at the end are left out."""
    means = [t / c if c else None for t, c in zip(total.tolist(), count.tolist(), strict=True)]
    while means and means[-1] is None:
        means.pop()
    return means
