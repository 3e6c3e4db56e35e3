"""A small model of ours that answers from windows that it slept over, and how that is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_sleep.eval.bridge.texts import Texts
from hybrid_sleep.parametric.measure import repeated
from hybrid_sleep.parametric.sites import frozen
from hybrid_sleep.sleep.cache import SleepCache
from hybrid_sleep.training.loop import fit
from hybrid_sleep.training.optimizer import optimizer_for

# Other texts, read in context: which of the test split, and how many.
UNRELATED, UNRELATED_SEED = 250, 1_000_000


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the model is trained.

    steps, rows: of a step. lr_muon, lr_adamw: learning rates. answers: steps in which the second
    window's values alone count; then every other token does as well, by `rest`, so that the model
    can write such text. hidden: size of the model.
    """

    steps: int = 400
    rows: int = 64
    lr_muon: float = 0.02
    lr_adamw: float = 4e-3
    answers: int = 300
    rest: float = 0.1
    hidden: int = 64


def backbone(texts: Texts, hidden: int) -> dict[str, Any]:
    """Fields of the config: a state-space layer, and behind it an attention."""
    heads = max(1, hidden // 16)
    return {
        "vocab_size": texts.vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": heads,
        "linear_num_key_heads": heads,
        "linear_num_value_heads": heads,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "sleep_attention": "bidirectional",
        "sleep_passes": 2,
        # Of a night's rows every token counts, and their first windows are slept over all the same.
        "sleep_schedule": "every_window",
        "window": texts.window,
    }


def trained_model(texts: Texts, training: Training, seed: int) -> Any:
    """A model trained from scratch, by `seed`."""
    from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HybridSleepForCausalLM(HybridSleepConfig(**backbone(texts, training.hidden)))
    rows = texts.rows("train", seed, training.steps * training.rows).split(training.rows)

    def batches() -> Iterator[dict[str, Tensor]]:
        for step, ids in enumerate(rows):
            weights = torch.zeros(ids.shape[1])
            if step >= training.answers:
                weights[:] = training.rest
            weights[texts.answers] = 1.0
            yield {"input_ids": ids, "weights": weights}

    optimizer = optimizer_for(model, training.lr_muon, training.lr_adamw)
    fit(
        model, batches(), weighted_loss, steps=training.steps, optimizer=optimizer,
        schedule="trapezoid", warmup=training.steps // 12, seed=seed,
    )  # fmt: skip
    return model.eval()


def weighted_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Cross entropy of the tokens of `input_ids: [B, T]`, each by its place's entry of `weights:
    [T]`, of which the first predicts nothing."""
    ids, weights = batch["input_ids"], batch["weights"][1:]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * weights).sum() / (len(ids) * weights.sum())


@torch.no_grad()
def accuracy(model: nn.Module, texts: Texts) -> float:
    """The share of values that are right in the second windows of other texts, none of them of the
    training, whose first windows were slept over."""
    rows = texts.rows("test", UNRELATED_SEED, UNRELATED)
    with frozen(model):
        logits = model(input_ids=rows, use_cache=False).logits
    guesses = logits[:, texts.answers - 1].argmax(-1)
    return float((guesses == rows[:, texts.answers]).double().mean())


@torch.no_grad()
def answered(
    model: nn.Module,
    questions: Sequence[tuple[Sequence[int], Sequence[int]]],
    cache: SleepCache | None = None,
) -> float:
    """The share of `questions`, of one length, whose one token is the likeliest, each asked alone:
    with an empty state, or with `cache`, of one row, which stays as it was."""
    ids = torch.tensor([list(question) for question, _ in questions])
    values = torch.tensor([answer[0] for _, answer in questions])
    past: dict[str, Any] = {"use_cache": False}
    if cache is not None:
        past = {"cache": repeated(cache, len(ids))}
    with frozen(model):
        logits = model(input_ids=ids, **past).logits[:, -1]
    return float((logits.argmax(-1) == values).double().mean())
