"""Sequences cut into chunks of equal length, the chunk first and the head before the token."""

from __future__ import annotations

import torch
from torch import Tensor


def split(tokens: int, chunk_size: int) -> tuple[int, int]:
    """How many chunks of at most `chunk_size`, and their length C: as even as they can be.

    Fewer than C padded positions are left at the end of the last chunk.
    """
    chunks = -(-tokens // chunk_size)
    return chunks, -(-tokens // chunks)


def to_chunks(x_BTHD: Tensor, N: int, C: int, dtype: torch.dtype) -> Tensor:
    """[B, T, H, ...] as contiguous [N, B * H, C, ...] in `dtype`, zeros behind the last token."""
    B, T, H = x_BTHD.shape[:3]
    out = x_BTHD.new_empty((N, B, H, C, *x_BTHD.shape[3:]), dtype=dtype)
    tokens_BNCHD = out.permute(1, 0, 3, 2, *range(4, out.dim()))
    for piece, place in _pieces(x_BTHD, tokens_BNCHD):
        place.copy_(piece)
    if T < N * C:
        tokens_BNCHD[:, -1, T - N * C :].zero_()
    return out.flatten(1, 2)


def from_chunks(x: Tensor, B: int, T: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `to_chunks`: [N, B * H, C, ...] as contiguous [B, T, H, ...] in `dtype`."""
    chunks = x.unflatten(1, (B, -1))
    out = x.new_empty((B, T, chunks.shape[2], *x.shape[3:]), dtype=dtype)
    for piece, place in _pieces(out, chunks.permute(1, 0, 3, 2, *range(4, chunks.dim()))):
        piece.copy_(place)
    return out


def _pieces(x: Tensor, tokens_BNC: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Views that match: of x [B, T, ...] the full chunks and the rest, and where those live."""
    T, C = x.shape[1], tokens_BNC.shape[2]
    full, rest = divmod(T, C)
    pairs = []
    if full:
        pairs.append((x[:, : full * C].unflatten(1, (full, C)), tokens_BNC[:, :full]))
    if rest:
        pairs.append((x[:, full * C :], tokens_BNC[:, full, :rest]))
    return pairs
