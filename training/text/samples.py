"""Text that a model writes: what a run shows beside its perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid_sleep.training.data import derive_seed
from hybrid_sleep.training.text.source import Document
from hybrid_sleep.training.text.tokenizer import Encoder
from hybrid_sleep.validation import check_count

TEMPERATURE = 0.8


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

    check_count("tokens", tokens)
    device = next(model.parameters()).device
    encoder = Encoder(tokenizer)
    encoded = []
    for prompt in prompts:
        ids = encoder(Document(prompt, ends=False))
        if not len(ids):
            raise ValueError(f"prompt must have one or more tokens, got {prompt!r}")
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
