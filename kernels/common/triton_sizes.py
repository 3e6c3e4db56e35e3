"""What the Triton kernels of one call agree on: its sizes, chunks, strides and dtypes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import triton
from torch import Tensor

from hybrid_sleep.kernels.common.triton_launch import Precision, next_power

LONGEST_CHUNK = 64


class Sizes(NamedTuple):
    """B rows of T tokens in chunks of C, H heads of [K, V], of which R share a query and a key.

    segments: parts of a row that are scanned at once.
    """

    B: int
    T: int
    H: int
    R: int
    K: int
    V: int
    C: int
    segments: int

    @property
    def chunks(self) -> int:
        """How many chunks a row has."""
        return -(-self.T // self.C)

    @property
    def busy(self) -> int:
        """How many heads there are in all, roughly: what a configuration is chosen for."""
        return min(1024, triton.next_power_of_2(self.B * self.H * self.segments))

    def shared(self) -> dict[str, int]:
        """Arguments that every kernel takes."""
        given = {name: getattr(self, name) for name in ("T", "H", "R", "K", "C")}
        return given | {"NT": self.chunks, "BK": next_power(self.K)}


def chunk_length(T: int, chunk_size: int | None, how: Precision) -> int:
    """16, 32 or 64: `chunk_size` or what `how` prefers, rounded down, no longer than needed."""
    longest = how.chunk if chunk_size is None else chunk_size
    return min(next_power(T), max(16, min(LONGEST_CHUNK, 1 << (longest.bit_length() - 1))))


def strides(name: str, x: Tensor | None) -> dict[str, int]:
    """Strides of x [B, T, H, ...] as the arguments name_b, name_t and name_h; zeros without x."""
    found = (0, 0, 0) if x is None else x.stride()
    return {f"{name}_{dim}": stride for dim, stride in zip("bth", found, strict=False)}


def last_contiguous(x: Tensor | None) -> Tensor | None:
    """The tensor, contiguous in its last dimension; a copy only where it is not."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    """The tensor, contiguous; a copy only where it is not."""
    return None if x is None else x.contiguous()


def for_inputs(
    inputs: Iterable[Tensor | None], gradients: Iterable[Tensor | None]
) -> list[Tensor | None]:
    """Each gradient in the dtype of its input; None where either is."""
    return [
        None if x is None or dx is None else dx.to(x.dtype)
        for x, dx in zip(inputs, gradients, strict=True)
    ]
