"""Packed rows: several documents one after another in a row, none of which knows of the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hybrid_sleep.sleep.windows import real_tokens


@dataclass(frozen=True)
class Documents:
    """Where each of M documents lies in a batch `[B, T]`, row by row in order of appearance.

    row, start, length: `[M]` on the CPU; its row, its first column and its tokens.
    """

    row: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor

    def by_length(self) -> Iterator[torch.Tensor]:
        """Groups of documents, as ascending indices, the longest group first.

        A group's shortest is at least three quarters as long as its longest, so padding adds at
        most a third to its tokens; m tokens make at most 1 + log(m) / log(4 / 3) groups.
        """
        order = self.length.argsort(descending=True, stable=True)
        while len(order):
            together = 4 * self.length[order] >= 3 * self.length[order[0]]
            yield order[together].sort().values
            order = order[~together]

    def layout(
        self, members: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The documents `members: [m]` as a right-padded batch of n columns.

        Returns row `[m, 1]` and column `[m, n]`, where each token stands, and real `[m, n]`, False
        at pads, which stand anywhere in their row.
        """
        row, start, length = self.row[members], self.start[members], self.length[members]
        step = torch.arange(int(length.max()) if len(members) else 0)
        real = step < length[:, None]
        return row[:, None], start[:, None] + torch.where(real, step, 0), real


def find_documents(
    document_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> Documents:
    """The documents of `document_ids: [B, T]`: runs of adjacent columns with equal ids.

    Ids are at least 0; -1, or 0 in attention_mask, is a pad, which belongs to no document and ends
    one. ValueError names `document_ids` for another shape or dtype, and for ids below -1.
    """
    position = positions_in_document(document_ids, attention_mask).cpu()
    row, start = (position == 0).nonzero(as_tuple=True)
    of = (position == 0).flatten().cumsum(0)[(position >= 0).flatten()] - 1
    return Documents(row, start, torch.bincount(of, minlength=len(row)))


def positions_in_document(
    document_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`[B, T]`: how many tokens of its document stand before each token, -1 at pads.

    See `find_documents` for what a document is, and for errors.
    """
    if (
        document_ids.ndim != 2
        or document_ids.is_floating_point()
        or document_ids.dtype == torch.bool
    ):
        raise ValueError(
            f"document_ids must be integers [B, T], got {document_ids.dtype} of shape "
            f"{tuple(document_ids.shape)}"
        )
    if document_ids.numel() and int(document_ids.min()) < -1:
        raise ValueError(
            f"document_ids must be at least 0, or -1 at pads, got {int(document_ids.min())}"
        )
    ids, device = document_ids.long(), document_ids.device
    real = real_tokens(attention_mask, *ids.shape)
    if real is not None:
        ids = ids.masked_fill(~real.to(device), -1)
    column = torch.arange(ids.shape[1], device=device)
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    first = torch.where(starts, column, 0).cummax(1).values
    return (column - first).masked_fill(ids < 0, -1)


def document_ids_of(
    position_ids: torch.Tensor, real: torch.Tensor | None, read: torch.Tensor
) -> torch.Tensor | None:
    """The documents that `position_ids: [B, T]` tell: one starts wherever they start again at 0.

    real: bool `[B, T]`, False at pads, whose positions mean nothing; None for none. read: `[B]`,
    tokens of each row that came before. Returns None where every row is one text that goes
    on where it was. ValueError for positions that skip, repeat, or start elsewhere.
    """
    at = position_ids.long().cpu()
    real = torch.ones_like(at, dtype=torch.bool) if real is None else real
    going_on = read[:, None] + real.cumsum(1) - 1
    if torch.equal(at[real], going_on[real]):
        return None
    number = torch.zeros_like(at)
    for row in range(len(at)):
        here = at[row][real[row]]
        starts = here == 0
        follows = torch.zeros_like(starts)
        follows[1:] = here[1:] == here[:-1] + 1
        if len(here) and not bool((starts | follows).all()):
            first = int((~(starts | follows)).nonzero()[0])
            raise ValueError(
                f"position_ids must count each row's tokens from {int(read[row])} on, or start "
                f"again at 0 where a document starts; row {row} has {int(here[first])} behind "
                f"{int(here[first - 1]) if first else 'nothing'}. Positions follow the windows and "
                "cannot be chosen"
            )
        number[row][real[row]] = starts.cumsum(0)
    return number.masked_fill(~real, -1).to(position_ids.device)


def next_labels_in_document(labels: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Labels shifted to where they are predicted; a document's last token predicts none (-100).

    labels: `[B, T]`; position: `[B, T]`, see `positions_in_document`.
    """
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    following = torch.nn.functional.pad(position[:, 1:], (0, 1), value=0)
    return shifted.masked_fill(following <= 0, -100)
