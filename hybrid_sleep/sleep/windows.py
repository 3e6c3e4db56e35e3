"""Cut a batch into blocks that no row's window boundary crosses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hybrid_sleep.sleep.masks import is_uniform


@dataclass(frozen=True)
class TokenBlock:
    """One step through a batch: a forward pass over some tokens, then some rows sleep.

    columns: `[B, n]` input column of each row's i-th token of this block, or a slice where the
        columns are the same in all rows.
    lengths: `[B]` tokens of each row; those beyond are pads. All 0 in a first block that only lets
        rows sleep whose windows an earlier call has filled.
    full: indices of the rows whose window is full and who have another token behind this block: a
        full window stays readable until then. On the CPU.
    """

    columns: torch.Tensor | slice
    lengths: torch.Tensor
    full: torch.Tensor

    @property
    def real(self) -> torch.Tensor:
        """Bool `[B, n]`, False at pads."""
        return torch.arange(int(self.lengths.max())) < self.lengths[:, None]

    @property
    def last_column(self) -> int:
        """The last input column of any row in this block."""
        if isinstance(self.columns, slice):
            return self.columns.stop - 1
        return int(self.columns[self.real].max())

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """This block's part of `x: [B, T, ...]`; what stands at pads means nothing."""
        if isinstance(self.columns, slice):
            return x[:, self.columns]
        index = self.columns.to(x.device)
        return x.take_along_dim(index.view(*index.shape, *[1] * (x.ndim - 2)), dim=1)


def real_tokens(
    attention_mask: torch.Tensor | None, batch: int, columns: int
) -> torch.Tensor | None:
    """Bool `[B, T]` on the CPU from a mask that may also cover the past; None without pads."""
    if attention_mask is None:
        return None
    if (
        attention_mask.ndim != 2
        or attention_mask.shape[0] != batch
        or attention_mask.shape[1] < columns
    ):
        raise ValueError(
            f"attention_mask must be [{batch}, {columns}], or longer where it covers the past too, "
            f"got {tuple(attention_mask.shape)}"
        )
    real = attention_mask[:, -columns:].bool().cpu()
    return None if bool(real.all()) else real


def cut(
    counts: torch.Tensor, real: torch.Tensor | None, columns: int, window: int
) -> Iterator[TokenBlock]:
    """Yield blocks of at most one window that take each row through its tokens.

    counts: `[B]` tokens already in each row's window; real: bool `[B, columns]`, False at pads,
    None for none. Each row gets the blocks that it would get alone: a row is cut where its own
    window is full, wherever its pads lie.
    """
    if real is None and is_uniform(counts):
        yield from _cut_together(counts, columns, window)
        return
    if real is None:
        real = torch.ones(len(counts), columns, dtype=torch.bool)
    counts = counts.clone()
    total = real.sum(1)
    # A stable sort puts each row's tokens first, in order.
    order = torch.argsort(~real, dim=1, stable=True)
    done, lengths = torch.zeros_like(total), torch.zeros_like(total)
    index = order[:, :0]
    while True:
        counts = counts + lengths
        done = done + lengths
        waiting = done < total
        full = waiting & (counts == window)
        if int(lengths.max()) or bool(full.any()):
            yield TokenBlock(index, lengths, full.nonzero()[:, 0])
        if not bool(waiting.any()):
            return
        counts[full] = 0
        lengths = torch.where(waiting, torch.minimum(total - done, window - counts), 0)
        steps = torch.arange(int(lengths.max()))
        index = order.gather(1, (done[:, None] + steps).clamp_(max=columns - 1))


def _cut_together(counts: torch.Tensor, columns: int, window: int) -> Iterator[TokenBlock]:
    """Blocks of rows that are all alike, as slices: nothing has to be gathered."""
    stop, count, rows = 0, int(counts[0]), torch.arange(len(counts))
    if count == window and columns:
        yield TokenBlock(slice(0, 0), torch.zeros_like(counts), rows)
        count = 0
    while stop < columns:
        start, stop = stop, min(columns, stop + window - count)
        # Only the last block can leave its window open, so every next one starts a new window.
        count = 0
        lengths = torch.full_like(counts, stop - start)
        yield TokenBlock(slice(start, stop), lengths, rows if stop < columns else rows[:0])


def next_labels(labels: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Labels shifted to where they are predicted: at each token, the label of the row's next one.

    labels: `[B, T]`; real: bool `[B, T]` on the CPU, False at pads. Pads neither predict nor are
    predicted (-100), wherever they lie, so a padded row has the loss it has alone.
    """
    order = torch.argsort(~real, dim=1, stable=True).to(labels.device)
    real = real.to(labels.device)
    packed = labels.masked_fill(~real, -100).gather(1, order)
    shifted = torch.nn.functional.pad(packed[:, 1:], (0, 1), value=-100)
    return torch.empty_like(labels).scatter_(1, order, shifted).masked_fill_(~real, -100)


def unpack(
    blocks: list[tuple[TokenBlock, torch.Tensor]], first: int, columns: int
) -> torch.Tensor:
    """Put the blocks' hidden states `[B, n, D]` back where their tokens stood in the input.

    blocks: at least those with any column from `first` on. Returns `[B, columns - first, D]`
    for input columns `first..columns - 1`, zeros at pads.
    """
    if all(isinstance(block.columns, slice) for block, _ in blocks):
        joined = torch.cat([h for _, h in blocks], dim=1)
        return joined[:, joined.shape[1] - (columns - first) :]
    batch, _, width = blocks[0][1].shape
    # Slot 0 is the zero that pads show.
    joined = torch.cat([blocks[0][1].new_zeros(batch, 1, width), *(h for _, h in blocks)], dim=1)
    source = torch.zeros(batch, columns, dtype=torch.long)
    offset = 1
    for block, h in blocks:
        columns_Bn = block.columns
        assert isinstance(columns_Bn, torch.Tensor)
        row, place = block.real.nonzero(as_tuple=True)
        source[row, columns_Bn[row, place]] = offset + place
        offset += h.shape[1]
    index = source[:, first:, None].expand(-1, -1, width).to(joined.device)
    return joined.gather(1, index)
