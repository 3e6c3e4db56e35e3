"""Sequences cut into chunks of equal length, the chunk first and the head before the token.

Shapes: N chunks of C tokens, M rows (batch times heads). With the chunk first, one chunk of all
rows is contiguous, and a product over all chunks is one batched product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Elements of one block: 24 MiB in float32, what a last-level cache holds.
_WORKING_SET = 6 * 2**20
# Powers of 2 that are zero in float64 and in float32: no gate, even of -inf, is taken to be less,
# so that running sums stay finite and go on resolving the small decays that follow.
_LEAST_LOG2 = {torch.float64: -1200.0, torch.float32: -192.0}


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


def from_chunks(x: Tensor, out_BTHD: Tensor) -> None:
    """The inverse of `to_chunks`: writes [N, B * H, C, ...] into `out_BTHD`, in its dtype."""
    chunks = x.unflatten(1, (len(out_BTHD), -1))
    for piece, place in _pieces(out_BTHD, chunks.permute(1, 0, 3, 2, *range(4, chunks.dim()))):
        piece.copy_(place)


def batch_blocks(B: int, elements: int, device: torch.device) -> list[slice]:
    """The batch in blocks of as many rows, of `elements` each, as a CPU works on at its best.

    What one block needs stays in the cache, and its buffers in the allocator: one block after
    another takes down to half the time of all at once. Other devices get a single block.
    """
    if device.type != "cpu":
        return [slice(0, B)]
    blocks = min(B, -(-B * elements // _WORKING_SET))
    rows = -(-B // blocks)
    return [slice(start, start + rows) for start in range(0, B, rows)]


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


def log2_decays(g_BTH: Tensor, N: int, C: int) -> Tensor:
    """The running sum c of each chunk's log decays [N, M, C, 1], in units of log 2.

    In float64 where the device has it: after a reset a sum in float32 resolves the small decays
    that follow only roughly. Base 2, because exp2 is several times faster than exp on a CPU.
    """
    dtype = torch.float32 if g_BTH.device.type == "mps" else torch.float64
    log2 = to_chunks(g_BTH, N, C, dtype).mul_(math.log2(math.e)).clamp_min_(_LEAST_LOG2[dtype])
    return log2.cumsum(-1).unsqueeze(-1)


def decays_at_ends(c: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What is left of the chunk's starting state at each token, and of each token at the end."""
    return c.exp2().to(dtype), (c[:, :, -1:] - c).exp2_().to(dtype)


def decays_between(c: Tensor, dtype: torch.dtype) -> Tensor:
    """What is left of token j at token i >= j, else 0 [N, M, C, C]: no positive power is taken."""
    N, M, C, _ = c.shape
    D = torch.sub(c, c.mT, out=c.new_empty((N, M, C, C), dtype=dtype))
    return D.add_(D.new_full((C, C), float("-inf")).triu_(1)).exp2_()


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Matrix products a b over the first two dimensions; `out` is contiguous."""
    if out is None:
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])
    torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out.flatten(0, 1))
    return out


def add_mm(out: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
    """out += factor * a b over the first two dimensions; `out` is contiguous."""
    out.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1), alpha=factor)
    return out


def gate_gradient(
    pairs: Tensor | None, read: Tensor | None, left: Tensor, kept: Tensor | None
) -> Tensor:
    """The gradient of g [N, M, C]: at each token t the sum of all that exp(g_t) is a factor of.

    Those are shares of the loss's gradient, each times what it is the gradient of: what token i
    takes from token j for i >= t > j (pairs [N, M, C, C]; other entries do not matter), what i >= t
    reads from the chunk's starting state (read [N, M, C]), what j < t leaves at the chunk's end
    (left [N, M, C]), and what is kept of the state from start to end (kept [N, M]). Each share is
    as small as the decay is strong, and nothing cancels, which it would if t's own pair (i = j = t)
    were added and taken away again.
    """
    C = left.shape[-1]
    not_before = left.new_ones(C, C).tril_()  # [i, t]: i >= t
    before = 1 - not_before
    dg = left @ before
    if pairs is not None:
        dg += (pairs @ before).mul_(not_before).sum(-2)
    if read is not None:
        dg[-len(read) :] += read @ not_before
        dg[-len(read) :] += kept.unsqueeze(-1)
    return dg
