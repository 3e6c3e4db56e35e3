"""Which tokens a cache has processed, as two hashes a row: enough to recognise a text."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch

# A prompt that shares so many first tokens with the past is taken for the same text, changed.
OPENING = 32
MOST_LATER = 64

_BASE = 0x5851F42D4C957F2D
_MIX = -0x40A7B892E31B1A47
_ELEMENTS = 1 << 22


class History(NamedTuple):
    """Polynomial hashes modulo 2**64 of the tokens of each row, `[B]` int64 each.

    whole: of all tokens; opening: of the first `OPENING`. A token counts as the bits of its
    embedding, so that ids, and embeddings of the same values, are the same text.
    later: single tokens that are not in the hashes yet; `folded()` puts them in, many at a time,
    since one at a time they would cost a step of decoding more than a matrix product does.
    """

    whole: torch.Tensor
    opening: torch.Tensor
    later: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...] = ()

    @classmethod
    def empty(cls, batch: int, device: torch.device | str = "cpu") -> History:
        """Of rows without tokens."""
        zero = torch.zeros(batch, dtype=torch.long, device=device)
        return cls(zero, zero)

    def extend(self, h: torch.Tensor, before: torch.Tensor, new: torch.Tensor) -> History:
        """After `new: [B]` more tokens a row, the first of `h: [B, n, D]`, behind `before: [B]`.

        before and new lie on the CPU.
        """
        history = self._replace(later=(*self.later, (h.detach(), before, new)))
        return history if h.shape[1] == 1 and len(history.later) < MOST_LATER else history.folded()

    def folded(self) -> History:
        """The same with every token in the hashes."""
        if not self.later:
            return self
        parts, before, counts = zip(*self.later, strict=True)
        h, new = torch.cat(parts, dim=1), torch.stack(counts, dim=1)
        total = new.sum(1)
        if len(parts) > 1 and int(total.min()) < h.shape[1]:
            real = [torch.arange(x.shape[1]) < n[:, None] for x, _, n in self.later]
            order = torch.argsort(~torch.cat(real, dim=1), dim=1, stable=True)
            h = h.take_along_dim(order.to(h.device)[..., None], dim=1)
        tokens = token_hashes(h)
        first = (OPENING - before[0]).clamp(min=0).minimum(total)
        opening = self.opening.to(h.device)
        if int(first.max()):
            opening = _append(opening, tokens, first)
        return History(_append(self.whole.to(h.device), tokens, total), opening)


def token_hashes(h: torch.Tensor) -> torch.Tensor:
    """`[B, n]` int64: a hash of the bits of each embedding in `h: [B, n, D]`."""
    h = h.detach().contiguous()
    bits = h.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[h.element_size()])
    weights = _weights(h.shape[-1], h.device)
    step = max(1, _ELEMENTS // (h.shape[0] * h.shape[2]))
    parts = [(part.long() * weights).sum(-1) for part in bits.split(step, dim=1)]
    x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    # A step of splitmix64 (Steele et al., OOPSLA 2014): embeddings that are alike end far apart.
    return (x ^ (x >> 30)) * _MIX


def history_of(
    parts: Iterable[tuple[torch.Tensor, torch.Tensor]], length: torch.Tensor
) -> History:
    """Of rows whose tokens are the first `length: [B]` tokens of a text, which is given in parts.

    parts: embeddings `[B, n, D]` and real `[B, n]`, False at pads, one stretch of columns after
    another; lengths and real on the CPU.
    """
    history, done = History.empty(len(length)), torch.zeros_like(length)
    for h, real in parts:
        order = torch.argsort(~real, dim=1, stable=True)
        new = real.sum(1).minimum(length - done)
        h = h.take_along_dim(order.to(h.device)[..., None], dim=1)
        history = history.extend(h, done, new)
        done = done + new
        if torch.equal(done, length):
            break
    return history.folded()


def _append(value: torch.Tensor, tokens: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """value * base ** new + sum of tokens[i] * base ** (new - 1 - i), for each row."""
    count = int(new.max())
    powers = _powers(count)
    left = new[:, None] - 1 - torch.arange(count)
    factors = torch.where(left >= 0, powers[left.clamp(min=0)], 0).to(value.device)
    return value * powers[new].to(value.device) + (tokens[:, :count] * factors).sum(1)


@lru_cache(maxsize=64)
def _powers(count: int) -> torch.Tensor:
    """base ** 0 .. base ** count, modulo 2**64."""
    values, power = [], 1
    for _ in range(count + 1):
        values.append(power - (1 << 64) if power >> 63 else power)
        power = power * _BASE % (1 << 64)
    return torch.tensor(values)


@lru_cache(maxsize=16)
def _weights(width: int, device: torch.device) -> torch.Tensor:
    """Odd numbers drawn once and for all, one for each place of an embedding."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(1 << 62), 1 << 62, (width,), generator=generator)
    return (2 * drawn + 1).to(device)
