"""A model whose likelihoods are known, a chat template, and dreams that passed every check."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from editable import word_tokenizer
from torch import nn

from hybrid_sleep.parametric.dreams.dream import REQUIRED, Check, Dream

TEMPLATE = (
    "<s>{% for turn in messages %}{{ turn['role'] }} : {{ turn['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}Answer : {% endif %}"
)


def chat_tokenizer() -> Any:
    """The word tokenizer, with a template of turns."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class CopyModel(nn.Module):
    """Says each token of what it has read, however often, e^`lift` times as likely as others."""

    def __init__(self, vocab: int, lift: float = 2.0):
        super().__init__()
        self.lift = nn.Parameter(torch.tensor(lift, dtype=torch.float64))
        self.vocab = vocab
        self.config = SimpleNamespace(weights_version=0)

    def forward(
        self, input_ids: Any, attention_mask: Any = None, use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> Any:  # fmt: skip
        read = nn.functional.one_hot(input_ids, self.vocab).cumsum(1) > 0
        return SimpleNamespace(logits=(self.lift * read)[:, -logits_to_keep:])

    def nll(self, ids: Any, start: int) -> float:
        """Mean over the tokens from `start` on, by the definition."""
        total = torch.zeros((), dtype=torch.float64)
        for at in range(start, len(ids)):
            seen = set(ids[:at])
            norm = (len(seen) * self.lift.exp() + self.vocab - len(seen)).log()
            total = total + norm - (self.lift if ids[at] in seen else 0.0)
        return float(total / (len(ids) - start))


def dream(text: str = "The home of Ada is Lisbon", **changes: Any) -> Dream:
    """An acquisition dream that is kept, unless `changes` say otherwise."""
    kind = changes.get("kind", "acquisition")
    given = {
        "kind": kind, "form": "paraphrase", "text": text, "ids": (1, 4, 5, 6), "start": 1,
        "sources": ("day-1",) if kind == "acquisition" else (), "weights": "digest", "seed": 0,
        "number": 0, "checks": tuple(Check(name, True) for name in REQUIRED.get(kind, ("form",))),
        **changes,
    }  # fmt: skip
    return Dream(**given)
