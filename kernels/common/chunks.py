"""Sequences cut into chunks of equal length, the chunk first and the head before the token.

Shapes: NT chunks of C tokens (NT as in flash-linear-attention), B * H heads of a batch. With the
chunk first, one chunk of all heads is contiguous, and a product over all chunks is one batched
product.
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
    """How many chunks of at most `chunk_size` (NT), and their length C: as even as they can be.

    Fewer than C padded positions are left at the end of the last chunk.
    """
    chunks = -(-tokens // chunk_size)
    return chunks, -(-tokens // chunks)


def to_chunks(x_BTH: Tensor, NT: int, C: int, dtype: torch.dtype) -> Tensor:
    """[B, T, H, ...] as contiguous [NT, B * H, C, ...] in `dtype`, zeros behind the last token."""
    B, T, H = x_BTH.shape[:3]
    out = x_BTH.new_empty((NT, B, H, C, *x_BTH.shape[3:]), dtype=dtype)
    # [B, NT, C, H, ...], a view: the order in which x has its tokens.
    by_token = out.permute(1, 0, 3, 2, *range(4, out.dim()))
    for source, target in _matching_views(x_BTH, by_token):
        target.copy_(source)
    if T < NT * C:
        by_token[:, -1, T - NT * C :].zero_()
    return out.flatten(1, 2)


def from_chunks(x: Tensor, out_BTH: Tensor) -> None:
    """The inverse of `to_chunks`: writes [NT, B * H, C, ...] into `out_BTH`, in its dtype."""
    chunks = x.unflatten(1, (len(out_BTH), -1))
    by_token = chunks.permute(1, 0, 3, 2, *range(4, chunks.dim()))
    for target, source in _matching_views(out_BTH, by_token):
        target.copy_(source)


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


def _matching_views(x_BTH: Tensor, by_token: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pairs of views of x [B, T, ...] and of its chunks [B, NT, C, ...]: full chunks, the rest."""
    T, C = x_BTH.shape[1], by_token.shape[2]
    full, rest = divmod(T, C)
    pairs = []
    if full:
        pairs.append((x_BTH[:, : full * C].unflatten(1, (full, C)), by_token[:, :full]))
    if rest:
        pairs.append((x_BTH[:, full * C :], by_token[:, full, :rest]))
    return pairs


def log2_decays(g_BTH: Tensor, NT: int, C: int) -> Tensor:
    """The running sum c of each chunk's log decays [NT, B * H, C, 1], in units of log 2.

    Decays are kept as logarithms and only differences of two sums are ever exponentiated: products
    of the decays themselves would underflow after a few strong ones, and quotients of them be 0/0.
    In float64 where the device has it: after a reset a sum in float32 resolves the small decays
    that follow only roughly. Base 2, because exp2 is several times faster than exp on a CPU.
    """
    dtype = torch.float32 if g_BTH.device.type == "mps" else torch.float64
    log2 = to_chunks(g_BTH, NT, C, dtype).mul_(math.log2(math.e)).clamp_min_(_LEAST_LOG2[dtype])
    return log2.cumsum(-1).unsqueeze(-1)


def decays_at_ends(c: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What is left of the chunk's starting state at each token, and of each token at the end."""
    return c.exp2().to(dtype), (c[:, :, -1:] - c).exp2_().to(dtype)


def decays_between(c: Tensor, dtype: torch.dtype) -> Tensor:
    """Gamma [NT, B * H, C, C]: what is left of token j at token i >= j, else 0.

    No positive power is taken, so that nothing overflows however strong the decay is.
    """
    NT, BH, C, _ = c.shape
    Gamma = torch.sub(c, c.mT, out=c.new_empty((NT, BH, C, C), dtype=dtype))
    return Gamma.add_(Gamma.new_full((C, C), float("-inf")).triu_(1)).exp2_()


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
    """The gradient of g [NT, B * H, C]: at each token t the sum of all that exp(g_t) multiplies.

    Each of its terms is a part of the output times the gradient of that part: what token i takes
    from token j for i >= t > j (pairs [NT, B * H, C, C]; other entries do not matter), what i >= t
    reads from the chunk's starting state (read [NT, B * H, C]), what j < t leaves at the chunk's
    end (left [NT, B * H, C]), and what is kept of the state from start to end (kept [NT, B * H]).
    Each is as small as the decay is strong, and nothing cancels. A reversed running sum of the
    gradient of c, the textbook way, adds t's own pair (i = j = t) and takes it away again: after a
    strong decay nothing but the rounding of that is left.
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
