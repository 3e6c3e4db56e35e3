"""Pointer chasing: which node is k pointers above another, asked when the pointers have gone?

A pass can follow a pointer, or double what it has followed: attention that reads where its own
pointer points makes two hops of one, so that the reach of N passes may grow as 2^N (Sanford, Hsu,
Telgarsky, arXiv 2402.09268: k hops need depth of order log k). In the topological order of a tree a
single delta rule copies from parent to child in one scan; in random order a second look is needed
as well.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hybrid_sleep.eval.tasks.base import (
    IGNORED,
    Majority,
    RowTask,
    Task,
    check_asked,
    check_levels,
)
from hybrid_sleep.eval.tasks.sampling import U64, distinct, draw, mix
from hybrid_sleep.validation import check_choice, check_count, check_flag

ORDERS = ("topological", "random")
FEWEST_NODES = 8  # 8! labels and more, so that neither split is small
MOST_NODES = 1024
FLOOR_TREES = 1 << 14


class Ancestor(RowTask):
    """A tree of `nodes` labelled nodes; which node is k of `hops` pointers above another?

    Node i, in an order that labels do not tell, points to one of the `back` nodes before it,
    equally often; the first, the root, to itself. With `back` None the pointers make one cycle: all
    nodes have ancestors without end. A pointer is two tokens, a node and where it points; where
    `order` is `topological`, parents are written before their children, `random` mixes the pointers
    anew for each tree.

    The tree fills `windows` windows. Then, in a window of their own, `queries` questions: a token
    for k, one of `hops`, equally often, and a node that has k ancestors. The k-th of them is the
    label of the position behind it, where `input_ids` holds the next question, so that no question
    sees the answer to another; a stop token ends the row.

    The difficulty of a question is k. Tokens: nodes; `hops`, ascending; stop.

    With `apart` every question stands in an example of its own, where nothing but the memory can
    tell the answer: `queries` examples, one after another, have the same tree.

    With `compound` a pointer is one token, and so is a question: of two digits (`token_fields`, see
    `CompoundEmbedding`). The second is a node; the first is the node that points to it; k, where
    it is asked about; or, behind these, a sign that it is the answer. Last the sign of the stop.

    Train and test trees are disjoint for any seeds: a 64-bit hash of where each label points,
    in whatever order that stands, decides (one in 16 is test). Examples come from raw Philox words.

    Raises ValueError unless 8 <= nodes <= 1024, `hops` are different integers of at least 1, every
    tree has a node with as many ancestors, which is `back * max(hops) < nodes`, `order` is one of
    the two, and `random` for a cycle, which has no first node, `windows` divide the tokens of a
    tree, and the questions fit into one.
    """

    name = "ancestor"
    difficulty = "hops"
    question = "label"

    def __init__(
        self,
        nodes: int = 32,
        hops: int | Sequence[int] = (1, 2, 4, 8),
        order: str = "topological",
        back: int | None = 3,
        windows: int = 1,
        queries: int = 10,
        compound: bool = False,
        apart: bool = False,
    ):
        self.nodes = check_count("nodes", nodes, FEWEST_NODES, MOST_NODES)
        self.back = None if back is None else check_count("back", back)
        self.hops = check_levels("hops", hops, 1)
        if back is not None and back * self.hops[-1] >= nodes:
            raise ValueError(
                f"hops must be at most {(nodes - 1) // back}, so that every tree of {nodes} nodes "
                f"with back={back} has a node with as many ancestors, got {hops!r}"
            )
        check_choice("order", order, ORDERS)
        if back is None and order != "random":
            raise ValueError(f"order must be 'random' for a cycle (back=None), got {order!r}")
        check_count("windows", windows)
        self.order = order
        self.queries = check_count("queries", queries)
        self.compound = check_flag("compound", compound)
        self.each = 1 if compound else 2  # tokens of a pointer, and of a question
        self.context = self.each * nodes
        self.together = queries if check_flag("apart", apart) else 1
        self.asked = queries // self.together
        self.window = self.context // windows
        asking = self.each * self.asked + 1
        if self.context % windows or self.window < asking:
            raise ValueError(
                f"windows must divide the {self.context} tokens of a tree and leave at least "
                f"{asking}, those of {self.asked} questions, to a window, got {windows}"
            )
        # So that examples of one tree are drawn from one seed.
        self.block = self.together * max(1, Task.block // self.together)  # type: ignore[misc]  # so
        self.drawn = np.arange(len(self.hops))
        signs = nodes + len(self.hops)
        self.answer = signs * nodes if compound else 0
        self.stop = self.answer + nodes if compound else signs
        if compound:
            self.token_fields = [signs + 2, nodes]
        self.vocab_size = (signs + 2) * nodes if compound else signs + 1
        self.length = self.context + asking
        self.params = {
            "nodes": nodes,
            "hops": list(self.hops),
            "order": order,
            "back": back,
            "windows": windows,
            "queries": queries,
            "compound": compound,
            "apart": apart,
        }

    def parse(self, input_ids: Sequence[int]) -> dict[str, list]:
        """`pointers` [(node, parent)] and `queries` [(k, node, k-th ancestor)], as they stand.

        Ancestors are worked out.
        """
        tokens = [int(token) for token in input_ids]
        words = tokens[:-1]
        if self.compound:
            words = [digit for token in words for digit in divmod(token, self.nodes)]
        tree, asked = words[: 2 * self.nodes], words[2 * self.nodes :]
        pointers = list(zip(tree[::2], tree[1::2], strict=False))
        parents = dict(pointers)
        which = [word - self.nodes for word in asked[::2]]
        if (
            len(tokens) != self.length
            or tokens[-1] != self.stop
            or sorted(parents) != list(range(self.nodes))
            or not {*parents.values(), *asked[1::2]} <= parents.keys()
            or not {*which} <= {*range(len(self.hops))}
            or not self._is_tree(pointers)
        ):
            shape = "a cycle" if self.back is None else "a tree"
            raise ValueError(
                f"input_ids must be {self.nodes} pointers that make {shape}, in {self.order} "
                f"order, {self.asked} questions (hops, node) and the stop token {self.stop}: "
                f"{self.length} tokens, got {tokens}"
            )
        queries = []
        for number, node in zip(which, asked[1::2], strict=True):
            above = node
            for _ in range(self.hops[number]):
                above = parents[above]
            queries.append((self.hops[number], node, above))
        return {"pointers": pointers, "queries": queries}

    def _is_tree(self, pointers: list[tuple[int, int]]) -> bool:
        """Whether all pointers lead to one root, and parents come first if they must; of a cycle,
        whether they lead through all nodes.
        """
        parents, seen = dict(pointers), set()
        if self.back is None:
            node = pointers[0][0]
            while node not in seen:
                seen.add(node)
                node = parents[node]
            return len(seen) == self.nodes and node == pointers[0][0]
        for node, parent in pointers:
            if self.order == "topological" and node != parent and parent not in seen:
                return False
            seen.add(node)
        roots = [node for node, parent in pointers if node == parent]
        known = set(roots)
        while new := {n for n, parent in parents.items() if parent in known} - known:
            known |= new
        return len(roots) == 1 and len(known) == self.nodes

    def floor(self) -> dict[int, float]:
        """What a guess among the nodes that were not asked about so far scores.

        Labels are drawn, so that one label is as good as another, but for what the questions before
        tell: a node that was asked about has ancestors itself, and is less often one. Of 2**14
        drawn trees. On a cycle nothing tells a node from another, but the one that is asked about:
        k pointers above it stands another, or, k a multiple of all nodes, itself.
        """
        if self.back is None:
            return {k: 1 / (self.nodes - 1) if k % self.nodes else 1.0 for k in self._asked_hops}
        hops, ids, labels = self._drawn_trees()
        asked = self._asked_nodes(ids)
        answers = self._answers(labels)
        shares = np.empty(answers.shape)
        for place in range(self.asked):
            known = np.zeros((len(ids), self.nodes), dtype=bool)
            np.put_along_axis(known, asked[:, : place + 1], True, axis=1)
            new = ~np.take_along_axis(known, answers[:, place : place + 1], axis=1)[:, 0]
            shares[:, place] = new / (self.nodes - known.sum(axis=1))
        return {k: float(shares[hops == k].mean()) for k in self._asked_hops}

    def majority(self) -> Majority:
        """What always guessing one label scores, over all trees; every label is as frequent."""
        _, _, labels = self._drawn_trees()
        answers = self._answers(labels)
        same = (answers == answers[:, :1]).all(axis=1).mean()
        return Majority(float(same) / self.nodes, per_label=1 / self.nodes, guess=(self.answer,))

    def chance(self) -> float:
        """1 / nodes."""
        return 1 / self.nodes

    def only(self, *difficulties: int) -> Ancestor:
        """The same trees and tokens, `difficulties` hops asked for, equally often."""
        asked = check_asked(difficulties, "hops", self.hops)
        task = copy.copy(self)
        task.drawn = np.array([self.hops.index(hops) for hops in asked])
        return task

    def describe(self, example: Mapping[str, Any]) -> str:
        """The pointers of an example, and the ancestors asked for."""
        read = self.parse(example["input_ids"])
        lines = ["pointers: " + ", ".join(f"{node} to {up}" for node, up in read["pointers"])]
        lines += [
            f"{k} hop{'s' * (k != 1)} above {node}: {above}" for k, node, above in read["queries"]
        ]
        return "\n".join(lines)

    @property
    def _asked_hops(self) -> list[int]:
        return [self.hops[number] for number in self.drawn]

    def _asked_nodes(self, ids: np.ndarray) -> np.ndarray:
        """Nodes asked about [n, asked], of `input_ids`."""
        if self.compound:
            return ids[:, self.context : -1] % self.nodes
        return ids[:, self.context + 1 : -1 : 2]

    def _answers(self, labels: np.ndarray) -> np.ndarray:
        """Nodes that answer [n, asked], of `labels`."""
        return labels[:, self.context + self.each :: self.each] - self.answer

    def _drawn_trees(self) -> tuple[np.ndarray, ...]:
        parts = zip(*self._rows("test", 0, FLOOR_TREES), strict=True)
        return tuple(np.concatenate(part) for part in parts)

    def _rows(
        self, split: str, seed: int, count: int | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Hops of each question [n, asked], `input_ids` and `labels` [n, length] of a split.

        Trees do not depend on what is asked of them, nor on their order.
        """
        words = 3 * self.nodes + 2 * self.queries
        trees = None if count is None else -(-count // self.together)
        left = count
        for drawn in draw(split, seed, trees, words, self._read):
            hops, input_ids, labels = self._tokens(*drawn)
            yield hops[:left], input_ids[:left], labels[:left]
            left = None if left is None else left - len(hops)

    def _read(self, block: np.ndarray) -> tuple[np.ndarray, ...]:
        """Hashes [n], then parents [n, nodes] by place in the order of the tree, labels by place,
        words for the questions and for the order.
        """
        places = np.arange(self.nodes)
        if self.back is None:
            parents = np.tile(np.roll(places, 1), (len(block), 1))
        else:
            choices = np.minimum(places, self.back)
            choices[0] = 1
            back = 1 + (block[:, : self.nodes] % choices.astype(U64)).astype(np.int64)
            parents = np.maximum(places - back, 0)
        labels = distinct(block[:, self.nodes : 2 * self.nodes], self.nodes)
        points = np.empty_like(labels)
        np.put_along_axis(points, labels, np.take_along_axis(labels, parents, axis=1), axis=1)
        hashes = np.zeros(len(block), dtype=U64)
        for column in points.T:
            hashes = mix(hashes ^ column.astype(U64))
        rest = block[:, 2 * self.nodes :]
        asking = 2 * self.queries
        return hashes, parents, labels, rest[:, :asking], rest[:, asking:]

    def _tokens(
        self, parents: np.ndarray, labels: np.ndarray, asking: np.ndarray, mixing: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `_rows` yields."""
        rows = len(parents)
        depth = np.full_like(parents, 0 if self.back else self.hops[-1])
        for place in range(1, self.nodes if self.back else 1):
            above = parents[:, place : place + 1]
            depth[:, place] = np.take_along_axis(depth, above, axis=1)[:, 0] + 1
        pointers = np.stack([labels, np.take_along_axis(labels, parents, axis=1)], axis=2)
        if self.order == "random":
            order = distinct(mixing, self.nodes)
            pointers = np.take_along_axis(pointers, order[:, :, None], axis=1)
        which = self.drawn[(asking[:, : self.queries] % U64(len(self.drawn))).astype(np.int64)]
        hops = np.array(self.hops)[which]
        # The n-th of the nodes that have as many ancestors, n drawn.
        deep = depth[:, None, :] >= hops[:, :, None]
        count = deep.cumsum(axis=2)
        chosen = (asking[:, self.queries :] % count[:, :, -1].astype(U64)).astype(np.int64)
        place = (count == chosen[:, :, None] + 1).argmax(axis=2)
        above = place
        for hop in range(self.hops[-1]):
            up = np.take_along_axis(parents, above, axis=1)
            above = np.where(hop < hops, up, above)
        asked, answers = (np.take_along_axis(labels, x, axis=1) for x in (place, above))
        questions = np.stack([self.nodes + which, asked], axis=2)
        rows *= self.together
        pointers = np.repeat(pointers, self.together, axis=0)
        questions = questions.reshape(rows, self.asked, 2)
        hops, answers = (part.reshape(rows, self.asked) for part in (hops, answers))
        words = np.concatenate([pointers, questions], axis=1)
        tokens = words[:, :, 0] * self.nodes + words[:, :, 1] if self.compound else words
        stop = np.full((rows, 1), self.stop)
        input_ids = np.concatenate([tokens.reshape(rows, -1), stop], axis=1)
        targets = np.full_like(input_ids, IGNORED)
        targets[:, self.context + self.each :: self.each] = self.answer + answers
        return hops, input_ids, targets
