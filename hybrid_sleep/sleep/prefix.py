"""Which part of a prompt a cache has processed: transformers continues with the whole text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.utils import logging

from hybrid_sleep.sleep.cache import SleepCache
from hybrid_sleep.sleep.history import history_of

logger = logging.get_logger(__name__)

_COLUMNS = 1024
_AS_NEW = "to have every token read as new, give an attention_mask that covers the past as well"


def without_read(
    embed: Callable[[torch.Tensor], torch.Tensor],
    cache: SleepCache,
    tokens: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor | None:
    """`mask: [B, T]` of a prompt, with what the cache has processed of it masked like pads.

    tokens: ids `[B, T]`, which `embed` turns into embeddings, or embeddings `[B, T, D]`. A prompt
    is the whole text if each row begins with all that the cache has processed, and holds new
    tokens alone if none does.

    Raises ValueError where rows differ in that, where nothing is new, and where a prompt that is
    longer than the past begins like it and then differs: a text that was changed, most likely.
    """
    batch, columns = tokens.shape[:2]
    past = cache.positions
    real = torch.ones(batch, columns, dtype=torch.bool) if mask is None else mask.bool().cpu()
    total = real.sum(1)
    if len(past) != batch or bool((total < past).all()) or not bool(past.any()):
        return mask
    known = cache.history.folded()

    def parts():
        for part, seen in zip(
            tokens.split(_COLUMNS, dim=1), real.split(_COLUMNS, dim=1), strict=True
        ):
            yield part if tokens.ndim == 3 else embed(part), seen

    with torch.no_grad():
        begins = history_of(parts(), past.minimum(total))
    same = ((begins.whole == known.whole.to(begins.whole.device)).cpu()) & (total >= past)
    alike = (begins.opening == known.opening.to(begins.opening.device)).cpu() & (total > past)
    if not bool(same.any()):
        if bool(alike.any()):
            row = int(alike.nonzero()[0])
            raise ValueError(
                f"the prompt of row {row} begins like the {int(past[row])} tokens that the cache "
                f"has read and differs before they end; go on with the same text, or {_AS_NEW}"
            )
        return mask
    if not bool(same.all()):
        raise ValueError(
            f"the prompts of rows {same.nonzero().flatten().tolist()} begin with what the cache "
            f"has read, the others do not; give the whole text of every row, or new tokens alone: "
            f"{_AS_NEW}"
        )
    if bool((total == past).any()):
        raise ValueError(
            f"the prompt of row {int((total == past).nonzero()[0])} holds nothing but what the "
            "cache has read; give at least one token more, such as the last one generated, or "
            f"{_AS_NEW}"
        )
    logger.warning_once(
        "The prompt begins with all that the cache has read, which is not read a second time; "
        f"{_AS_NEW}."
    )
    unread = real & (real.cumsum(1) > past[:, None])
    return unread.long().to(tokens.device)
