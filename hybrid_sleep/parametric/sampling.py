"""What a model writes behind given texts: its softmax as it is, whatever a checkpoint asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from transformers import GenerationConfig

from hybrid_sleep.parametric.measure import going_on, left_padded, pad_token
from hybrid_sleep.parametric.sites import frozen
from hybrid_sleep.validation import check_count

SAMPLED_AT_ONCE = 128


def continuations(
    model: Any,
    tokenizer: Any,
    begun: Sequence[Sequence[int]],
    tokens: int,
    *,
    cache: Any = None,
    seed: int = 0,
    at_once: int = SAMPLED_AT_ONCE,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """`tokens` ids behind each of `begun` (ids), at temperature 1, with every filter off.

    cache: of `model`, of one row, from which each of them goes on; left as it was.
    Nothing ends a row but its length: a text that ends goes on. `model.generation_config` has no
    say. Rows are drawn `at_once` together, the shortest first, so what one row gets depends on the
    others as well as on `seed`. The global random state is left as it was. Raises ValueError for
    an empty text or no token.
    """
    check_count("tokens", tokens)
    check_count("at_once", at_once)
    if not all(map(len, begun)):
        raise ValueError("begun must be texts of at least one token, got an empty one")
    device = next(model.parameters()).device
    order = sorted(range(len(begun)), key=lambda i: len(begun[i]))
    found: dict[int, list[int]] = {}
    own_config = model.generation_config
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        # A model may bring filters and an end of its own, which arguments cannot all switch off.
        stack.callback(setattr, model, "generation_config", own_config)
        model.generation_config = GenerationConfig()
        torch.manual_seed(seed)
        while len(found) < len(order):
            part = order[len(found) : len(found) + at_once]
            ids, mask = left_padded([begun[i] for i in part], pad_token(tokenizer), device)
            given = going_on(cache, mask)
            out = model.generate(ids, **given, max_new_tokens=tokens, do_sample=True, top_k=0)
            found.update(zip(part, out[:, ids.shape[1] :].tolist(), strict=True))
            if progress is not None:
                progress(len(found), len(order))
    return [found[i] for i in range(len(order))]
