"""Text that a model writes: what a run shows with its perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hybrid_sleep.training.data import derive_seed
from hybrid_sleep.training.text.source import Document
from hybrid_sleep.training.text.tokenizer import Encoder
from hybrid_sleep.validation import check_count

if TYPE_CHECKING:
    from hybrid_sleep.training.text.batches import TextHeldOut

TEMPERATURE = 0.8
SAMPLES = 2  # of a run
WINDOWS = 4  # that a sample goes on for
LONGEST = 2048  # tokens of a sample: they are written one by one, of long windows for hours


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
        given = encoder(Document(prompt, ends=False))
        if not len(given):
            raise ValueError(f"prompt must have one or more tokens, got {prompt!r}")
        encoded.append(torch.from_numpy(given)[None].to(device))
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


def held_out_samples(model: Any, held_out: TextHeldOut, *, passes: int, seed: int) -> list[str]:
    """The beginnings of held-out documents, each with what `model` writes behind: four windows.

    Of windows that are long it is 2048 tokens.
    """
    tokenizer, window = held_out.encoder.tokenizer, model.config.window
    batch = next(held_out.batches())
    prompts: list[str] = []
    for ids, document in zip(batch["input_ids"], batch["document_ids"], strict=True):
        # What the first document of the row begins with; a cut character is left out.
        start = ids[document == 0][: max(1, window // 2)]
        prompt = tokenizer.decode(start, skip_special_tokens=True).strip("\ufffd")
        if prompt.strip() and len(prompts) < SAMPLES:
            prompts.append(prompt)
    written = samples(
        model, tokenizer, prompts, tokens=min(WINDOWS * window, LONGEST), passes=passes, seed=seed
    )
    return [prompt + text for prompt, text in zip(prompts, written, strict=True)]
