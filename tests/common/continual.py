"""The smallest models that can forget: softmax regression and a tiny recurrent language model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Softmax(nn.Module):
    """Token i has features `x[i]`, fixed; logits of the next token are `weight @ x[i]`, fp64."""

    def __init__(self, features: Tensor, classes: int, seed: int = 0):
        super().__init__()
        self.config: Any = SimpleNamespace()
        self.register_buffer("x", features)
        self.weight = nn.Parameter(randn(classes, features.shape[1], seed=seed))

    def forward(self, input_ids: Tensor, **others: Any) -> Any:
        return SimpleNamespace(logits=self.x[input_ids] @ self.weight.T)


class Recurrent(nn.Module):
    """A GRU over one-hot tokens, fp64."""

    def __init__(self, vocab: int = 3, hidden: int = 4):
        super().__init__()
        self.config: Any = SimpleNamespace()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.gru = nn.GRU(vocab, hidden, batch_first=True)
            self.head = nn.Linear(hidden, vocab)
        self.vocab = vocab
        self.double()

    def forward(self, input_ids: Tensor, **others: Any) -> Any:
        one_hot = nn.functional.one_hot(input_ids, self.vocab).double()
        return SimpleNamespace(logits=self.head(self.gru(one_hot)[0]))


class Bowl(nn.Module):
    """Weights `w`, whose loss for a task is `1/2 sum h (w - target)^2`; fp64."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.config: Any = SimpleNamespace()
        self.w = nn.Parameter(start.double().clone())


def bowl(model: Bowl, task: dict[str, Tensor]) -> Tensor:
    return 0.5 * (task["h"] * (model.w - task["target"]).square()).sum()
