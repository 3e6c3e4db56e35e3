"""Where the loss is: by position within the window, and by sleep depth."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from hybrid_sleep.sleep.documents import next_labels_in_document, positions_in_document
from hybrid_sleep.sleep.windows import next_labels
from hybrid_sleep.training.depth import Drawn, depths_of
from hybrid_sleep.validation import check_count

CHUNK = 2**24  # logits turned to fp32 at a time


class LossByPosition:
    """Sums cross-entropy over training batches, by place in the window and by depth.

    A supervised token is counted where it stands itself, not where it is predicted from: token i of
    its row or document (real tokens only, from 0) lies in bin `(i mod L) * bins // L` of a window
    of L tokens. The first token of a window is the last that sees the whole window before it; under
    hard eviction all others know what lies before their window from fast weights alone, so a loss
    that is no higher behind the boundary than at the window's end says that they hold what matters.

    depths: every depth that is trained, as `DepthPolicy.depths()` gives them.
    """

    def __init__(self, depths: Iterable[int], bins: int = 8):
        self.depths = tuple(sorted(set(depths)))
        self.bins = check_count("bins", bins)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        # Sums and counts, [2, depths, bins]; moves to the device of the logits.
        self._table = torch.zeros(2, len(self.depths), self.bins, dtype=torch.float64)

    @torch.no_grad()
    def add(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        window: int,
        *,
        depth: Drawn,
        attention_mask: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> None:
        """Count one batch: logits `[B, T, V]`, unshifted labels `[B, T]` (-100: not counted).

        depth: of all rows, or one for each group of equally many, as a model's forward takes it.
        attention_mask, document_ids: `[B, T]`, as the model's forward takes them; the first token
        of a document is predicted from nothing and does not count. positions: `[B, T]`, each
        token's index in its row or document, where counting in this batch does not give it.
        Raises ValueError for another shape or a depth that is not one of `depths`.
        """
        depths = depths_of(depth)
        if not {*depths} <= {*self.depths} or len(logits) % len(depths):
            known = ", ".join(map(str, self.depths))
            raise ValueError(
                f"depth must be one of {known}, or one for each group of {len(logits)} rows, got "
                f"{depth!r}"
            )
        check_count("window", window)
        given = {"labels": labels, "attention_mask": attention_mask}
        given |= {"document_ids": document_ids, "positions": positions}
        for name, tensor in given.items():
            if tensor is not None and tensor.shape != logits.shape[:2]:
                raise ValueError(
                    f"{name} must have the shape of the logits, {tuple(logits.shape[:2])}, got "
                    f"{tuple(tensor.shape)}"
                )
        labels = labels.to(logits.device)
        _, attention_mask, document_ids, positions = (
            None if tensor is None else tensor.to(logits.device) for tensor in given.values()
        )
        if document_ids is None:
            real = torch.ones_like(labels) if attention_mask is None else attention_mask
            place = real.bool().cumsum(1) - 1
            shift = functools.partial(next_labels, real=real.bool())
        else:
            place = positions_in_document(document_ids, attention_mask)
            shift = functools.partial(next_labels_in_document, position=place)
        place = place if positions is None else positions
        # Both the label of a token and its bin, where the token is predicted from.
        targets = shift(labels).flatten()
        first_bin = torch.tensor([self.depths.index(N) * self.bins for N in depths])
        first_bin = first_bin.to(labels.device).repeat_interleave(len(labels) // len(depths))
        bins = (first_bin[:, None] + shift(place % window * self.bins // window)).flatten()
        counted = (targets != -100).nonzero()[:, 0]
        targets, bins = targets[counted], bins[counted]
        flat = logits.reshape(-1, logits.shape[-1])
        self._table = self._table.to(logits.device)
        sums, counts = self._table.view(2, -1)
        size = max(1, CHUNK // flat.shape[1])
        for start in range(0, len(counted), size):
            some = slice(start, start + size)
            loss = cross_entropy(flat[counted[some]].float(), targets[some], reduction="none")
            sums.index_add_(0, bins[some], loss.double())
            counts.index_add_(0, bins[some], torch.ones_like(loss, dtype=torch.float64))

    def tensor(self) -> torch.Tensor:
        """Sums and counts, fp64 `[2, depths, bins]`; adding those of several ranks pools them."""
        return self._table.clone()

    def load(self, table: torch.Tensor) -> None:
        """Take `table`, made by `tensor` and perhaps summed over ranks, for what was counted."""
        if table.shape != self._table.shape:
            raise ValueError(
                f"table must have shape {tuple(self._table.shape)}, got {tuple(table.shape)}"
            )
        self._table = table.detach().to(torch.float64).clone()

    def summary(self) -> dict[str, Any]:
        """`loss_by_position` (a mean for each bin) and `loss_by_depth`; None where nothing fell."""
        table = self._table.cpu()
        return {
            "loss_by_position": _means(table.sum(1)),
            "loss_by_depth": dict(zip(self.depths, _means(table.sum(2)), strict=True)),
        }


def _means(sums_and_counts: torch.Tensor) -> list[float | None]:
    sums, counts = sums_and_counts.tolist()
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)]
