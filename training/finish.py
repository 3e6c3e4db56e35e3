"""What a finished run leaves beside its model: a figure and, of text, what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_sleep.support.io import write_text_atomic
from hybrid_sleep.training.folder import SAMPLES_FILE
from hybrid_sleep.training.plots import save_run_plot
from hybrid_sleep.training.text.samples import samples

if TYPE_CHECKING:
    from hybrid_sleep.training.config import RunConfig
    from hybrid_sleep.training.text.batches import TextHeldOut

SAMPLES = 2
WINDOWS = 4  # that a sample goes on for
LONGEST = 2048  # tokens of a sample: they are written one by one, of long windows for hours


def finish(model: Any, run: RunConfig, held_out: Any, metrics: Path) -> list[str]:
    """Draw `run.png` and, of text, write `samples.txt`; returns the samples, prompts included."""
    out = metrics.parent
    floor = run.load_task().floor().get("exact") if run.text is None else None
    save_run_plot(metrics, out, floor)
    if run.text is None or held_out is None:
        return []
    texts = write_samples(model, held_out, passes=run.sleep_passes.deepest, seed=run.train.seed)
    write_text_atomic(out / SAMPLES_FILE, "\n\n".join(texts) + "\n")
    return texts


def write_samples(model: Any, held_out: TextHeldOut, *, passes: int, seed: int) -> list[str]:
    """The beginnings of held-out documents, each with what `model` writes behind: four windows.

    Of windows that are long it is 2048 tokens.
    """
    tokenizer, window = held_out.encoder.tokenizer, model.config.window
    batch = next(held_out.batches())
    prompts = []
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


def held_out_table(metrics: dict[str, Any]) -> str:
    """Perplexity of held-out text by depth, and the loss by window, in a table for the terminal."""
    measured = {name: metrics[name] for name in ("perplexity", "bits_per_byte") if name in metrics}
    windows = metrics.get("by_window", {})
    lines = ["depth  " + "  ".join(f"{name:>13}" for name in measured) + "  loss in window 0, 1..."]
    for depth in metrics["perplexity"]:
        numbers = "  ".join(f"{values[depth]:13.4f}" for values in measured.values())
        by_window = " ".join("-" if x is None else f"{x:.3f}" for x in windows.get(depth, []))
        lines.append(f"{depth:5}  {numbers}  {by_window}")
    return "\n".join(lines)
