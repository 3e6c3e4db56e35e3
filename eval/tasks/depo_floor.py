"""What a model that remembers nothing of a Depo cycle can still get right, from earlier answers."""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np

ENUMERATED_NODES = 8  # up to this many nodes all cycles are enumerated
MOST_SEQUENCES = 4096  # more sequences of k than this are sampled
SAMPLED = 512


@lru_cache(maxsize=64)
def best_guess(
    nodes: int, questions: int, hops: tuple[int, ...]
) -> tuple[tuple[tuple[int, float], ...], float]:
    """Pairs (k, share right of the best guess for questions of k steps), and a standard error.

    The guess knows all nodes, the question, and the questions and answers before it. Every cycle
    is equally likely, so that it is right in as many of those that agree with what came before as
    go on to the most frequent answer. Starts differ, `hops` are equally likely; which nodes the
    starts are makes no difference. The error is the largest of the shares', 0 if every sequence of
    k was looked at.
    """
    cycles = np.array([(0, *rest) for rest in itertools.permutations(range(1, nodes))])
    place = np.argsort(cycles, axis=1)
    ways = len(hops) ** questions
    if ways <= MOST_SEQUENCES:
        sequences = np.array(list(itertools.product(range(len(hops)), repeat=questions)))
    else:
        stream = np.random.Philox(np.random.SeedSequence([nodes, questions, *hops]))
        words = stream.random_raw(SAMPLED * questions).reshape(SAMPLED, questions)
        sequences = (words % np.uint64(len(hops))).astype(np.int64)
    sequences = sequences[np.lexsort(sequences.T[::-1])]
    shares = np.empty(sequences.shape)
    # By question: the share right, and the number of each cycle's history once it is answered.
    trail: list[tuple[float, np.ndarray]] = []
    for row, sequence in enumerate(sequences):
        # What the last sequence shares with this one need not be worked out again.
        differs = np.flatnonzero(sequence != sequences[row - 1]) if row else [0]
        del trail[differs[0] if len(differs) else questions :]
        for start in range(len(trail), questions):
            ends = (place[:, start] + hops[sequence[start]]) % nodes
            answers = np.take_along_axis(cycles, ends[:, None], axis=1)[:, 0]
            histories = (trail[-1][1] if trail else 0) * nodes + answers
            counts = np.bincount(histories)
            counts = np.pad(counts, (0, -len(counts) % nodes)).reshape(-1, nodes)
            share = counts.max(axis=1).sum() / len(cycles)
            trail.append((share, np.unique(histories, return_inverse=True)[1]))
        shares[row] = [share for share, _ in trail]
    by_hops, error = [], 0.0
    for which, k in enumerate(hops):
        seen = shares[sequences == which]
        by_hops.append((k, float(seen.mean())))
        if ways > MOST_SEQUENCES:
            error = max(error, float(seen.std(ddof=1) / len(seen) ** 0.5))
    return tuple(by_hops), error
