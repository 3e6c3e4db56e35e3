"""Log probabilities of continuations of token sequences, computing once what several share.

Of sequences of which one is the beginning of another, such as those of the labels of one example,
only the longest runs through the model. A prefix that several sequences of a batch have in common,
such as the context of several choices, is prefilled and consolidated once; its cache is then copied
to a row for each. Both leave every number what it is alone, because pass 1 is causal and a row
sleeps when its own window is full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from hybrid_sleep.eval.harness.batches import group_by_prefix, sort_by_prefix

LOGITS_AT_ONCE = 1 << 26
# Two calls of the model cost more than one: what they save of tokens must be worth it.
SHARED_BELOW = 0.75


class Likelihood(tuple):
    """(log probability, whether greedy) of a continuation, as lm-eval has it.

    `correct` says of each of its tokens whether it is the most likely one at its position.
    """

    correct: tuple[bool, ...]

    def __new__(cls, log_probability: float, correct: Sequence[bool]) -> Likelihood:
        self = super().__new__(cls, (log_probability, all(correct)))
        self.correct = tuple(correct)
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self[0], self.correct


@torch.no_grad()
def likelihoods(
    requests: Sequence[tuple[Sequence[int], int]],
    forward: Callable[..., Any],
    head: torch.nn.Module,
    rows_at_once: Callable[[int], int],
) -> Iterator[list[tuple[int, Likelihood]]]:
    """Yield, a batch at a time, the index of each request and the likelihood of its continuation.

    A request is (tokens, how many of the last ones are its continuation), with at least one token
    before them. `forward(rows)` runs rows of different lengths through the backbone (`cache`,
    `use_cache` as in transformers); `head` makes logits of its hidden states. `rows_at_once(T)`:
    rows of a batch of sequences of T tokens.
    """
    # The last token of a sequence predicts nothing that is scored.
    rows = group_by_prefix([tokens[:-1] for tokens, _ in requests])
    shared = {
        row: row[: min(len(requests[i][0]) - requests[i][1] for i in members)]
        for row, members in rows.items()
    }
    order = sort_by_prefix(shared)
    size = rows_at_once(len(order[0])) if order else 1
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        hidden = _hidden_states(batch, [shared[row] for row in batch], forward)
        members = [(at, i) for at, row in enumerate(batch) for i in rows[row]]
        places: list[tuple[int, int]] = []
        targets: list[int] = []
        for at, i in members:
            tokens, count = requests[i]
            places += [(at, t) for t in range(len(tokens) - 1 - count, len(tokens) - 1)]
            targets += tokens[-count:]
        scores, correct = _score(hidden, head, places, targets)
        counts = [requests[i][1] for _, i in members]
        yield [
            (i, Likelihood(float(score.sum()), right.tolist()))
            for (_, i), score, right in zip(
                members, scores.split(counts), correct.split(counts), strict=True
            )
        ]


def _hidden_states(
    rows: Sequence[tuple[int, ...]],
    prefixes: Sequence[tuple[int, ...]],
    forward: Callable[..., Any],
) -> torch.Tensor:
    """Last hidden states `[B, T, D]` of rows of different lengths, each as if alone.

    prefixes: what each row begins with. One that several rows begin with is computed once, where
    that saves a quarter of the tokens.
    """
    shared = list(dict.fromkeys(prefixes))
    tails = [row[len(prefix) :] for row, prefix in zip(rows, prefixes, strict=True)]
    once = len(shared) * max(map(len, shared)) + len(rows) * max(map(len, tails))
    if once > SHARED_BELOW * len(rows) * max(map(len, rows)):
        return forward(rows).last_hidden_state
    out = forward(shared, use_cache=True)
    source = [shared.index(prefix) for prefix in prefixes]
    out.cache.batch_select_indices(torch.tensor(source))
    begun = out.last_hidden_state
    rest = forward(tails, cache=out.cache, use_cache=True).last_hidden_state
    hidden = begun.new_zeros(len(rows), max(map(len, rows)), begun.shape[2])
    for i, (row, prefix) in enumerate(zip(rows, prefixes, strict=True)):
        hidden[i, : len(prefix)] = begun[source[i], : len(prefix)]
        hidden[i, len(prefix) : len(row)] = rest[i, : len(tails[i])]
    return hidden


def _score(
    hidden: torch.Tensor,
    head: torch.nn.Module,
    places: Sequence[tuple[int, int]],
    targets: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log probability of each target at its (row, position), and whether it is the most likely."""
    row, position = torch.tensor(places, device=hidden.device).T
    target = torch.tensor(targets, device=hidden.device)
    scores, correct = [], []
    # Logits of a whole batch at all positions would not fit where the vocabulary is large.
    at_once = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    for part in torch.arange(len(targets), device=hidden.device).split(at_once):
        logits = head(hidden[row[part], position[part]])
        correct.append((logits.argmax(-1) == target[part]).cpu())
        # Log probabilities of long texts add up, and so would the rounding of bf16.
        logits = logits if logits.dtype == torch.float64 else logits.float()
        chosen = logits.log_softmax(-1).gather(1, target[part, None])
        scores.append(chosen[:, 0].double().cpu())
    return torch.cat(scores), torch.cat(correct)
